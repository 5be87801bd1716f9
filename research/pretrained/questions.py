"""What a trained model is asked besides its losses: probes, tasks of held-out text, induction heads and samples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from research.pretrained.heads import SPAN, best_heads
from research.pretrained.items import Item, score_items
from sbn_lightning.data.tokenizer import find_eos
from sbn_lightning.evaluation.probes import Task, probe
from sbn_lightning.models.transformer import TernaryTransformer

# The beginnings of the samples.
PROMPTS = (
    'def read_lines(path):\n    """Return the lines of a text file."""\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "The configuration file is read when the program starts. If the file does not exist,",
)


def ask(model: TernaryTransformer, items: dict[str, list[Item]], tokenizer: Tokenizer, length: int) -> dict[str, Any]:
    """Return what a model answers: its best induction heads (block, head, score), tasks, and greedy samples."""
    from sbn_lightning.evaluation.scoring import score_ends
    from sbn_lightning.inference.loop import generate

    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in PROMPTS]
    room = min(64, length - max(map(len, prompts)))
    new = generate(model, prompts, max_new_tokens=room, cuda_graph=False) if room > 0 else []
    return {
        "induction_heads": best_heads(model, find_eos(tokenizer, None)[1], min(SPAN, length // 2 - 1)),
        "tasks": score_items(items, tokenizer, functools.partial(score_ends, model), length),
        "samples": [[prompt, tokenizer.decode(tokens)] for prompt, tokens in zip(PROMPTS, new, strict=False)],
    }


def probe_short(
    logits: Callable[[Tensor], Tensor], tasks: list[Task], short: int, length: int, batch: int
) -> list[dict[str, Any]]:
    """Return the results of the probes for a function that takes only rows of one length.

    Args:
        logits: The function from token ids ``[batch, length]`` to logits ``[batch, length, vocab_size]``.
        tasks: The probes, with rows of ``short`` tokens.
        short: The number of tokens in a row of the probes.
        length: The number of tokens that ``logits`` takes.
        batch: The number of rows that ``logits`` sees at once.
    """

    def of_short(tokens: Tensor) -> Tensor:
        # What follows a token does not change its logits, and a compiled model has one shape.
        return logits(torch.nn.functional.pad(tokens, (0, length - short)))[:, :short]

    return [asdict(result) for result in probe(of_short, tasks, batch)]
