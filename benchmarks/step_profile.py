"""Where the time of one step went, from the events of torch's profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

APART = 50  # Milliseconds between the optimiser's kernels of two steps, at least.
LONG_GAP = 0.1  # Milliseconds in which the GPU does nothing that are worth a line.

Span = tuple[float, float]


def summary(events: Any, steps: int = 1) -> str:
    """A table of the kernels and of the host's calls that took most of a step.

    Args:
        events: The sums of a profiler by name, ``profiler.key_averages()``.
        steps: The number of steps that were profiled.
    """
    events = [event for event in events if not getattr(event, "is_user_annotation", False)]  # They contain kernels.
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in kernels) / 1e3 / steps
    sent = sum(event.self_device_time_total for event in kernels if "nccl" in event.key.lower()) / 1e3 / steps
    host = sum(event.self_cpu_time_total for event in events) / 1e3 / steps
    lines = [f"one step: kernels {busy:.1f} ms, {sent:.1f} ms of them collectives; host {host:.1f} ms while profiled"]
    for told, chosen, time_of in (
        ("kernels", kernels, lambda event: event.self_device_time_total),
        ("host", [event for event in events if event not in kernels], lambda event: event.self_cpu_time_total),
    ):
        lines.append(f"  {told}: ms, calls, name")
        for event in sorted(chosen, key=time_of, reverse=True)[:25]:
            lines.append(f"  {time_of(event) / 1e3 / steps:9.2f} {event.count // steps:6d}  {event.key[:100]}")
    return "\n".join(lines)


def timeline(events: Any) -> str:
    """How computing and collectives lie beside each other in a step, and when the GPU did nothing.

    If several steps were profiled, the last one is told: from the end of the optimiser's kernels before to the end of
    its own. At the beginning of a profile the GPU waits for the host, as it does not in training.

    Args:
        events: The single events of a profiler, ``profiler.events()``.
    """
    seen = [
        (event.time_range.start / 1e3, event.time_range.end / 1e3, event.name)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    seen = sorted(one for one in seen if not one[2].startswith(("nccl:", "Optimizer.", "DistributedData")))
    if not seen:
        return "no kernels were seen"
    ends = [end for _, end, name in seen if "FusedAdam" in name]
    last_of_steps = [a for a, b in pairwise([*ends, float("inf")]) if b - a > APART]
    if len(last_of_steps) > 1:
        seen = [one for one in seen if last_of_steps[-2] <= one[0] and one[1] <= last_of_steps[-1]]
    sent = _union([(start, end) for start, end, name in seen if "nccl" in name.lower()])
    computed = _union([(start, end) for start, end, name in seen if "nccl" not in name.lower()])
    busy = _union([*sent, *computed])
    first, last = busy[0][0], busy[-1][1]
    alone = _length(busy) - _length(computed)
    lines = [
        f"timeline: {last - first:.1f} ms from the first kernel to the last; computing {_length(computed):.1f}, "
        f"collectives {_length(sent):.1f} ({alone:.1f} of them with nothing beside), "
        f"nothing {last - first - _length(busy):.1f}"
    ]
    lines.append("  gaps and lonely collectives: at ms, for ms, before the kernel")
    gaps = [(b[0] - a[1], a[1], b[0]) for a, b in pairwise(computed) if b[0] - a[1] > LONG_GAP]
    for length, start, end in sorted(gaps, reverse=True)[:24]:
        following = next(name for begin, _, name in seen if begin >= end - 1e-4 and "nccl" not in name.lower())
        inside = _length([(max(a, start), min(b, end)) for a, b in sent if a < end and b > start])
        lines.append(f"  {start - first:9.1f} {length:8.2f} ({inside:.2f} in collectives)  {following[:70]}")
    lines.append(f"  all {len(gaps)} gaps above {LONG_GAP} ms: {sum(gap[0] for gap in gaps):.1f} ms")
    lines.append("  kernels beside collectives: calls, mean ms; alone: calls, mean ms; name")
    beside: dict[str, list[list[float]]] = defaultdict(lambda: [[], []])
    place = 0
    for start, end, name in seen:
        if "nccl" in name.lower():
            continue
        while place < len(sent) and sent[place][1] <= start:
            place += 1
        overlap = place < len(sent) and sent[place][0] < end
        beside[name][0 if overlap else 1].append(end - start)
    for name, (with_them, without) in sorted(beside.items(), key=lambda item: -sum(map(sum, item[1])))[:12]:
        times = f"{len(with_them):5d} {_mean(with_them):8.4f} {len(without):6d} {_mean(without):8.4f}"
        lines.append(f"  {times}  {name[:70]}")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _union(spans: Sequence[Span]) -> list[Span]:
    """The spans of time that at least one of ``spans`` covers, in order."""
    whole: list[Span] = []
    for start, end in sorted(spans):
        if whole and start <= whole[-1][1]:
            whole[-1] = (whole[-1][0], max(end, whole[-1][1]))
        else:
            whole.append((start, end))
    return whole


def _length(spans: Sequence[Span]) -> float:
    return sum(end - start for start, end in spans)
