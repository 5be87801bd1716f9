"""A decay of masked weights alone, as SR-STE has it (arXiv 2102.04010), decoupled from the gradient as in AdamW.

With the dense straight-through gradient a weight outside the mask is pushed by a gradient that its movement does not
answer, and masks near a tie flip to and fro. SR-STE adds ``decay * (1 - mask) * W`` to the gradient; Adam would scale
that away, so it is taken from the weight itself: ``W -= lr * decay * (1 - mask) * W``, before each optimiser step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sbn_lightning.callbacks.base import RunCallback, require_masked_layers
from sbn_lightning.errors import ConfigError
from sbn_lightning.pattern import unpack_mask

if TYPE_CHECKING:
    from sbn_lightning.callbacks.base import Run


class MaskedWeightDecay(RunCallback):
    """Lets the weights that the mask drops decay by ``lr * decay`` an optimiser step, besides any other weight decay.

    The mask is the one of the forward pass; its own learning rate belongs to each weight.

    Args:
        decay: Of the size of a weight decay; 0 does nothing.
    """

    def __init__(self, decay: float = 0.0) -> None:
        if decay < 0:
            raise ConfigError(f"MaskedWeightDecay: decay={decay} must not be negative")
        self.decay = decay

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Run, pl_module: nn.Module, optimizer: torch.optim.Optimizer) -> None:  # type: ignore[override]
        if not self.decay:
            return
        rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
        for name, layer in require_masked_layers(self, pl_module).items():
            weight = layer._parameters["weight"]
            if isinstance(weight, DTensor):
                raise ConfigError(f"MaskedWeightDecay: {name} is sharded (FSDP2), its mask is not; use DDP")
            if weight is not None and id(weight) in rates:
                dropped = ~unpack_mask(layer.mask_bits, layer.in_features)
                weight.mul_(1 - rates[id(weight)] * self.decay * dropped)
