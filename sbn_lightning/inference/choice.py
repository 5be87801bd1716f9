"""Choose how a decoder steps: with one persistent kernel, or with the layers of the model.

Both compute the same step, and which one is faster depends on the model, the batch and the GPU. So the choice is
measured, once in a process for each combination of them. Before that, both compute the next step of the decoder at
hand, and their logits are compared. A persistent kernel that computes something else is not used, however fast it is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sbn_lightning.inference.persistent import shape_of
from sbn_lightning.models.transformer import TernaryTransformer

# The largest relative RMS difference of the logits. Both paths round, and a rounding may move an 8-bit integer in every
# later layer. With random weights, which exaggerate that, up to 0.1 was seen.
BOUND = 0.2
# A most likely token may differ where the other path finds it about as likely: within this many standard deviations of
# the logits. At a difference of BOUND, two tokens can move that far apart.
TIE = 0.5
_ROUNDS, _STEPS = 5, 8


@dataclass(frozen=True)
class Verdict:
    """How to step.

    Attributes:
        kind: The path.
        reason: The measured times, or why the kernel is not used, in one line.
    """

    kind: Literal["graph", "persistent"]
    reason: str


_verdicts: dict[tuple[Any, ...], Verdict] = {}


def key_of(model: TernaryTransformer, batch_size: int, cuda_graph: bool) -> tuple[Any, ...]:
    """What a verdict depends on."""
    device, config = model.embed.weight.device, model.config
    block: Any = model.blocks[0]
    layers = str(getattr(block.attention.qkv, "backend", "")), model.is_compiled  # What their speed depends on.
    head = type(model.lm_head).__name__
    return str(device), shape_of(config), config.qkv_bias, config.pattern, *layers, head, batch_size, cuda_graph


def known(key: tuple[Any, ...]) -> Verdict | None:
    """The verdict of an earlier measurement in this process; None if there was none."""
    return _verdicts.get(key)


def judge(
    key: tuple[Any, ...],
    persistent: Callable[[], Tensor],
    plain: Callable[[], Tensor],
    check: Callable[[], object],
    rows: Tensor,
    lengths: Tensor,
) -> Verdict:
    """Compare the logits of both paths, then time both, and remember the verdict.

    The same step is computed again and again: it writes the same keys and values into the same slots.

    Args:
        key: What :func:`key_of` gives.
        persistent: Computes the next step with the persistent kernel, and returns its logits ``[B, vocab_size]``.
        plain: The same with the layers of the model.
        check: Raises a ``RuntimeError`` if a persistent step has passed its deadline.
        rows: Which rows hold a sequence, bool ``[B]``.
        lengths: The number of tokens of each row, int64 ``[B]``. Each step changes it, and it is put back afterwards.
    """
    before = lengths.clone()

    def again(step: Callable[[], Tensor]) -> Tensor:
        lengths.copy_(before)
        return step()

    try:
        differs = difference(again(persistent).clone(), again(plain), rows)
        check()
        if differs is None:
            ours, theirs = _milliseconds(partial(again, persistent), partial(again, plain), rows.device)
            check()
    except RuntimeError as error:
        differs = str(error).splitlines()[0]
    finally:
        lengths.copy_(before)
    if differs is not None:
        verdict = Verdict("graph", f"is not used: {differs}")
    elif ours <= theirs:
        verdict = Verdict("persistent", f"{ours:.3f} ms a step, the layers of the model {theirs:.3f} ms")
    else:
        verdict = Verdict("graph", f"is slower: {ours:.3f} ms a step, the layers of the model {theirs:.3f} ms")
    _verdicts[key] = verdict
    return verdict


def withdraw(key: tuple[Any, ...], reason: str) -> Verdict:
    """Make the layers of the model the verdict, because a step of the persistent kernel has failed since.

    Args:
        key: What :func:`key_of` gives.
        reason: Why the kernel is not used, in one line.
    """
    verdict = _verdicts[key] = Verdict("graph", reason)
    return verdict


def difference(logits: Tensor, expected: Tensor, rows: Tensor) -> str | None:
    """Say in one line how logits differ from the expected ones, or None if they differ by rounding only.

    Args:
        logits: The logits, ``[B, vocab_size]``.
        expected: The logits of the other path.
        rows: Which rows to compare, bool ``[B]``.
    """
    logits, expected = logits.float()[rows], expected.float()[rows]
    error = float((logits - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-20))
    if not error <= BOUND:
        return f"its logits differ from those of the layers by {error:.3f}, relative RMS"
    chosen = expected.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
    behind = (expected.amax(-1) - chosen) / expected.std(-1).clamp(min=1e-20)
    if bool((behind > TIE).any()):
        return f"it chooses a token that is {float(behind.max()):.2f} standard deviations behind that of the layers"
    return None


def _milliseconds(first: Callable[[], Tensor], second: Callable[[], Tensor], device: torch.device) -> tuple[float, ...]:
    """The median times of two calls, which take turns."""
    samples: tuple[list[float], list[float]] = [], []
    for _ in range(_ROUNDS):
        for call, times in zip((first, second), samples, strict=True):
            call()  # What the other call left in the caches must not count.
            times.append(_time(call, device))
    return tuple(statistics.median(times) for times in samples)


def _time(call: Callable[[], Tensor], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(_STEPS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / _STEPS
