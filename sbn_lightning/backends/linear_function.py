"""A ternary layer on integer tensor cores as a function of autograd.

The module :mod:`sbn_lightning.backends.integer` has the formulas and the kinds of gradients.
"""

from __future__ import annotations

from typing import Any

import sbn_kernels as sk
import torch
from sbn_kernels.gemm import registry
from sbn_kernels.swiglu import swiglu_backward_of_codes, swiglu_quantize_and_save
from sbn_kernels.swiglu.triton import swiglu_pair_backward, swiglu_pair_quantize
from torch import Tensor

from sbn_lightning.backends.products import dequantize, multiply, quantize


class KernelLinearFunction(torch.autograd.Function):
    """Forward and backward of a ternary layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        latent: Tensor,
        up: Tensor | None,
        codes: Tensor | None,
        row_scale: Tensor,
        packed: Tensor | None,
        transposed: Tensor | None,
        kernel: str,
        gradient_mask: Tensor | None,
        activation_bits: int,
        swiglu: bool,
        seed: Tensor | None,
        rounds_dw: bool,
        dtype: torch.dtype,
        x8: Tensor | None,
        scale: Tensor | None,
        saved_gates: bool,
    ) -> Tensor:
        """Computes ``y [tokens, out]`` in ``dtype``.

        ``x`` is ``[tokens, in]``. With ``swiglu`` it holds gates and ups, ``[tokens, 2 in]``, or gates if there is an
        ``up``. ``x8`` and ``scale`` are the quantised tokens if they exist already. With a
        ``seed``, the gradient of ``x`` is rounded if there is a ``transposed``, and the gradient of ``latent`` is
        rounded if ``rounds_dw`` is true. With ``saved_gates``, gates and ups in one tensor are saved as int8 codes.
        """
        before, code_scale = x if swiglu else None, None
        if up is not None:
            x8, scale = swiglu_pair_quantize(x, up, activation_bits)
        elif swiglu and saved_gates:
            x8, scale, before, code_scale = swiglu_quantize_and_save(x, activation_bits)
        elif swiglu:
            x8, scale = sk.swiglu_quantize(x, activation_bits)
        elif x8 is None or scale is None:
            x8, scale = quantize(x, activation_bits)
        y = multiply(x8, scale, codes, row_scale, packed, registry.product(kernel).form, kernel, dtype)
        ctx.save_for_backward(x8, scale, codes, row_scale, transposed, gradient_mask, seed, before, up, code_scale)
        ctx.dtype, ctx.x_dtype, ctx.latent_dtype, ctx.rounds_dw = dtype, x.dtype, latent.dtype, rounds_dw
        ctx.in_features = x8.shape[1]
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x8, scale, codes, row_scale, transposed, gradient_mask, seed, before, up, code_scale = ctx.saved_tensors
        dy = grad_outputs[0].to(ctx.dtype)
        need_dx, need_dw = ctx.needs_input_grad[0] or ctx.needs_input_grad[2], ctx.needs_input_grad[1]
        dx = dw = d_up = None
        round_dx = need_dx and seed is not None and transposed is not None
        round_dw = need_dw and seed is not None and ctx.rounds_dw
        if round_dx or round_dw:
            kernels = registry.gradients(x8.device.index)
            a8, a_scale, b8, b_scale = sk.quantize_gradient(
                dy, row_scale, scale, seed, want_tokens=round_dx, want_channels=round_dw
            )
            if round_dx:
                dx = kernels.input_gradient(a8, a_scale, transposed, ctx.in_features, ctx.dtype)
            if round_dw:
                dw = kernels.weight_gradient(b8, b_scale, sk.transpose_tokens(x8), ctx.latent_dtype)
        if need_dx and not round_dx:
            dx = dy @ dequantize(codes, row_scale, ctx.dtype)
        if need_dw and not round_dw:
            tokens = dequantize(x8, scale, ctx.dtype)
            # Rounded to the dtype of the activations, as autocast rounds the gradient of a plain linear layer.
            dw = (dy.t() @ tokens).to(ctx.latent_dtype)
        if dx is not None and up is not None:
            dx, d_up = swiglu_pair_backward(dx, before, up)
        elif dx is not None and code_scale is not None:
            dx = swiglu_backward_of_codes(dx, before, code_scale)
        elif dx is not None and before is not None:
            dx = sk.swiglu_backward(dx, before)
        if dx is not None:
            dx = dx.to(ctx.x_dtype)
        if dw is not None and gradient_mask is not None:
            dw = dw * gradient_mask
        return dx, dw, d_up, *[None] * 14
