"""The rows of ``generation.py``: what is measured, how a call is timed, and the table that rows go to."""

from __future__ import annotations

import gc
import statistics
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from common import append
from torch import Tensor

from sbn_lightning.models.config import TransformerConfig

# Variant -> (kind of its linear layers, pattern, backend).
VARIANTS = {
    "bf16 dense": ("dense", "6:8", "reference"),
    "2:4": ("ternary", "2:4", "sparse"),
    "6:8": ("ternary", "6:8", "int8"),
    "2:4, one kernel": ("ternary", "2:4", "sparse"),
    "2:4, 8-bit head": ("ternary", "2:4", "sparse"),
    "2:4, one kernel, 8-bit head": ("ternary", "2:4", "sparse"),
}
PERSISTENT, ROUNDED = "one kernel", "8-bit head"  # parts of a variant's name
COLUMNS = ("model", "what", "batch", "variant", "ms", "tokens_s", "bf16_ms", "vs_bf16", "error", "same", "bandwidth")
KEY = ("model", "what", "batch", "variant")
DEVICE = torch.device("cuda")
PREFILL_LENGTH, SHORT_LENGTH, CHECKED_PROMPTS = 2048, 512, 4
COPIED = 1 << 30  # bytes


def random_tokens(batch: int, length: int) -> Tensor:
    """Draws token ids ``[batch, length]``."""
    return torch.randint(151936, (batch, length), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))


def call_times(call: Callable[[], object], count: int) -> list[float]:
    """Returns the milliseconds between the ends of ``count`` calls in a row."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def few_calls_ms(call: Callable[[], object]) -> float:
    """Returns the median time of 3 to 10 calls, about half a second; a first call says how many fit."""
    (first,) = call_times(call, 1)
    return statistics.median(call_times(call, max(3, min(10, int(500 / first)))))


def copy_rate() -> float:
    """Returns the bytes a millisecond of a large copy, read plus written."""
    source = torch.empty(COPIED, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * COPIED / few_calls_ms(lambda: target.copy_(source))


def bytes_of_step(name: str, variant: str, batch: int, context: int) -> float:
    """Returns what a decode step has to read: weights, head, and the keys and values of the contexts."""
    linear, _, _ = VARIANTS.get(variant, VARIANTS["bf16 dense"])
    config = TransformerConfig.preset(name, linear=linear)
    width, kv = config.n_heads * config.head_size, config.n_kv_heads * config.head_size
    weights = config.n_layers * (config.d_model * (2 * width + 2 * kv) + 3 * config.d_model * config.d_ffn)
    head = config.vocab_size * config.d_model * (1 if ROUNDED in variant else 2)
    cache = config.n_layers * 2 * kv * 2 * context * batch
    return weights * (2 if linear == "dense" else 0.25) + head + cache


class Table:
    """Rows of one model: ratios to its BF16 rows, and what could not be measured.

    Args:
        path: The CSV.
        model: The model's name.
    """

    def __init__(self, path: Path, model: str) -> None:
        self.path = path
        self.model = model
        self.base: dict[tuple[str, int], float] = {}
        self.missing: list[str] = []
        self.copied: float | None = None  # bytes a millisecond

    def add(
        self,
        variant: str,
        what: str,
        batch: int,
        ms: float,
        error: float | str,
        same: float | str,
        context: int | None = None,
    ) -> None:
        """Writes a row; ``context`` is the number of tokens in the cache of a decode step."""
        if variant == "bf16 dense":
            self.base[what, batch] = ms
        amount = batch * {"prefill": PREFILL_LENGTH, "prefill 512": SHORT_LENGTH}.get(what, 1)
        bandwidth: float | str = ""
        if context is not None:
            self.copied = self.copied or copy_rate()
            bandwidth = bytes_of_step(self.model, variant, batch, context) / ms / self.copied
        base = self.base.get((what, batch))
        ratio: tuple[float | str, float | str] = (base, base / ms) if base else ("", "")
        values = (self.model, what, batch, variant, ms, 1e3 * amount / ms, *ratio, error, same, bandwidth)
        append(self.path, dict(zip(COLUMNS, values, strict=True)), KEY)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Runs one cell with all memory free and nothing compiled; notes a failure and goes on."""
        torch.compiler.reset()  # each batch is compiled for its own sizes, whatever ran before
        gc.collect()
        torch.cuda.empty_cache()
        try:
            yield
        except Exception:  # of any kind: time on a GPU is expensive, and the other rows do not depend on this one
            self.missing.append(f"{self.model}, {name}")
            print(f"{self.missing[-1]}: not measured", flush=True)
            traceback.print_exc()
