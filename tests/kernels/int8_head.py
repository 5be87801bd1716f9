"""Comparisons of the 8-bit head's kernels with their twins, for the interpreter and for a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sbn_kernels.gradients import cross_entropy_rounded
from sbn_kernels.gradients.reference import cross_entropy_rounded_reference
from torch import Tensor

from sbn_lightning.backends import int8_head


def parts_by_kernels_and_twins(
    monkeypatch: pytest.MonkeyPatch, hidden: Tensor, weight: Tensor, target: Tensor, size: int
) -> list[tuple[Any, ...]]:
    """Return what a head gives for two parts of ``size`` tokens: by the kernels, and by the twins."""
    found = []
    for twins in (False, True):
        if twins:
            monkeypatch.setattr(int8_head, "_arithmetic", lambda tensor: int8_head._TWINS)
        head = int8_head.Int8Head(hidden, weight, target)
        parts = (head.part(slice(size * i, size * i + size), i, 1 / len(hidden)) for i in range(2))
        found.append([x for part in parts for x in part])
    return list(zip(*found, strict=True))


def check_cross_entropy(logits: Tensor, loss_tolerance: dict[str, float], scale_tolerance: float) -> None:
    """Compare the kernel with its twin, on random targets and scales.

    Args:
        logits: ``[tokens, classes]``.
        loss_tolerance: The tolerances of the losses, as ``assert_close`` takes them.
        scale_tolerance: The relative tolerance of the scales.
    """
    (tokens, classes), device = logits.shape, logits.device
    target, seed = torch.randint(classes, (tokens,), device=device), torch.tensor([3], device=device)
    class_scale, token_scale = torch.rand(classes, device=device) + 0.1, torch.rand(tokens, device=device) + 0.1
    loss, ours = cross_entropy_rounded(logits, class_scale, target, 0.01, token_scale, seed, 2)
    wanted, twin = cross_entropy_rounded_reference(logits, class_scale, target, 0.01, token_scale, seed, 2)
    torch.testing.assert_close(loss, wanted, **loss_tolerance)
    for name in ("token_scale", "channel_scale"):
        torch.testing.assert_close(getattr(ours, name), getattr(twin, name), rtol=scale_tolerance, atol=1e-30)
    for name in ("tokens", "channels"):
        difference = (getattr(ours, name).int() - getattr(twin, name).int()).abs()
        assert difference.sum() <= 0.01 * difference.numel() + 1
