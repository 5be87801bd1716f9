"""What a compiled block of our transformer does around its layers, by kernels: norms, rotary heads, SwiGLU.

Inside ``torch.compile`` a norm, the residual before it and the quantisation after it become loops that read a row three
times, and the gradient of the fused q, k, v layer becomes a concatenation with conditions. The kernels of
:mod:`sbn_kernels.block` take a half to a fifth of that time. The functions here give them gradients.

They serve graphs on a GPU in training; elsewhere a block computes what it always did. Nothing here may be imported or
looked up while a graph is traced, because that would cut the graph in two.
"""

from __future__ import annotations

from typing import Any

import torch
from sbn_kernels.block.norm import MAX_FEATURES, norm_backward, norm_quantize
from sbn_kernels.block.rope import rope_backward
from sbn_kernels.swiglu.triton import swiglu_backward
from torch import Tensor, nn
from torch.nn import functional as F

from sbn_lightning.backends.base import Backend
from sbn_lightning.sparsity.ternary import apply_swiglu

_HALVES = (torch.bfloat16, torch.float16)


def _in_a_training_graph(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and torch.is_grad_enabled() and x.is_cuda and x.dtype in _HALVES


class BlockKernels(Backend):
    """The part of a backend of kernels that serves what lies around its layers."""

    def joins_norm(self, x: Tensor, bits: int, norm: nn.Module) -> bool:
        return _in_a_training_graph(x) and x.shape[-1] <= MAX_FEATURES and norm.eps is not None

    def norm_and_quantize(
        self, x: Tensor, residual: Tensor | None, norm: nn.Module, bits: int
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        h, y, codes, scale = NormFunction.apply(x, residual, norm.weight, norm.eps, bits)
        return h, y, (codes, scale)

    def turns_heads(self, x: Tensor, cos: Tensor) -> bool:
        # The kernel takes one table for all sequences. Sequences with positions of their own have a table each, and a
        # model that was cast to bfloat16 has tables in bfloat16.
        return _in_a_training_graph(x) and cos.dim() == 2 and cos.dtype == torch.float32

    def turned_heads(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, splits: tuple[int, int, int], size: int
    ) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = TurnFunction.apply(qkv, cos, sin, splits, size)
        return found

    def gated_product(self, gate_up: Tensor) -> Tensor:
        if not _in_a_training_graph(gate_up):
            return apply_swiglu(gate_up)
        product: Tensor = GatedProductFunction.apply(gate_up)
        return product


class NormFunction(torch.autograd.Function):
    """``h = x + residual`` and ``y = rms_norm(h)``, with the codes of ``y``.

    ``y`` is written out in plain PyTorch, so a compiler drops it where nobody reads its values.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, bits: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shape = x.shape
        rows = x.reshape(-1, shape[-1])
        others = None if residual is None else residual.reshape(-1, shape[-1])
        h, codes, scale, rstd = norm_quantize(rows, others, weight, eps, bits)
        h = rows if residual is None else h
        ctx.save_for_backward(h, weight, rstd)
        ctx.adds = residual is not None
        ctx.mark_non_differentiable(codes, scale)
        y = F.rms_norm(h, shape[-1:], weight.to(h.dtype), eps).reshape(shape)
        return x.view_as(x) if residual is None else h.reshape(shape), y, codes, scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, rstd = ctx.saved_tensors
        dh, dy = (gradient.reshape(h.shape) for gradient in grad_outputs[:2])
        dx, dweight = norm_backward(dy, h, dh, weight, rstd)
        dx = dx.reshape(grad_outputs[0].shape)
        return dx, dx if ctx.adds else None, dweight.to(weight.dtype), None, None


class TurnFunction(torch.autograd.Function):
    """Forward in plain PyTorch, backward by one kernel."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, splits: tuple[int, int, int], size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in qkv.split(splits, -1))
        q, k = ((x * cos + x.roll(size // 2, dims=-1) * sin).to(x.dtype) for x in (q, k))
        return q, k, v.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq, dk, dv = grad_outputs
        return rope_backward(dq, dk, dv, cos, sin), None, None, None, None


class GatedProductFunction(torch.autograd.Function):
    """Forward in plain PyTorch, which a compiler fuses with what comes after; backward by one kernel."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return apply_swiglu(gate_up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        d, rows = grad_outputs[0], gate_up.reshape(-1, gate_up.shape[-1])
        return swiglu_backward(d.reshape(-1, d.shape[-1]), rows).reshape(gate_up.shape)
