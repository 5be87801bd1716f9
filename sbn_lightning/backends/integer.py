"""The backend on integer tensor cores: the forward pass of training as an integer product.

The forward quantises tokens and multiplies int8 by ternary (:mod:`sbn_kernels`). The reference computes the same sums.
Saved for the backward are int8 tokens and their scales, half of what bfloat16 would take. With ``saved_gates`` the
gates and ups before a SwiGLU are saved as int8 codes, too. Gradients come in these kinds:

* ``"bf16"``: exact straight-through, ``dx = dy (gamma T)`` and ``dW = dy^T (s x8)`` in the dtype of the activations.
* ``"int8"``: weights and tokens are exact integers already, so only ``dy`` is rounded, stochastically. Both products
  run on int8 tensor cores. The gradients are unbiased, and reproducible from a seed.
* ``"int8-dx"``, ``"int8-dw"``: only ``dx``, or only ``dW``, is made from a rounded ``dy``; the other one is exact.

Inside ``torch.compile`` the quantisation is written in plain PyTorch, so that the compiler can fuse it with the norm
and the residual stream before it; elsewhere it is a kernel, and layers that read the same tokens share its result
(``shared_tokens.py``). A SwiGLU before a layer is fused by hand, because the compiler reads the operands of the SwiGLU
twice and takes four times as long.

The backend names the kernel that multiplies; the registry (:mod:`sbn_kernels.gemm.registry`) knows the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import sbn_kernels as sk
import sbn_kernels.catalog
import torch
from sbn_kernels.common.packing import LAYOUTS, unpack
from sbn_kernels.exchange.triton import decode_rows
from sbn_kernels.gemm import registry
from sbn_kernels.swiglu.triton import MAX_FEATURES
from torch import Tensor
from torch.nn import functional as F

from sbn_lightning.backends.base import Gradients, Keep, Operands
from sbn_lightning.backends.blocks import BlockKernels
from sbn_lightning.backends.gated import GatedFunction
from sbn_lightning.backends.joined import join
from sbn_lightning.backends.linear_function import KernelLinearFunction
from sbn_lightning.backends.shared_tokens import quantized_once
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern
from sbn_lightning.sparsity.ternary import apply_swiglu

Engine = str  # version 0.1.0 listed three; kernels have names in the registry now


class KernelWeight(NamedTuple):
    """A ternary weight and the forms of it that the kernels read.

    Attributes:
        codes: int8 ``[out, in]`` in {-1, 0, 1}; None if only ``packed`` and ``transposed`` are read.
        row_scale: float32 ``[out]``: gamma of each row.
        mask_bits: uint8 ``[out, ceil(in / 8)]``.
        packed: The form of the weight that ``kernel`` reads; None: the codes.
        transposed: The form of the weight that the gradient of the input reads; None if that gradient is exact.
        kernel: The name of the kernel that multiplies.
    """

    codes: Tensor | None
    row_scale: Tensor
    mask_bits: Tensor
    packed: Tensor | None
    transposed: Tensor | None
    kernel: str


class KernelBackend(BlockKernels):
    """A ternary layer on integer tensor cores.

    Args:
        kernel: The name of a kernel of the registry. A kernel that is written for a pattern multiplies while the mask
            keeps no more than that pattern. Until a ramp reaches the pattern, the layer runs on the dense kernel that
            the first kernel names.
        gradients: The kind of gradients, see the module.
        saved_gates: Whether gates and ups in one tensor are saved for the backward as int8 codes.
        joins: Whether layers that read the same tokens may become one product (:mod:`sbn_lightning.backends.joined`).

    Attributes:
        seed: int64 ``[1]`` on the layer's device. int8 gradients need a new seed for each pass.
    """

    takes_pairs = takes_quantized = True

    def __init__(
        self, kernel: str, *, gradients: Gradients = "bf16", saved_gates: bool = False, joins: bool = True
    ) -> None:
        self.kernel = kernel
        self.gradients: Gradients = gradients
        self.saved_gates = saved_gates
        self.joins = joins

    @property
    def name(self) -> str:
        return registry.product(self.kernel).backend

    @property
    def records(self) -> bool:
        """Whether :meth:`prepare` launches kernels of this package alone. A CUDA graph can record them."""
        kernels = (registry.product(name) for name in {self.kernel, registry.product(self.kernel).denser} - {""})
        return all(kernel.form in ("codes", *LAYOUTS) for kernel in kernels)

    def fresh_mask(self, scores: Tensor, pattern: NMPattern, keep: Keep) -> Tensor:
        if scores.dtype == torch.int8:  # the groups are ranked by ternary codes
            scores = scores.to(torch.bfloat16)
        n, rows = _keep_arguments(pattern, keep)
        return sk.prepare_weight(scores, n, pattern.m, keep=rows, want_codes=False).mask_bits

    def prepare(self, latent: Tensor, mask_bits: Tensor | None, keep: Keep, sparsity: SparsityConfig) -> KernelWeight:
        n, rows = _keep_arguments(sparsity.nm, keep)
        kernel = self._product(n, rows, sparsity)
        weight = sk.prepare_weight(
            latent,
            n,
            sparsity.nm.m,
            sparsity.split_sizes,
            mask_bits=mask_bits,
            keep=rows if mask_bits is None else None,
            gamma_over=sparsity.gamma_over,
            layout=_layout(kernel),
            want_mask=mask_bits is None,
        )
        bits = weight.mask_bits if mask_bits is None else mask_bits
        return self._forms(kernel, weight.codes, weight.row_scale, bits, weight.packed)

    def from_codes(
        self, codes: Tensor, row_scale: Tensor, mask_bits: Tensor, keep: Keep, sparsity: SparsityConfig
    ) -> KernelWeight:
        n, rows = _keep_arguments(sparsity.nm, keep)
        kernel = self._product(n, rows, sparsity)
        packed = codes.new_empty(0)
        if (layout := _layout(kernel)) != "none":
            # The kernel that packs a latent weight packs codes too: with a gamma of 1, codes round to themselves.
            one = torch.ones(1, dtype=torch.float32, device=codes.device)
            latent = codes.to(torch.bfloat16)
            packed = sk.prepare_weight(
                latent,
                n,
                sparsity.nm.m,
                mask_bits=mask_bits,
                gamma=one,
                layout=layout,
                want_mask=False,
                want_codes=False,
            ).packed
        return self._forms(kernel, codes, row_scale.contiguous(), mask_bits, packed)

    def from_words(
        self, words: Tensor, row_scale: Tensor, mask_bits: Tensor | None, keep: Keep, sparsity: SparsityConfig,
        in_features: int,
    ) -> KernelWeight:  # fmt: skip
        """The same as :meth:`prepare`, from codes and mask that came from several ranks.

        Args:
            words: The words of all ranks, uint8 ``[ranks, rows of a rank, ceil(in / 4)]``.
            row_scale: gamma of each row, float32 ``[out]``.
            mask_bits: The packed mask; None takes the mask out of the words.
            keep: The most weights that the mask keeps in a group, for all rows or for each.
            sparsity: The options of the layer.
            in_features: The number of weights in a row.
        """
        n, rows = _keep_arguments(sparsity.nm, keep)
        kernel = self._product(n, rows, sparsity)
        codes, bits, packed = decode_rows(
            words, len(row_scale), in_features, _layout(kernel), want_mask=mask_bits is None
        )
        return self._forms(kernel, codes, row_scale, bits if mask_bits is None else mask_bits, packed)

    def _product(self, n: int, rows: Tensor | None, sparsity: SparsityConfig) -> registry.Product:
        """The kernel for a mask that keeps ``n`` weights of each group, or the number in ``rows`` for each row."""
        kernel = registry.product(self.kernel)
        if kernel.pattern is not None and (rows is not None or not kernel.holds(n, sparsity.nm.m)):
            return registry.product(kernel.denser)
        return kernel

    def _forms(
        self, kernel: registry.Product, codes: Tensor, row_scale: Tensor, mask_bits: Tensor, packed: Tensor
    ) -> KernelWeight:
        """The forms of a weight that the kernels read; ``packed`` is one already if it is a layout of packed words."""
        form: Tensor | None = None
        if _layout(kernel) != "none":
            form = packed
        elif kernel.form != "codes":
            form = kernel.pack(codes)
        transposed = None
        if self.gradients in ("int8", "int8-dx"):
            transposed = registry.gradients(codes.device.index).transpose(codes)
        return KernelWeight(codes, row_scale, mask_bits, form, transposed, kernel.name)

    def without_codes(self, prepared: KernelWeight) -> KernelWeight:
        """The prepared weight without its codes, one byte a weight, if the products read packed words alone."""
        packed = registry.product(prepared.kernel).form in LAYOUTS and prepared.transposed is not None
        return prepared._replace(codes=None) if packed else prepared

    def with_codes(self, prepared: KernelWeight, in_features: int) -> KernelWeight:
        """The prepared weight with its codes, which are unpacked if :meth:`without_codes` has dropped them."""
        if prepared.codes is not None:
            return prepared
        packed, form = prepared.packed, registry.product(prepared.kernel).form
        assert packed is not None
        return prepared._replace(codes=unpack(packed, len(prepared.row_scale), in_features, form))

    def linear(
        self,
        x: Tensor,
        latent: Tensor,
        prepared: KernelWeight,
        gradient_mask: Tensor | None,
        activation_bits: int | None,
        swiglu: bool | Tensor = False,
        dtype: torch.dtype | None = None,
        quantized: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Multiply, as :meth:`Backend.linear` says; ``swiglu`` may also be the ups, and ``x`` the gates alone.

        ``quantized`` are the codes of ``x``, int8 ``[tokens, in]``, and their scales. Then the values of ``x`` are not
        read.
        """
        rounds = self.gradients != "bf16"
        if rounds and self.seed is None and torch.is_grad_enabled():
            raise ValueError(f'gradients="{self.gradients}" need a seed: set backend.seed before each pass')
        dtype = dtype or x.dtype
        up = swiglu if isinstance(swiglu, Tensor) else None
        fused = swiglu is not False
        if fused and (latent.shape[1] > MAX_FEATURES or dtype != x.dtype):
            x = apply_swiglu(x) if up is None else F.silu(x) * up
            fused, up = False, None
        x8, scale = quantized or (None, None)
        if quantized is None and not fused and not torch.compiler.is_compiling():
            x8, scale = quantized_once(x, activation_bits, sk.quantize_tokens)  # type: ignore[arg-type]
        # Reshaped outside the function: autograd forbids an in-place change of a view that a function returns, and an
        # activation after the layer may work in place.
        tokens = x.reshape(-1, x.shape[-1])
        ups = None if up is None else up.reshape(-1, up.shape[-1])
        y: Tensor = KernelLinearFunction.apply(
            tokens, latent, ups, *_factors(prepared), gradient_mask, activation_bits, fused,
            self.seed if rounds else None, self.gradients != "int8-dx", dtype, x8, scale, self.saved_gates,
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def joins_gated(self, backend: KernelBackend) -> bool:
        joins = self.gradients == backend.gradients == "int8" and torch.is_grad_enabled()
        return joins and self.seed is not None and backend.seed is not None

    def gated(
        self, x: Tensor, first: Operands, last: Operands, backend: KernelBackend, dtype: torch.dtype,
        quantized: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:  # fmt: skip
        if not self.joins_gated(backend) or last[0].shape[1] > MAX_FEATURES:
            return None
        y: Tensor = GatedFunction.apply(
            x.reshape(-1, x.shape[-1]), first[0], last[0],
            *_factors(first[1]), *first[2:], self.seed, *_factors(last[1]), *last[2:], backend.seed, dtype,
            backend.saved_gates, *(quantized or (None, None)),
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def gated_pair(
        self, x: Tensor, layers: tuple[Operands, ...], backends: tuple[KernelBackend, ...], dtype: torch.dtype
    ) -> Tensor | None:
        first = self._join(layers[:2], backends[:2])
        if first is None:
            return None
        y: Tensor | None = self.gated(x, first, layers[2], backends[2], dtype)
        if y is None:
            y = backends[2].linear(self.linear(x, *first, False, dtype), *layers[2], True, dtype)
        return y

    def several(
        self, x: Tensor, layers: Sequence[Operands], backends: Sequence[KernelBackend], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        joined = self._join(layers, backends)
        if joined is None:
            return ()
        parts = self.linear(x, *joined, False, dtype).split([len(layer[0]) for layer in layers], -1)
        # A view that is saved for the backward, such as the values of an attention, would keep all results in memory.
        return tuple(part.contiguous() for part in parts)

    def _join(self, layers: Sequence[Operands], backends: Sequence[KernelBackend]) -> Operands | None:
        """The operands of layers as one layer with this backend; None if they stay apart."""
        alike = all(other.joins and other.gradients == self.gradients for other in backends)
        return join(layers) if alike else None


def _factors(weight: KernelWeight) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, str]:
    """What products read of a weight: all but the mask."""
    return weight.codes, weight.row_scale, weight.packed, weight.transposed, weight.kernel


def _layout(kernel: registry.Product) -> str:
    """The layout of packed words that a kernel reads, or "none"."""
    return kernel.form if kernel.form in LAYOUTS else "none"


def _keep_arguments(pattern: NMPattern, keep: Keep) -> tuple[int, Tensor | None]:
    """``keep`` as the kernel takes it: one N, or one N for each row."""
    return (keep, None) if isinstance(keep, int) else (pattern.n, keep.to(torch.int32))
