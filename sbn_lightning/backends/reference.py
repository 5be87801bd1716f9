"""The reference backend: plain PyTorch, on every device and in every dtype. Kernels are tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from sbn_lightning.backends.base import Backend, Keep, TernaryWeight
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern, pack_mask, top_n_mask, unpack_mask
from sbn_lightning.sparsity.ternary import apply_swiglu, ternary_linear, ternary_weight

WeightSpec = SparsityConfig  # the name of version 0.1.0


class ReferenceBackend(Backend):
    """Plain PyTorch, on any device and in any dtype."""

    name = "reference"

    def fresh_mask(self, scores: Tensor, pattern: NMPattern, keep: Keep) -> Tensor:
        return pack_mask(top_n_mask(scores, pattern, keep))

    def prepare(self, latent: Tensor, mask_bits: Tensor | None, keep: Keep, sparsity: SparsityConfig) -> TernaryWeight:
        if mask_bits is None:
            mask_bits = self.fresh_mask(latent, sparsity.nm, keep)
        mask = unpack_mask(mask_bits, latent.shape[1])
        return TernaryWeight(*ternary_weight(latent, mask, sparsity.split_sizes, sparsity.gamma_over), mask_bits)

    def linear(
        self,
        x: Tensor,
        latent: Tensor,
        prepared: TernaryWeight,
        gradient_mask: Tensor | None,
        activation_bits: int | None,
        swiglu: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        if swiglu:
            x = apply_swiglu(x)
        codes, row_scale, _ = prepared
        return ternary_linear(x, latent, codes, row_scale, gradient_mask, activation_bits, dtype)


REFERENCE = ReferenceBackend()
