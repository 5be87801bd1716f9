"""The comparison of the distillation kernel with its twin, for the interpreter and for a GPU."""

from __future__ import annotations

import torch
from sbn_kernels.gradients import distillation_losses
from sbn_kernels.gradients.reference import distillation_losses_reference
from torch import Tensor


def check_distillation(student: Tensor, teacher: Tensor, tolerance: float) -> None:
    """Compare the kernel with its twin, on random targets. ``tolerance`` is that of the gradient, relative."""
    tokens, classes = student.shape
    target = torch.randint(classes, (tokens,), device=student.device)
    loss, divergence, gradient = distillation_losses(student, teacher, target, 0.5, 2.0, 0.01)
    wanted = distillation_losses_reference(student, teacher, target, 0.5, 2.0, 0.01)
    torch.testing.assert_close(loss, wanted[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(divergence, wanted[1], rtol=1e-4, atol=1e-4)
    assert gradient.dtype == student.dtype
    assert (gradient.float() - wanted[2].float()).norm() <= tolerance * wanted[2].float().norm()
