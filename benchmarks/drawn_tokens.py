"""What the choice of a token costs: a decode step with and without the choice behind it, in one CUDA graph.

    python benchmarks/drawn_tokens.py [--models qwen2.5-1.5b] [--batches 1 16] [--steps graph persistent]

The weights are random at 2:4, the shapes are those of Qwen2.5. Rows differ in how the next token is chosen:

* ``none``: the step alone.
* ``greedy``: the most likely token.
* ``temperature``: a draw at a temperature of 0.8.
* ``top_p``: the same among the most likely tokens that have 0.9 of the probability, and ``top_k`` among 50 tokens.
* ``behind``: the draw of ``temperature``, launched behind the graph instead of recorded in it.
* ``multinomial``: ``torch.multinomial`` of a softmax behind the graph.

``ms`` is the time of a step with its choice, and ``choice_us`` is what it takes longer than the step alone in the same
run. Before timing, tokens of the graph are compared with those of the same calls behind the graph.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from common import append, fresh_results, header, need_gpu
from generation import build
from generation_table import DEVICE, VARIANTS, call_times, random_tokens
from torch import Tensor

from sbn_lightning.inference import Decoder, Sampling
from sbn_lightning.inference.decoder import StepKind
from sbn_lightning.inference.opening import use_backend
from sbn_lightning.inference.persistent import refusal
from sbn_lightning.layers.sparse_linear import prepare_layers
from sbn_lightning.models.config import QWEN2_5_SHAPES
from sbn_lightning.models.transformer import TernaryTransformer

CONTEXT, CHECKED_STEPS, WINDOW, WINDOWS = 256, 12, 8, 12
SAMPLINGS = {
    "greedy": Sampling(),
    "temperature": Sampling(0.8),
    "top_p": Sampling(0.8, top_p=0.9),
    "top_k": Sampling(0.8, top_k=50),
}
CHOICES = ("none", *SAMPLINGS, "behind", "multinomial")
COLUMNS = ("model", "step", "batch", "choice", "ms", "choice_us")
KEY = COLUMNS[:4]


def check(decoder: Decoder, tokens: Tensor, choice: str) -> None:
    """Compares tokens of the graph with those of the same calls behind the graph.

    Raises:
        AssertionError: If one differs.
    """
    decoder.sampler.set_all(SAMPLINGS[choice], 3)
    start, given = decoder.lengths.clone(), tokens
    for i in range(CHECKED_STEPS):
        before = decoder.lengths.clone()
        expected = decoder.sampler.choose(decoder.step(given), decoder.lengths).clone()
        decoder.lengths.copy_(before)
        found = decoder.step_next(given).clone()
        if not torch.equal(found, expected):
            raise AssertionError(f"{choice}, token {i}: the graph gives {found.tolist()}, not {expected.tolist()}")
        given = found
    decoder.check()
    decoder.lengths.copy_(start)


def step_of(decoder: Decoder, choice: str) -> Callable[[Tensor], Tensor]:
    """Returns the function that makes the next tokens of these."""
    if choice == "none":
        return lambda tokens: (decoder.step(tokens), tokens)[1]
    if choice == "behind":
        return lambda tokens: decoder.sampler.choose(decoder.step(tokens), decoder.lengths)
    if choice == "multinomial":
        return lambda tokens: torch.multinomial((decoder.step(tokens).float() / 0.8).softmax(-1), 1).squeeze(-1)
    return decoder.step_next


def milliseconds(decoder: Decoder, tokens: Tensor, choice: str) -> float:
    """Returns the median time of a step, over windows of 8 steps."""
    decoder.sampler.set_all(SAMPLINGS.get(choice, SAMPLINGS["temperature"]), 3)
    start, step = decoder.lengths.clone(), step_of(decoder, choice)
    tokens = decoder.step_next(tokens)  # The decoder's own tensor, which a step reads without a copy.

    def window() -> None:
        nonlocal tokens
        for _ in range(WINDOW):
            tokens = step(tokens)

    window(), window()
    times = call_times(window, WINDOWS)
    decoder.check()
    decoder.lengths.copy_(start)
    return statistics.median(times) / WINDOW


def measure(path: Path, name: str, model: TernaryTransformer, step: StepKind, batch: int, choices: list[str]) -> None:
    """Checks the choices of one batch, times them, and adds their rows to the CSV."""
    decoder = Decoder(model, batch, CONTEXT + (WINDOWS + 3) * WINDOW, step=step)
    lengths = torch.full((batch,), CONTEXT, device=DEVICE)
    tokens = decoder.prefill_padded(random_tokens(batch, CONTEXT), lengths).argmax(-1)
    for choice in choices:
        if choice in SAMPLINGS:
            check(decoder, tokens, choice)
    alone = milliseconds(decoder, tokens, "none")
    for choice in choices:
        ms = alone if choice == "none" else milliseconds(decoder, tokens, choice)
        values = (name, step, batch, choice, ms, "" if choice == "none" else 1e3 * (ms - alone))
        append(path, dict(zip(COLUMNS, values, strict=True)), KEY)


def main() -> None:
    """Measures all batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["qwen2.5-1.5b"], choices=list(QWEN2_5_SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--steps", nargs="+", default=["graph", "persistent"], choices=get_args(StepKind))
    parser.add_argument("--choices", nargs="+", default=list(CHOICES), choices=CHOICES)
    parser.add_argument("--append", action="store_true", help="keep the rows of the CSV that are not measured again")
    args = parser.parse_args()
    need_gpu()
    print(header())
    path = fresh_results("drawn_tokens", args.append, COLUMNS)
    for name in args.models:
        model = build(name, "2:4", 4096)
        use_backend(model, VARIANTS["2:4"][2], torch.bfloat16)
        prepare_layers(model)
        for step in args.steps:
            for batch in args.batches:
                if step != "graph" and (reason := refusal(model, batch)):
                    print(f"{name}, {step}, batch {batch}: left out, the kernel {reason}", flush=True)
                    continue
                measure(path, name, model, step, batch, args.choices)


if __name__ == "__main__":
    main()
