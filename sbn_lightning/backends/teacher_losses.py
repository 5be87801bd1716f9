"""The kernel for the losses of logits against the text and a teacher's logits."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from torch import Tensor

Losses = Callable[[Tensor, Tensor, Tensor, float, float, float], tuple[Tensor, Tensor, Tensor]]


def kernel_for(logits: Tensor, temperature: float) -> Losses | None:
    """Return the kernel, as :func:`sbn_kernels.gradients.distillation_losses`; None if it does not serve.

    Args:
        logits: The student's logits.
        temperature: The number by which logits are divided. The kernel knows only 1, with which both losses share one
            softmax of the student.
    """
    if temperature != 1 or find_spec("triton") is None:
        return None
    from sbn_kernels.common.checks import FLOAT_DTYPES
    from sbn_kernels.gradients.distillation import NEEDS, distillation_losses

    index = logits.device.index if logits.is_cuda else None
    return distillation_losses if logits.dtype in FLOAT_DTYPES and NEEDS.missing(index) is None else None
