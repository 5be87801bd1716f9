"""The ternary layers around a SwiGLU as one function of autograd, for int8 gradients.

``y = last(silu(gate) * up)`` with ``gate, up = first(x)``. The forward and the gradients are those of the two layers
(:mod:`sbn_lightning.backends.integer`), bit for bit. Joined, the first layer need not look for the maxima of its
``dy``: the SwiGLU's backward, which writes ``dy``, finds them (:mod:`sbn_kernels.swiglu.rounded`). That ``dy`` is the
widest tensor of a block. :class:`GatedPairFunction` has gates and ups from two layers, as models of others have.
"""

from __future__ import annotations

from typing import Any

import sbn_kernels as sk
import torch
from sbn_kernels.gemm import registry
from sbn_kernels.swiglu import swiglu_backward_of_rounded, swiglu_pair_backward_rounded, swiglu_quantize_and_save
from sbn_kernels.swiglu.triton import swiglu_pair_quantize
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
        mask_bits_first: Tensor,
        packed_first: Tensor | None,
        transposed_first: Tensor,
        kernel_first: str,
        mask_first: Tensor | None,
        bits_first: int,
        seed_first: Tensor,
        codes_last: Tensor | None,
        row_scale_last: Tensor,
        mask_bits_last: Tensor,
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

        ``x`` is ``[tokens, in]``. Each of the two layers brings its latent weight, for the gradient; the fields of its
        :class:`~sbn_lightning.backends.integer.KernelWeight`; the mask of its gradient (None lets all weights have
        gradients); the bits of a quantised token; and a seed. Gates and ups have ``dtype``, too. With
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
        return dx, d_first, d_last, *[None] * 22


class GatedPairFunction(torch.autograd.Function):
    """``y = last(silu(gate(x)) * up(x))`` with three layers."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, latent_gate: Tensor, latent_up: Tensor, latent_last: Tensor, dtype: torch.dtype,
        *operands: Any,
    ) -> Tensor:  # fmt: skip
        """Computes ``[tokens, out]`` in ``dtype``.

        ``operands`` are nine values for each of the three layers: the fields of its
        :class:`~sbn_lightning.backends.integer.KernelWeight`, the mask of its gradient (None lets all weights have
        gradients), the bits of a quantised token, and a seed. Both first layers have the same bits.
        """
        gate_operands, up_operands, last = operands[:9], operands[9:18], operands[18:]
        x8, scale = quantize(x, gate_operands[7])
        gate, up = (_product(x8, scale, layer, dtype) for layer in (gate_operands, up_operands))
        z8, z_scale = swiglu_pair_quantize(gate, up, last[7])
        saved = []
        for layer in (gate_operands, up_operands, last):
            saved += [layer[1], layer[4], layer[6], layer[8]]
        ctx.save_for_backward(x8, scale, z8, z_scale, gate, up, *saved)
        ctx.dtype, ctx.x_dtype, ctx.in_features = dtype, x.dtype, x.shape[1]
        ctx.latent_dtypes = latent_gate.dtype, latent_up.dtype, latent_last.dtype
        return _product(z8, z_scale, last, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x8, scale, z8, z_scale, gate, up, *saved = ctx.saved_tensors
        of_gate, of_up, (row_scale, transposed, mask, seed) = saved[:4], saved[4:8], saved[8:]
        need_dx, *need_weights = ctx.needs_input_grad[:4]
        kernels = registry.gradients(x8.device.index)
        dy = sk.quantize_gradient(grad_outputs[0].to(ctx.dtype), row_scale, z_scale, seed)
        gradients: list[Tensor | None] = [None, None, None]
        if need_weights[2]:
            z8_t = sk.transpose_tokens(z8)
            gradients[2] = kernels.weight_gradient(dy.channels, dy.channel_scale, z8_t, ctx.latent_dtypes[2])
        d = kernels.input_gradient(dy.tokens, dy.token_scale, transposed, z8.shape[1], ctx.dtype)
        row_scales, seeds = (of_gate[0], of_up[0]), (of_gate[3], of_up[3])
        rounded = swiglu_pair_backward_rounded(d, gate, up, row_scales, scale, seeds)
        dx = None
        x8_t = sk.transpose_tokens(x8)
        for i, (part, layer) in enumerate(zip(rounded, (of_gate, of_up), strict=True)):
            if need_dx:
                more = kernels.input_gradient(part.tokens, part.token_scale, layer[1], ctx.in_features, ctx.dtype)
                dx = more if dx is None else dx + more
            if need_weights[i]:
                dtype = ctx.latent_dtypes[i]
                gradients[i] = kernels.weight_gradient(part.channels, part.channel_scale, x8_t, dtype)
        for i, keep in enumerate((of_gate[2], of_up[2], mask)):
            if keep is not None and gradients[i] is not None:
                gradients[i] = gradients[i] * keep  # type: ignore[operator]
        return None if dx is None else dx.to(ctx.x_dtype), *gradients, *[None] * 28


def _product(x8: Tensor, scale: Tensor, layer: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
    codes, row_scale, _, packed, _, kernel = layer[:6]
    return multiply(x8, scale, codes, row_scale, packed, registry.product(kernel).form, kernel, dtype)
