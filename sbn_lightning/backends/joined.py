"""Several ternary layers that read the same tokens, as one layer.

Models that others wrote have one layer for q, one for k and one for v, and one each for gate and up. The rows of the
joined layer are those of the single layers, one layer after the other. One product takes less time than several small
ones, and the gradient of the tokens is one product, too, instead of a sum of several products.

The forward has the bits of the single layers. In the backward the joined layer is what a fused layer of our own models
is. Its gradients are rounded with one scale a token for the gradients of all results, where single layers have a scale
each. Exact gradients differ by the order of sums.

The words of a layer lie in panels of 128 rows. If every layer fills its panels, the words of the joined layer are
those of the single layers, copied in each pass: two bits a weight. Other layers stay apart. A latent weight is not
read, only its gradient is made, so a tensor without memory stands for the latent weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sbn_kernels.catalog  # noqa: F401 (registers the kernels)
import torch
from sbn_kernels.common.packing import LAYOUTS, PANEL
from sbn_kernels.gemm import registry
from torch import Tensor

from sbn_lightning.backends.base import Operands


class StandIn(torch.autograd.Function):
    """A tensor in the shape of all latent weights, one below the other. Nobody may read its values."""

    @staticmethod
    def forward(ctx: Any, *latents: Tensor) -> Tensor:
        ctx.rows = [len(latent) for latent in latents]
        return latents[0].new_zeros(()).expand(sum(ctx.rows), latents[0].shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        return grad_outputs[0].split(ctx.rows)


def join(layers: Sequence[Operands]) -> Operands | None:
    """Make the operands of the joined layer.

    Args:
        layers: The operands of the single layers, which have one backend.

    Returns:
        The operands of the joined layer; None if the words of these layers cannot be put one after the other.
    """
    latents, weights, masks, bits = zip(*layers, strict=True)
    first = weights[0]
    if any(weight.kernel != first.kernel or len(weight.row_scale) % PANEL for weight in weights):
        return None
    if registry.product(first.kernel).form not in ("codes", *LAYOUTS):
        return None
    if len({latent.dtype for latent in latents}) > 1 or len(set(bits)) > 1 or len({m is None for m in masks}) > 1:
        return None

    def joined(name: str, dim: int = 0) -> Tensor | None:
        parts = [getattr(weight, name) for weight in weights]
        # A layer with learned scales keeps its codes. The joined layer has codes only if all layers have them.
        return None if any(part is None for part in parts) else torch.cat(parts, dim)

    fields = {name: joined(name) for name in ("codes", "row_scale", "mask_bits", "packed")}
    whole = first._replace(**fields, transposed=joined("transposed", 1))
    mask = None if masks[0] is None else torch.cat(masks)
    return StandIn.apply(*latents), whole, mask, bits[0]
