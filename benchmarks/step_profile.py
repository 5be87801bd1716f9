"""What took most of a step, from the events of torch's profiler."""

from __future__ import annotations

from typing import Any

import torch


def summary(events: Any) -> str:
    """A table of the kernels and of the host's calls that took most of one step."""
    events = [event for event in events if not getattr(event, "is_user_annotation", False)]  # They contain kernels.
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in kernels) / 1e3
    sent = sum(event.self_device_time_total for event in kernels if "nccl" in event.key.lower()) / 1e3
    host = sum(event.self_cpu_time_total for event in events) / 1e3
    lines = [f"one step: kernels {busy:.1f} ms, {sent:.1f} ms of them collectives; host {host:.1f} ms while profiled"]
    for told, chosen, time_of in (
        ("kernels", kernels, lambda event: event.self_device_time_total),
        ("host", [event for event in events if event not in kernels], lambda event: event.self_cpu_time_total),
    ):
        lines.append(f"  {told}: ms, calls, name")
        for event in sorted(chosen, key=time_of, reverse=True)[:25]:
            lines.append(f"  {time_of(event) / 1e3:9.2f} {event.count:6d}  {event.key[:100]}")
    return "\n".join(lines)
