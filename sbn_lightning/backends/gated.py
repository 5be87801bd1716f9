"""The ternary layers around a SwiGLU as one function of autograd, for int8 gradients.

``y = last(silu(gate) * up)`` with ``gate, up = first(x)``. The forward and the gradients are those of the two layers
(:mod:`sbn_lightning.backends.integer`), bit for bit. ``dy``, the gradient of gates and ups, is the widest tensor of a
block. The SwiGLU's backward writes ``dy`` and also finds its maxima (:mod:`sbn_kernels.swiglu.rounded`), so no kernel
has to read ``dy`` for them. In models that others wrote, gates and ups come from two layers. Here these two are joined
first (:mod:`sbn_lightning.backends.joined`).
"""

from __future__ import annotations

from typing import Any

import sbn_kernels as sk
import torch
from sbn_kernels.gemm import registry
from sbn_kernels.swiglu import swiglu_backward_of_rounded, swiglu_quantize_and_save
from torch import Tensor

from sbn_lightning.backends.products import multiply, quantize


class GatedFunction(torch.autograd.Function):
    """Forward and backward of the module docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        latent_first: Tensor,
        latent_last: Tensor,
        codes_first: Tensor | None,
        row_scale_first: Tensor,
        packed_first: Tensor | None,
        transposed_first: Tensor,
        kernel_first: str,
        mask_first: Tensor | None,
        bits_first: int,
        seed_first: Tensor,
        codes_last: Tensor | None,
        row_scale_last: Tensor,
        packed_last: Tensor | None,
        transposed_last: Tensor,
        kernel_last: str,
        mask_last: Tensor | None,
        bits_last: int,
        seed_last: Tensor,
        dtype: torch.dtype,
        saved_gates: bool,
        x8: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        """Computes ``[tokens, out]`` in ``dtype``.

        ``x`` is ``[tokens, in]``. Each of the two layers brings its latent weight, for the gradient; what products
        read of its :class:`~sbn_lightning.backends.integer.KernelWeight`; the mask of its gradient (None lets all
        weights have gradients); the bits of a quantised token; and a seed. Gates and ups have ``dtype``, too. With
        ``saved_gates`` these are saved as int8 codes. ``x8`` and ``scale`` are the quantised tokens if they exist
        already.
        """
        if x8 is None or scale is None:
            x8, scale = quantize(x, bits_first)
        form = registry.product(kernel_first).form
        gates = multiply(x8, scale, codes_first, row_scale_first, packed_first, form, kernel_first, dtype)
        code_scale = None
        if saved_gates:
            z8, z_scale, gates, code_scale = swiglu_quantize_and_save(gates, bits_last)
        else:
            z8, z_scale = sk.swiglu_quantize(gates, bits_last)
        ctx.save_for_backward(
            x8, scale, row_scale_first, transposed_first, mask_first, seed_first,
            z8, z_scale, row_scale_last, transposed_last, mask_last, seed_last, gates, code_scale,
        )  # fmt: skip
        ctx.dtype, ctx.x_dtype, ctx.in_features = dtype, x.dtype, x.shape[1]
        ctx.latent_dtypes = latent_first.dtype, latent_last.dtype
        form = registry.product(kernel_last).form
        return multiply(z8, z_scale, codes_last, row_scale_last, packed_last, form, kernel_last, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x8, scale, row_scale, transposed, mask, seed, *others, gates, code_scale = ctx.saved_tensors
        z8, z_scale, last_row_scale, last_transposed, last_mask, last_seed = others
        dy = grad_outputs[0].to(ctx.dtype)
        need_dx, need_first, need_last = ctx.needs_input_grad[:3]
        kernels = registry.gradients(x8.device.index)
        first_dtype, last_dtype = ctx.latent_dtypes
        rounded = sk.quantize_gradient(dy, last_row_scale, z_scale, last_seed)
        dx = d_first = d_last = None
        if need_last:
            d_last = kernels.weight_gradient(
                rounded.channels, rounded.channel_scale, sk.transpose_tokens(z8), last_dtype
            )
        if need_dx or need_first:
            tokens, token_scale = rounded.tokens, rounded.token_scale
            rounded = swiglu_backward_of_rounded(
                tokens, token_scale, last_transposed, gates, code_scale, row_scale, scale, seed, ctx.dtype
            )
        if need_dx:
            tokens, token_scale = rounded.tokens, rounded.token_scale
            dx = kernels.input_gradient(tokens, token_scale, transposed, ctx.in_features, ctx.dtype).to(ctx.x_dtype)
        if need_first:
            tokens_t = sk.transpose_tokens(x8)
            d_first = kernels.weight_gradient(rounded.channels, rounded.channel_scale, tokens_t, first_dtype)
        d_first = d_first if d_first is None or mask is None else d_first * mask
        d_last = d_last if d_last is None or last_mask is None else d_last * last_mask
        return dx, d_first, d_last, *[None] * 20
