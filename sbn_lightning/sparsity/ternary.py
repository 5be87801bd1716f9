"""The arithmetic of a ternary, N:M-sparse linear layer in plain PyTorch: the reference of every kernel.

Formulas: Sparse-BitNet (arXiv 2603.05168) and BitNet b1.58 (arXiv 2402.17764). With latent weight W and tokens x::

    gamma = max(mean|W|, 1e-5)                          weight scale, over all of W (``over`` in weight_scale)
    T     = clamp(round(W / gamma), -1, 1) * mask       ternary codes, int8
    s     = max(max|x|, 1e-5) / 127                     activation scale, one for each token
    x8    = clamp(round(x / s), -128, 127)              int8
    y     = (x8 @ T^T) * s * gamma (+ bias)             the inner product is an exact integer
    dW    = dy^T @ (x8 * s)                             straight-through: masked positions get one too
    dx    = dy @ (gamma * T)

The usual "fake quantisation" rounds, scales back and multiplies in floating point. Here the integers are multiplied
first, and both scales are applied to the sum. The mathematics is the same, with one rounding instead of three, and the
result is bit for bit that of an integer tensor core. Integers up to 127 are exact in bfloat16 and in TF32. So the inner
product is exact in these dtypes too, as long as sums accumulate in float32 and stay below 2^24 (``in_features`` up to
132,104).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5
ACTIVATION_BITS = (8, 4, None)

GammaOver = Literal["dense", "kept", "masked", "nonzero"]


def weight_scale(
    weight: Tensor,
    split_sizes: tuple[int, ...] | None = None,
    *,
    over: Literal["dense", "kept", "masked"] = "dense",
    mask: Tensor | None = None,
) -> Tensor:
    """gamma, the scale of ternary weights: a mean of absolute values, at least 1e-5.

    Args:
        weight: The latent weight, ``[out_features, in_features]``.
        split_sizes: The rows of each part of a fused weight (q, k, v). Each part has its own gamma. None means that the
            weight is one part.
        over: The weights whose magnitudes are averaged. ``"dense"``: all weights, as in the paper. ``"kept"``: the
            weights that the mask keeps. ``"masked"``: all weights, where masked weights count as zero ("sparsify before
            quantising").
        mask: The mask, bool in the shape of ``weight``. Only ``over="dense"`` does without one.

    Returns:
        gamma of each part, ``[parts]``, float32 (float64 for a float64 weight).

    Raises:
        ValueError: If ``over`` needs a mask and there is none.
    """
    magnitude = _wide(weight.detach()).abs()
    if over != "dense":
        if mask is None:
            raise ValueError(f"gamma over {over!r} weights needs the mask")
        magnitude = magnitude * mask
    parts = magnitude.split(split_sizes or (weight.shape[0],))
    if over == "kept" and mask is not None:
        kept = mask.split(split_sizes or (weight.shape[0],))
        means = [part.sum() / keep.sum().clamp(min=1) for part, keep in zip(parts, kept, strict=True)]
    else:
        means = [part.mean() for part in parts]
    return torch.stack(means).clamp(min=EPS)


def ternary_weight(
    weight: Tensor, mask: Tensor, split_sizes: tuple[int, ...] | None = None, gamma_over: GammaOver = "dense"
) -> tuple[Tensor, Tensor]:
    """The ternary codes and the scale of a latent weight.

    Args:
        weight: The latent weight, ``[out_features, in_features]``.
        mask: The mask, bool in the shape of ``weight``.
        split_sizes: The rows of each part of a fused weight; see :func:`weight_scale`.
        gamma_over: The weights whose magnitudes gamma averages; see ``over`` in :func:`weight_scale`. ``"nonzero"``
            makes the codes with gamma over all weights, and then takes the mean over the weights whose code is not
            zero. That mean is the least-squares scale for these codes (Ternary Weight Networks, arXiv 1605.04711,
            eq. 5).

    Returns:
        The codes, int8 in the shape of ``weight``, and the scale of each row, ``[out_features]``.
    """
    over: Literal["dense", "kept", "masked"] = "dense" if gamma_over == "nonzero" else gamma_over
    gamma = weight_scale(weight, split_sizes, over=over, mask=mask)
    codes = ternary_codes(weight, expand_scale(gamma, split_sizes, weight.shape[0]), mask)
    if gamma_over == "nonzero":
        gamma = weight_scale(weight, split_sizes, over="kept", mask=codes != 0)
    return codes, expand_scale(gamma, split_sizes, weight.shape[0])


def expand_scale(gamma: Tensor, split_sizes: tuple[int, ...] | None, out_features: int) -> Tensor:
    """Repeat gamma of each part for all rows of the part: ``[parts]`` -> ``[out_features]``."""
    if split_sizes is None:
        return gamma.expand(out_features)
    return torch.cat([part.expand(rows) for part, rows in zip(gamma.split(1), split_sizes, strict=True)])


def ternary_codes(weight: Tensor, row_scale: Tensor, mask: Tensor | None = None) -> Tensor:
    """The ternary codes ``clamp(round(W / gamma), -1, 1) * mask``.

    Args:
        weight: The latent weight, ``[out_features, in_features]``.
        row_scale: gamma of each row, ``[out_features]``.
        mask: The mask, bool in the shape of ``weight``; None keeps all weights.

    Returns:
        The codes in {-1, 0, 1}, int8 in the shape of ``weight``. Halves round to even, so ``|W| = gamma / 2`` gives 0.
    """
    codes = (_wide(weight.detach()) / row_scale.unsqueeze(-1)).round_().clamp_(-1, 1)
    if mask is not None:
        codes = codes * mask
    return codes.to(torch.int8)


def token_magnitude(x: Tensor, bits: int) -> Tensor:
    """The number that a token's scale is made of: ``max|x|`` for 8 bits, ``mean|x|`` for 4 bits.

    Args:
        x: The tokens, ``[..., features]``.
        bits: The number of bits, 8 or 4.

    Returns:
        ``[..., 1]``, float32 (float64 for float64 tokens).

    Raises:
        ValueError: If ``bits`` is neither 8 nor 4.
    """
    magnitudes = _wide(x.detach()).abs()
    if bits == 8:
        return magnitudes.amax(dim=-1, keepdim=True)
    if bits == 4:
        return magnitudes.mean(dim=-1, keepdim=True)
    raise ValueError(f"activations are quantised to 8 or 4 bits, not {bits}")


def quantize_activations(x: Tensor, bits: int, magnitude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise each token (last dimension) to signed integers.

    8 bits: ``s = max(max|x|, 1e-5) / 127``, integers in [-128, 127].
    4 bits: ``s = max(mean|x|, 1e-5) / sqrt(7)``, integers in [-8, 7].

    Args:
        x: The tokens, ``[..., features]``.
        bits: The number of bits, 8 or 4.
        magnitude: The :func:`token_magnitude` of the whole tokens, ``[..., 1]``, if ``x`` holds slices of tokens. None
            means that ``x`` holds whole tokens.

    Returns:
        The integers, int8 in the shape of ``x``, and the scale ``s`` ``[..., 1]``, float32 (float64 for float64
        tokens). The integers times the scale approximate ``x``.

    Raises:
        ValueError: If ``bits`` is neither 8 nor 4.
    """
    x = _wide(x.detach())
    if magnitude is None:
        magnitude = token_magnitude(x, bits)
    # The divisors are tensors, not Python numbers: CUDA would multiply by the reciprocal of a Python number, which can
    # change the last bit of the scale. Many bfloat16 tokens lie exactly between two integers (for example if
    # max|x| = 127/32), and such a change rounds them to the other integer. A compiler may still divide in its own way.
    low, high, divisor = (-128, 127, 127) if bits == 8 else (-8, 7, 7**0.5)
    scale = magnitude.clamp(min=EPS) / x.new_full((), divisor)
    return (x / scale).round_().clamp_(low, high).to(torch.int8), scale


def apply_swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``, where gate and up lie side by side: ``[..., 2 features]`` -> ``[..., features]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in the dtype for scales and roundings: float64 if ``x`` is float64, and float32 otherwise."""
    return x if x.dtype == torch.float64 else x.float()


def float32_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` with a float32 result, or float64 for float64 input. bfloat16 cannot hold all integers above 256."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class TernaryLinearFunction(torch.autograd.Function):
    """The forward and the straight-through backward of this module's formulas.

    Quantised tokens are saved for the backward as int8, which takes half the memory of bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        codes: Tensor,
        row_scale: Tensor,
        gradient_mask: Tensor | None,
        activation_bits: int | None,
        dtype: torch.dtype,
        magnitude: Tensor | None,
    ) -> Tensor:
        """Multiply tokens ``x [tokens, in_features]`` into ``y [tokens, out_features]`` in ``dtype``.

        The product reads ``codes`` and ``row_scale``. ``weight`` is the latent weight; it is an argument only to get a
        gradient. ``gradient_mask`` (bool, or None for all) selects the positions of the weight that get a gradient.
        ``magnitude`` is that of the whole tokens if ``x`` holds slices of them, and None otherwise.
        """
        if activation_bits is None:
            quantized, scale = x.to(dtype), None
            y = float32_mm(quantized, codes.to(dtype).t()) * row_scale
        else:
            quantized, scale = quantize_activations(x, activation_bits, magnitude)
            y = float32_mm(quantized.to(dtype), codes.to(dtype).t()) * (scale * row_scale)
        ctx.save_for_backward(quantized, scale, codes, row_scale, gradient_mask)
        ctx.dtype, ctx.x_dtype, ctx.weight_dtype = dtype, x.dtype, weight.dtype
        # A cast to the same dtype is left out: where a function returns one, torch 2.11 compiles it without gradients.
        return y if y.dtype == dtype else y.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        quantized, scale, codes, row_scale, gradient_mask = ctx.saved_tensors
        dy = grad_outputs[0].to(ctx.dtype)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            effective = (codes * row_scale.unsqueeze(-1)).to(ctx.dtype)
            dx = (dy @ effective).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            tokens = quantized if scale is None else (quantized * scale).to(ctx.dtype)
            dw = float32_mm(dy.t(), tokens).to(ctx.weight_dtype)
            if gradient_mask is not None:
                dw = dw * gradient_mask
        return dx, dw, None, None, None, None, None, None


def ternary_linear(
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    row_scale: Tensor,
    gradient_mask: Tensor | None,
    activation_bits: int | None,
    dtype: torch.dtype | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """The product of the module's formulas, for tokens of any leading shape, with straight-through gradients.

    Args:
        x: The tokens, ``[..., in_features]``. They are quantised in the precision that they come in.
        weight: The latent weight, which gets the gradient; only its dtype is read.
        codes: The ternary codes, int8 ``[out_features, in_features]``.
        row_scale: gamma of each row, ``[out_features]``.
        gradient_mask: The positions of the weight that get a gradient, bool; None for all.
        activation_bits: 8, 4, or None to multiply the tokens as they are.
        dtype: The dtype of the product and of its gradients; None for the dtype of ``x``.
        magnitude: The :func:`token_magnitude` of the whole tokens, ``[..., 1]``, if ``x`` holds slices of tokens.

    Returns:
        ``[..., out_features]``.
    """
    # The reshape happens outside of the autograd function. Autograd forbids in-place changes of a view that such a
    # function returns, and an activation after the layer may work in place.
    tokens = x.reshape(-1, x.shape[-1])
    whole = None if magnitude is None else magnitude.reshape(-1, 1)
    y: Tensor = TernaryLinearFunction.apply(
        tokens, weight, codes, row_scale, gradient_mask, activation_bits, dtype or x.dtype, whole
    )
    return y.reshape(*x.shape[:-1], codes.shape[0])


class StraightThroughLinear(torch.autograd.Function):
    """``y = x @ effective^T``, for a weight that was made of the latent weight, with ``dW = dy^T x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, effective: Tensor, gradient_mask: Tensor | None) -> Tensor:
        """Return ``y [..., out_features]``. ``weight`` is an argument only to get the gradient of ``effective``."""
        ctx.save_for_backward(x, effective, gradient_mask)
        ctx.weight_dtype = weight.dtype
        return x @ effective.t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, effective, gradient_mask = ctx.saved_tensors
        dy = grad_outputs[0].to(x.dtype)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = dy @ effective
        if ctx.needs_input_grad[1]:
            dw = float32_mm(dy.reshape(-1, dy.shape[-1]).t(), x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype)
            if gradient_mask is not None:
                dw = dw * gradient_mask
        return dx, dw, None, None


class MaskedLinearFunction(StraightThroughLinear):
    """``y = x @ (W * mask)^T`` with the straight-through gradient ``dW = dy^T x`` at every position.

    This is the product of the BF16 baseline, which is sparse and not quantised. Plain autograd of ``W * mask`` would
    give masked weights no gradient, and the mask could never take them back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, gradient_mask: Tensor | None) -> Tensor:
        """Return ``y [..., out_features]`` in the dtype of ``x``. Both masks are bool, in the shape of ``weight``."""
        return StraightThroughLinear.forward(ctx, x, weight, (weight * mask).to(x.dtype), gradient_mask)
