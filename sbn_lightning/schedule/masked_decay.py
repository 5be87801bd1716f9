"""A decay of masked weights alone, as in SR-STE (arXiv 2102.04010), but decoupled from the gradient as in AdamW.

With the dense straight-through gradient, a weight outside the mask is pushed by a gradient that does not depend on the
weight, and masks near a tie flip back and forth. SR-STE adds ``decay * (1 - mask) * W`` to the gradient. Adam would
rescale that term, so here the decay acts on the weight itself, before each optimiser step::

    W -= lr * decay * (1 - mask) * W

A strong decay settles the masks. That helps at first and costs the last part of a run, so ``until`` can end the decay
before the run ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.masked_linear import MaskedLinear
from sbn_lightning.schedule.curves import check_share, cosine_to_zero
from sbn_lightning.sparsity.pattern import unpack_mask


@dataclass(frozen=True)
class MaskedDecay:
    """Let the weights that the mask drops decay by ``lr * decay`` an optimiser step, besides any other weight decay.

    The mask is the one of the forward pass. ``lr`` is the learning rate of the weight's own parameter group.

    Args:
        decay: The strength, in the units of a weight decay. 0 does nothing.
        until: The share of training after which the decay is 0. A cosine leads there. None leaves the decay constant.
        owner: The name that error messages start with.

    Raises:
        ConfigError: If the decay is negative or not finite, or ``until`` is no share of training.
    """

    decay: float = 0.0
    until: float | None = None
    owner: str = "MaskedDecay"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < math.inf:
            raise ConfigError(f"{self.owner}: decay={self.decay} must not be negative")
        check_share(self.owner, self.until)

    @property
    def needs_length(self) -> bool:
        """Whether the decay depends on the length of training."""
        return self.until is not None and self.decay > 0

    def decay_at(self, step: int, total_steps: int) -> float:
        """Return the decay of the optimiser step that follows ``step`` of ``total_steps`` steps."""
        if self.until is None or not self.decay:
            return self.decay
        return self.decay * cosine_to_zero(step, self.until * total_steps)

    def check(self, layers: Mapping[str, MaskedLinear], optimizers: list[Optimizer]) -> None:
        """Check that the decay can work with these layers and optimisers.

        Raises:
            ConfigError: If a weight is sharded other than by rows, or no optimiser holds the weight of a layer.
        """
        for name, layer in layers.items():
            weight = layer._parameters["weight"]
            if isinstance(weight, DTensor) and not all(p.is_replicate() or p.is_shard(0) for p in weight.placements):
                raise ConfigError(f"{self.owner}: {name} is sharded by {weight.placements}, not by rows as FSDP2 does")
        trained = {weight for optimizer in optimizers for weight in _rates(optimizer)}
        if not any(id(layer._parameters["weight"]) in trained for layer in layers.values()):
            raise ConfigError(f"{self.owner}: no optimiser holds the weight of a masked layer")

    @staticmethod
    @torch.no_grad()
    def apply(layers: Mapping[str, MaskedLinear], optimizer: Optimizer, decay: float) -> None:
        """Shrink the masked weights that ``optimizer`` holds.

        Args:
            layers: The masked layers by name.
            optimizer: The optimiser that is about to step. Layers whose weights it does not hold stay as they are.
            decay: The decay of this step, as :meth:`decay_at` returns it.
        """
        rates = _rates(optimizer) if decay else {}
        for layer in layers.values():
            weight = layer._parameters["weight"]
            if weight is not None and id(weight) in rates:
                # The layer's own view of the weight: Conv1D stores its transpose, and experts a stack of matrices.
                local, rows = _held(weight) if isinstance(weight, DTensor) else (layer.weight.detach(), slice(None))
                dropped = ~unpack_mask(layer.mask_bits[rows], layer.in_features)
                local.mul_(1 - min(1.0, float(rates[id(weight)]) * decay) * dropped)


def _held(weight: DTensor) -> tuple[Tensor, slice]:
    """Return this rank's part of a weight, and which rows these are. FSDP2 shards weights, but not masks."""
    local = weight.to_local()
    # torch has no public function that gives the offset; its own checkpoints use this one.
    _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return local, slice(offset[0], offset[0] + len(local))


def _rates(optimizer: Optimizer) -> dict[int, float]:
    """Return the learning rate of each parameter, by the parameter's id."""
    return {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
