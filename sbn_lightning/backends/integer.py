"""Backends on integer tensor cores: the training forward as the integer GEMM it is.

The forward quantises tokens and multiplies int8 by ternary (:mod:`sbn_kernels`), which is what the reference computes,
sum for sum. Saved for the backward are int8 tokens and their scales, half of what bfloat16 would take. Gradients:

* ``"bf16"``: exact straight-through, ``dx = dy (gamma T)`` and ``dW = dy^T (s x8)`` in the dtype of the activations.
* ``"int8"``: weights and tokens are exact integers already, so only ``dy`` is rounded, stochastically, and both
  products run on int8 tensor cores: unbiased, and reproducible from a seed.

Inside ``torch.compile`` the quantisation is written in plain PyTorch, for the compiler to fuse it with the norm and the
residual stream before it; otherwise it is a kernel of its own. A SwiGLU before a layer is fused by hand: the compiler
reads its operands twice and takes four times as long.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import sbn_kernels as sk
import torch
from sbn_kernels.decode.gemv import MAX_TOKENS
from sbn_kernels.swiglu.triton import MAX_FEATURES
from torch import Tensor

from sbn_lightning.backends.reference import Keep, WeightSpec
from sbn_lightning.sparsity.pattern import NMPattern
from sbn_lightning.sparsity.ternary import apply_swiglu, quantize_activations

Gradients = Literal["bf16", "int8"]
Engine = Literal["hopper", "cusparselt", "portable"]


class KernelWeight(NamedTuple):
    """A ternary weight and the forms of it that the kernels read.

    Attributes:
        codes: int8 ``[out, in]`` in {-1, 0, 1}.
        row_scale: float32 ``[out]``: gamma of each row.
        mask_bits: uint8 ``[out, ceil(in / 8)]``.
        packed: 2-bit words for Hopper's kernels (:mod:`sbn_kernels.common.packing`), or cuSPARSELt's compressed form.
        transposed: 2-bit words of the transposed codes, for int8 gradients on Hopper; elsewhere int8 ``[in, out]``.
        layout: What ``packed`` is: ``"none"``, ``"dense"``, ``"sparse24"`` or ``"cusparselt"``.
    """

    codes: Tensor
    row_scale: Tensor
    mask_bits: Tensor
    packed: Tensor | None
    transposed: Tensor | None
    layout: str


class KernelBackend:
    """A ternary layer on integer tensor cores.

    Args:
        engine: ``"hopper"``: 2-bit weights, Gluon; ``"portable"``: int8 weights, plain Triton; ``"cusparselt"``: 2:4
            through torch's cuSPARSELt.
        sparse: Use the sparse tensor core while the mask keeps at most 2 of 4. Before a ramp gets there, the same
            weights run as dense ternary.
        gradients: See the module.

    Attributes:
        seed: int64 ``[1]`` on the layer's device, which int8 gradients need: a new one for each pass.
    """

    seed: Tensor | None = None

    def __init__(self, engine: Engine, *, sparse: bool = False, gradients: Gradients = "bf16") -> None:
        self.engine: Engine = engine
        self.sparse = sparse
        self.gradients: Gradients = gradients

    @property
    def name(self) -> str:
        return "sparse" if self.sparse else "int8"

    def fresh_mask(self, scores: Tensor, pattern: NMPattern, keep: Keep) -> Tensor:
        if scores.dtype == torch.int8:  # ranked by ternary codes
            scores = scores.to(torch.bfloat16)
        n, rows = _keep_arguments(pattern, keep)
        return sk.prepare_weight(scores, n, pattern.m, keep=rows, want_codes=False).mask_bits

    def prepare(self, latent: Tensor, mask_bits: Tensor | None, keep: Keep, spec: WeightSpec) -> KernelWeight:
        n, rows = _keep_arguments(spec.pattern, keep)
        sparse = self.sparse and spec.pattern.m == 4 and rows is None and n <= 2
        on_hopper = self.engine == "hopper"
        weight = sk.prepare_weight(
            latent,
            n,
            spec.pattern.m,
            spec.split_sizes,
            mask_bits=mask_bits,
            keep=rows if mask_bits is None else None,
            gamma_over=spec.gamma_over,
            layout="none" if not on_hopper else "sparse24" if sparse else "dense",
            want_mask=mask_bits is None,
        )
        packed, layout = None, "none"
        if on_hopper:
            packed, layout = weight.packed, "sparse24" if sparse else "dense"
        elif self.engine == "cusparselt" and sparse:
            packed, layout = sk.compress24(weight.codes), "cusparselt"
        transposed = None
        if self.gradients == "int8":
            transposed = sk.pack_transposed(weight.codes) if on_hopper else sk.transpose_tokens(weight.codes)
        bits = weight.mask_bits if mask_bits is None else mask_bits
        return KernelWeight(weight.codes, weight.row_scale, bits, packed, transposed, layout)

    def linear(
        self,
        x: Tensor,
        latent: Tensor,
        prepared: KernelWeight,
        gradient_mask: Tensor | None,
        activation_bits: int | None,
        swiglu: bool = False,
    ) -> Tensor:
        if self.gradients == "int8" and self.seed is None and torch.is_grad_enabled():
            raise ValueError('gradients="int8" need a seed: set backend.seed before each pass')
        if swiglu and latent.shape[1] > MAX_FEATURES:
            x, swiglu = apply_swiglu(x), False
        seed = self.seed if self.gradients == "int8" else None
        y: Tensor = KernelLinearFunction.apply(x, latent, *prepared, gradient_mask, activation_bits, swiglu, seed)
        return y


def _keep_arguments(pattern: NMPattern, keep: Keep) -> tuple[int, Tensor | None]:
    """``keep`` as the kernel takes it: one N, or one for each row."""
    return (keep, None) if isinstance(keep, int) else (pattern.n, keep.to(torch.int32))


def multiply(
    x8: Tensor, scale: Tensor, codes: Tensor, row_scale: Tensor, packed: Tensor | None, layout: str, dtype: torch.dtype
) -> Tensor:
    """``(x8 @ codes^T) * scale * row_scale`` by the kernel that ``layout`` and the number of tokens ask for.

    Args:
        x8: int8 ``[tokens, in]``.
        scale: float32 ``[tokens]``.
        codes: int8 ``[out, in]``.
        row_scale: float32 ``[out]``.
        packed: As in :class:`KernelWeight`.
        layout: As in :class:`KernelWeight`.
        dtype: Of the result.

    Returns:
        ``[tokens, out]``.
    """
    if packed is None:
        return sk.int8_gemm(x8, scale, codes, row_scale, out_dtype=dtype)
    if layout == "cusparselt":
        return sk.cusparselt_gemm(x8, scale, packed, row_scale, out_dtype=dtype)
    if x8.shape[0] <= MAX_TOKENS:
        return sk.decode_gemm(x8, scale, packed, row_scale, codes.shape[0], out_dtype=dtype, layout=layout)
    gemm = sk.sparse_gemm if layout == "sparse24" else sk.ternary_gemm
    return gemm(x8, scale, packed, row_scale, codes.shape[0], out_dtype=dtype)


def _quantize(tokens: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    if not torch.compiler.is_compiling():
        return sk.quantize_tokens(tokens, bits)
    x8, scale = quantize_activations(tokens, bits)
    return x8, scale.squeeze(-1)


def _dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes [rows, columns] * scale [rows]`` in ``dtype``."""
    if not torch.compiler.is_compiling():
        return sk.dequantize_tokens(codes, scale, dtype)
    return (codes * scale.unsqueeze(-1)).to(dtype)


class KernelLinearFunction(torch.autograd.Function):
    """Forward and backward of the module docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        latent: Tensor,
        codes: Tensor,
        row_scale: Tensor,
        mask_bits: Tensor,
        packed: Tensor | None,
        transposed: Tensor | None,
        layout: str,
        gradient_mask: Tensor | None,
        activation_bits: int,
        swiglu: bool,
        seed: Tensor | None,
    ) -> Tensor:
        """Returns ``y [..., out]`` in the dtype of ``x [..., in]``; with ``swiglu``, of gates and ups ``[..., 2 in]``.

        Gradients are int8 if there is a ``seed``.
        """
        tokens = x.reshape(-1, x.shape[-1])
        x8, scale = sk.swiglu_quantize(tokens, activation_bits) if swiglu else _quantize(tokens, activation_bits)
        y = multiply(x8, scale, codes, row_scale, packed, layout, x.dtype)
        before = tokens if swiglu else None
        ctx.save_for_backward(x8, scale, codes, row_scale, transposed, gradient_mask, seed, before)
        ctx.dtype, ctx.shape, ctx.latent_dtype = x.dtype, x.shape, latent.dtype
        return y.reshape(*x.shape[:-1], codes.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x8, scale, codes, row_scale, transposed, gradient_mask, seed, before = ctx.saved_tensors
        dy = grad_outputs[0].reshape(-1, codes.shape[0]).to(ctx.dtype)
        need_dx, need_dw = ctx.needs_input_grad[:2]
        dx = dw = None
        if seed is not None:
            a8, a_scale, b8, b_scale = sk.quantize_gradient(
                dy, row_scale, scale, seed, want_tokens=need_dx, want_channels=need_dw
            )
            if need_dx:
                dx = sk.input_gradient_gemm(a8, a_scale, transposed, codes.shape[1], ctx.dtype)
            if need_dw:
                dw = sk.weight_gradient_gemm(b8, b_scale, sk.transpose_tokens(x8), ctx.latent_dtype)
        else:
            if need_dx:
                dx = dy @ _dequantize(codes, row_scale, ctx.dtype)
            if need_dw:
                tokens = _dequantize(x8, scale, ctx.dtype)
                # Rounded to the dtype of the activations, as autocast has it for a plain linear layer.
                dw = (dy.t() @ tokens).to(ctx.latent_dtype)
        if dx is not None:
            dx = (dx if before is None else sk.swiglu_backward(dx, before)).reshape(ctx.shape)
        if dw is not None and gradient_mask is not None:
            dw = dw * gradient_mask
        return dx, dw, *[None] * 10
