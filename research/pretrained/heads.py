"""Which attention heads find the token after an earlier occurrence of the present token: induction heads.

A row is a span of random words, twice (Olsson et al., arXiv 2209.11895). A head that copies attends from a token of the
second span to the token that followed the same token in the first span. The score of a head is the mean attention
weight on that place. It is 1 for a perfect induction head, and about one over the number of tokens for any other head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from sbn_lightning.evaluation.inspection import Inspection, Variant
from sbn_lightning.evaluation.probes import Task, probe
from sbn_lightning.models.attention import causal_attention
from sbn_lightning.models.transformer import TernaryTransformer
from sbn_lightning.sparsity.config import SparsityConfig

# What is converted, one after the other, in all blocks.
GROUPS: dict[str, Sequence[str]] = {
    "q and k": ("q", "k"),
    "v and o": ("v", "o"),
    "gate, up and down": ("gate", "up", "down"),
    "everything": ("q", "k", "v", "o", "gate", "up", "down"),
}
SPAN, ROWS, BEST = 64, 8, 8


class _Score:
    """Attention that also notes how much each head attends to the token after the earlier occurrence."""

    def __init__(self, span: int) -> None:
        self.span = span
        self.scores: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = (q.float() @ keys.float().transpose(-1, -2)) / q.shape[-1] ** 0.5
        length = q.shape[2]
        causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        weights = logits.masked_fill(~causal, float("-inf")).softmax(-1)
        # The token at place t came at t - span before, and was followed by the token at t - span + 1.
        found = weights.diagonal(1 - self.span, -2, -1)  # The first column belongs to place span - 1.
        self.scores = found[..., 2:].mean((0, 2)).cpu()
        return causal_attention(q, k, v, window)


@torch.no_grad()
def induction_scores(model: TernaryTransformer, tokens: Tensor, span: int) -> Tensor:
    """Return the score of each head, float32 ``[blocks, heads]``.

    Args:
        model: The model, not compiled.
        tokens: Rows of a first token and a span that comes twice, int64 ``[rows, 1 + 2 * span]``.
        span: The number of tokens of the span.
    """
    watchers = [_Score(span) for _ in model.blocks]
    model.hidden(tokens.to(model.embed.weight.device), attend=watchers)
    return torch.stack([watcher.scores for watcher in watchers if watcher.scores is not None])


def repeated_rows(words: Tensor, first: int, span: int, rows: int, seed: int = 0) -> Tensor:
    """Return rows for :func:`induction_scores`.

    Args:
        words: The tokens to draw from, without repetition in a span.
        first: The token at the beginning of a row.
        span: The number of tokens of the span.
        rows: The number of rows.
        seed: The seed of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    spans = torch.stack([words[torch.randperm(len(words), generator=generator)[:span]] for _ in range(rows)])
    return torch.cat((torch.full((rows, 1), first), spans, spans), 1)


def best_heads(model: TernaryTransformer, first: int, span: int = SPAN) -> list[list[float]]:
    """Return the heads with the highest scores: the block, the head and the score.

    Args:
        model: The model, not compiled.
        first: The token at the beginning of a row.
        span: The number of tokens of the repeated span.
    """
    words = torch.arange(1000, min(20_000, model.config.vocab_size))
    scores = induction_scores(model, repeated_rows(words, first, span, ROWS), span)
    values, places = scores.flatten().sort(descending=True)
    return [[*divmod(int(i), scores.shape[1]), round(float(s), 4)] for s, i in zip(values[:BEST], places, strict=False)]


@torch.no_grad()
def copying_by_part(
    model: TernaryTransformer, tasks: Sequence[Task], first: int, pattern: str, batch_size: int = 16
) -> Iterator[dict[str, Any]]:
    """Yield what is left of copying when a part of a dense model is converted, without any training.

    Args:
        model: The dense model.
        tasks: The tasks to ask.
        first: The token at the beginning of a row.
        pattern: The pattern N:M of the conversion.
        batch_size: The number of rows that the model sees at once.
    """
    device = model.embed.weight.device
    inspection = Inspection(model, tasks[0].tokens[:1].to(device), SparsityConfig(pattern=pattern))

    def ask(what: str, variant: Variant | None) -> dict[str, Any]:
        found = probe(lambda tokens: model(tokens.to(device)), tasks, batch_size)
        return {
            "converted": what,
            "variant": variant,
            "pattern": pattern,
            "probe": [asdict(one) for one in found],
            "heads": best_heads(model, first),
        }

    yield ask("nothing", None)
    variants: tuple[Variant, ...] = ("masked", "rounded", "ternary")
    for variant in variants:
        for what, parts in GROUPS.items():
            with inspection.converted(variant, parts):
                yield ask(what, variant)
