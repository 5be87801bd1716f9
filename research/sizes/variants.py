"""Ideas that the study tries at one size: exactly N of M codes, and a mask that training learns in its last part.

Both are backends of the ternary layers in plain PyTorch. Muon and squared ReLU need no more than options of the
optimiser and of the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbn_lightning.backends.base import Keep, TernaryWeight
from sbn_lightning.backends.reference import REFERENCE, ReferenceBackend
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern, pack_mask, unpack_mask
from sbn_lightning.sparsity.ternary import apply_swiglu, expand_scale, quantize_activations, weight_scale


class ExactBackend(ReferenceBackend):
    """Make every weight that the mask keeps +1 or -1, so that a group has exactly N codes that are not zero.

    With 3:4 a group has 4 * 2^3 = 32 values, which is 1.25 bits a weight. gamma is the mean magnitude of the weights
    that the mask keeps: the least-squares scale of such codes.
    """

    def prepare(self, latent: Tensor, mask_bits: Tensor | None, keep: Keep, sparsity: SparsityConfig) -> TernaryWeight:
        if mask_bits is None:
            mask_bits = self.fresh_mask(latent, sparsity.nm, keep)
        mask = unpack_mask(mask_bits, latent.shape[1])
        gamma = weight_scale(latent, sparsity.split_sizes, over="kept", mask=mask)
        signs = torch.where(latent.detach() < 0, -1, 1).to(torch.int8)
        return TernaryWeight(signs * mask, expand_scale(gamma, sparsity.split_sizes, len(latent)), mask_bits)


EXACT = ExactBackend()
# The least temperature of the choice among the masks of a group.
COLDEST = 0.1


class LearnedMask(ReferenceBackend):
    """Choose the mask of each group among all masks of the pattern, by logits that are learned (arXiv 2409.17481).

    The forward takes one mask of each group, drawn with Gumbel noise. The gradient of the choice is that of the softmax
    (a straight-through Gumbel softmax). The noise falls to zero. The latent weight has the dense straight-through
    gradient, as in the method.

    Args:
        layer: The ternary layer. The logits start from the magnitudes of its latent weight, so the likeliest mask of a
            group is the one that the layer has.
    """

    def __init__(self, layer: SparseBitLinear) -> None:
        pattern = layer.pattern
        device = layer.weight.device
        self.candidates = candidates(pattern).to(device)
        groups = layer.weight.detach().float().abs().unflatten(-1, (-1, pattern.m))
        self.logits = nn.Parameter(5 * (groups / groups.mean()) @ self.candidates.t())
        self.noise = 1.0

    @property
    def temperature(self) -> float:
        """The temperature of the softmax, which falls with the noise."""
        return COLDEST + (1 - COLDEST) * self.noise

    def mask(self) -> Tensor:
        """Return the likeliest mask, bool ``[out_features, in_features]``."""
        return self.candidates[self.logits.argmax(-1)].flatten(-2).bool()

    def drawn(self) -> Tensor:
        """Return a drawn mask of zeros and ones in float32, with a gradient for the logits."""
        uniform = torch.rand_like(self.logits).clamp_(1e-9, 1 - 1e-7)
        soft = ((self.logits - self.noise * (-uniform.log()).log()) / self.temperature).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), len(self.candidates)).to(soft.dtype)
        return ((hard - soft.detach() + soft) @ self.candidates).flatten(-2)

    def fresh_mask(self, scores: Tensor, pattern: NMPattern, keep: Keep) -> Tensor:
        return pack_mask(self.mask())

    def prepare(self, latent: Tensor, mask_bits: Tensor | None, keep: Keep, sparsity: SparsityConfig) -> TernaryWeight:
        whole = REFERENCE.prepare(latent, pack_mask(torch.ones_like(latent, dtype=torch.bool)), keep, sparsity)
        return TernaryWeight(whole.codes, whole.row_scale, pack_mask(self.mask()))

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
        x = apply_swiglu(x) if swiglu else x
        dtype = dtype or x.dtype
        if activation_bits is not None:
            codes, scale = quantize_activations(x, activation_bits)
            x = x + (codes * scale - x).detach()
        values = prepared.codes * prepared.row_scale.unsqueeze(-1)
        effective = values.detach() * self.drawn() + (latent - latent.detach())
        return x.to(dtype) @ effective.to(dtype).t()


def candidates(pattern: NMPattern) -> Tensor:
    """Return all masks of a group that keep N weights, float32 ``[masks, M]``."""
    kept = list(combinations(range(pattern.m), pattern.n))
    masks = torch.zeros(len(kept), pattern.m)
    for row, places in zip(masks, kept, strict=True):
        row[list(places)] = 1.0
    return masks


def learn_masks(layers: Iterable[SparseBitLinear]) -> list[LearnedMask]:
    """Let layers learn their masks from now on, and return the backends, which hold the logits."""
    backends = []
    for layer in layers:
        layer.prepare()
        layer.backend = backend = LearnedMask(layer)
        backends.append(backend)
    return backends


def settle_masks(layers: Iterable[SparseBitLinear]) -> None:
    """Give layers the likeliest of their learned masks, which then stay."""
    for layer in layers:
        backend = layer.backend
        assert isinstance(backend, LearnedMask)
        layer.prepare()
        bits = pack_mask(backend.mask())
        layer.backend = REFERENCE
        layer.hold_mask = True
        layer._set_mask(bits)
