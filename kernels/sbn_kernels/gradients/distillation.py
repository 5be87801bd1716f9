"""The losses of a student against the text and a teacher, and their gradient, from the logits of both models.

One program reads the two rows of a token twice: for the sums of exponentials and the divergence, and for the gradient.
A compiler makes three loops, and evaluates twice as many exponentials. With p and q the teacher's and the student's
probabilities, s and t their logits, and log-sums L::

    cross-entropy  L_s - s[target]
    KL(p || q)     sum p (t - s) - L_t + L_s
    gradient       scale * (language (q - one-hot) + weight (q - p))

The sum in the divergence is kept relative to the largest logit of the teacher so far, as the sums of exponentials are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.common.buffers import with_rows
from sbn_kernels.common.checks import FLOAT_DTYPES, refuse_gradients
from sbn_kernels.common.integers import next_power_of_2
from sbn_kernels.runtime.capability import Needs, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

NEEDS = Needs("distillation", least=(0, 0), interpreter=True)
_BLOCK = 4096  # classes that a program holds in registers, for each model
_WARPS = 8


@triton.jit
def distillation_kernel(
    s_pointer, t_pointer, target_pointer, loss_pointer, divergence_pointer, gradient_pointer,
    classes, s_stride, t_stride, language, weight, scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token a program. The loss of a token whose target is no class is NaN."""
    row = tl.program_id(0).to(tl.int64)
    s_row, t_row, g_row = s_pointer + row * s_stride, t_pointer + row * t_stride, gradient_pointer + row * classes
    s_high = tl.full([1], float("-inf"), tl.float32)
    t_high = tl.full([1], float("-inf"), tl.float32)
    s_sum = tl.zeros([1], tl.float32)
    t_sum = tl.zeros([1], tl.float32)
    apart = tl.zeros([1], tl.float32)
    for start in range(0, classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < classes
        s = tl.load(s_row + column, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + column, mask=inside, other=float("-inf")).to(tl.float32)
        s_new = tl.maximum(s_high, tl.max(s, axis=0, keep_dims=True))
        t_new = tl.maximum(t_high, tl.max(t, axis=0, keep_dims=True))
        shrink = tl.exp(t_high - t_new)
        share = tl.exp(t - t_new)
        s_sum = s_sum * tl.exp(s_high - s_new) + tl.sum(tl.exp(s - s_new), axis=0, keep_dims=True)
        t_sum = t_sum * shrink + tl.sum(share, axis=0, keep_dims=True)
        difference = tl.where(inside, t, 0.0) - tl.where(inside, s, 0.0)
        apart = apart * shrink + tl.sum(share * difference, axis=0, keep_dims=True)
        s_high, t_high = s_new, t_new
    s_log, t_log = s_high + tl.log(s_sum), t_high + tl.log(t_sum)
    one = row + tl.arange(0, 1)
    target = tl.load(target_pointer + one)
    known = (target >= 0) & (target < classes)
    at_target = tl.load(s_row + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(loss_pointer + one, s_log - at_target)
    tl.store(divergence_pointer + one, apart / t_sum - t_log + s_log)
    for start in range(0, classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < classes
        q = tl.exp(tl.load(s_row + column, mask=inside, other=0.0).to(tl.float32) - s_log)
        p = tl.exp(tl.load(t_row + column, mask=inside, other=0.0).to(tl.float32) - t_log)
        gradient = language * (q - tl.where(column == target, 1.0, 0.0)) + weight * (q - p)
        tl.store(g_row + column, (gradient * scale).to(gradient_pointer.dtype.element_ty), mask=inside)


_distillation = Launcher(distillation_kernel, enable_fp_fusion=True)


def _outputs(student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    losses = (torch.empty(len(student), dtype=torch.float32, device=student.device) for _ in range(2))
    return *losses, torch.empty(student.shape, dtype=student.dtype, device=student.device)  # type: ignore[return-value]


@kernel_op("distillation")
def _distillation_op(
    student: Tensor, teacher: Tensor, target: Tensor, language: float, weight: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    require(NEEDS, student)
    student, teacher = with_rows(student), with_rows(teacher)
    rows, classes = student.shape
    loss, divergence, gradient = _outputs(student)
    if rows:
        numbers = (classes, student.stride(0), teacher.stride(0), language, weight, scale)
        block = min(_BLOCK, next_power_of_2(classes))
        tensors = (student, teacher, target, loss, divergence, gradient)
        _distillation((rows, 1, 1), tensors, numbers, (block,), min(_WARPS, max(1, block // 512)))
    return loss, divergence, gradient


@kernel_fake("distillation")
def _(
    student: Tensor, teacher: Tensor, target: Tensor, language: float, weight: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(student)


def distillation_losses(
    student: Tensor, teacher: Tensor, target: Tensor, language: float, weight: float, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the losses of each token, and the gradient of the student's logits.

    Args:
        student: The student's logits, bfloat16, float16 or float32 ``[tokens, classes]``.
        teacher: The teacher's logits, in the shape of ``student``.
        target: The next tokens, int64 ``[tokens]``.
        language: The weight of the cross-entropy in the gradient.
        weight: The weight of the divergence in the gradient.
        scale: A factor of the whole gradient.

    Returns:
        The cross-entropies and the divergences, float32 ``[tokens]``; the gradient in the dtype of ``student``.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If there is no GPU.
    """
    refuse_gradients(student, teacher)
    if student.dim() != 2 or student.shape[1] == 0 or student.dtype not in FLOAT_DTYPES:
        raise ValueError(f"logits must be floats [tokens, classes > 0], not {student.dtype} {list(student.shape)}")
    if teacher.shape != student.shape or teacher.dtype not in FLOAT_DTYPES:
        raise ValueError(f"the teacher's logits must be floats {list(student.shape)}, not {list(teacher.shape)}")
    if target.dtype != torch.int64 or target.shape != student.shape[:1]:
        raise ValueError(f"target must be int64 [{len(student)}], not {target.dtype} {list(target.shape)}")
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.sbn_kernels.distillation(
        student, teacher, target.contiguous(), language, weight, scale
    )
    return found
