"""A decay of masked weights alone, as SR-STE has it (arXiv 2102.04010), decoupled from the gradient as in AdamW.

With the dense straight-through gradient a weight outside the mask is pushed by a gradient that its movement does not
answer, and masks near a tie flip to and fro. SR-STE adds ``decay * (1 - mask) * W`` to the gradient; Adam would scale
that away, so it is taken from the weight itself: ``W -= lr * decay * (1 - mask) * W``, before each optimiser step.

A strong decay settles the masks, which helps at first and costs the last part of a run; ``until`` lets it end before.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sbn_lightning.callbacks.base import RunCallback, require_masked_layers, schedule_length
from sbn_lightning.callbacks.weight_decay import check_share, cosine_to_zero
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.sparsity.pattern import unpack_mask

if TYPE_CHECKING:
    from sbn_lightning.callbacks.base import Run


class MaskedWeightDecay(RunCallback):
    """Lets the weights that the mask drops decay by ``lr * decay`` an optimiser step, besides any other weight decay.

    The mask is the one of the forward pass; ``lr`` is that of the weight's own parameter group. Not with ``16-mixed``,
    whose scaler leaves steps out.

    Args:
        decay: Of the size of a weight decay; 0 does nothing.
        until: Share of training after which it is 0, where a cosine takes it; None keeps it.
        total_steps: Optimiser steps of the whole training, for ``until``; the trainer's ``max_steps`` if not given.

    Raises:
        ConfigError: If the decay is negative or ``until`` is no share, and at the start of training if it cannot work
            with what trains.
    """

    def __init__(self, decay: float = 0.0, until: float | None = None, total_steps: int | None = None) -> None:
        if not 0 <= decay < math.inf:
            raise ConfigError(f"MaskedWeightDecay: decay={decay} must not be negative")
        check_share(self, until)
        self.decay, self.until, self.total_steps = decay, until, total_steps

    def decay_at(self, trainer: Run) -> float:
        """The decay of the optimiser step that comes."""
        if self.until is None or not self.decay:
            return self.decay
        total_steps = schedule_length(self, trainer, self.total_steps)
        return self.decay * cosine_to_zero(trainer.global_step, self.until * total_steps)

    def on_train_start(self, trainer: Run, pl_module: nn.Module) -> None:
        if not self.decay_at(trainer):  # also asks now for the length that a schedule needs
            return
        trained = {weight for optimizer in trainer.optimizers for weight in _rates(optimizer)}
        layers = require_masked_layers(self, pl_module)
        for name, layer in layers.items():
            weight = layer._parameters["weight"]
            if isinstance(weight, DTensor) and not all(p.is_replicate() or p.is_shard(0) for p in weight.placements):
                raise ConfigError(
                    f"MaskedWeightDecay: {name} is sharded by {weight.placements}, not by rows as FSDP2 does"
                )
        precision = trainer.precision_plugin if isinstance(trainer, Trainer) else trainer.fabric._precision
        if getattr(precision, "scaler", None) is not None:
            raise ConfigError(
                "MaskedWeightDecay: the scaler of 16-mixed leaves optimiser steps out, not the decay; use bf16-mixed"
            )
        if not any(id(layer._parameters["weight"]) in trained for layer in layers.values()):
            raise ConfigError("MaskedWeightDecay: no optimiser holds the weight of a masked layer")

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Run, pl_module: nn.Module, optimizer: torch.optim.Optimizer) -> None:  # type: ignore[override]
        decay = self.decay_at(trainer)
        if not decay:
            return
        rates = _rates(optimizer)
        for layer in require_masked_layers(self, pl_module).values():
            weight = layer._parameters["weight"]
            if weight is not None and id(weight) in rates:  # a frozen layer, or another optimiser's, keeps its weights
                local, rows = _held(weight)
                dropped = ~unpack_mask(layer.mask_bits[rows], layer.in_features)
                local.mul_(1 - min(1.0, float(rates[id(weight)]) * decay) * dropped)


def _held(weight: Tensor) -> tuple[Tensor, slice]:
    """What this rank holds of a weight, and which of its rows these are: FSDP2 shards weights, and not masks."""
    if not isinstance(weight, DTensor):
        return weight, slice(None)
    local = weight.to_local()
    # torch has no public function that gives the offset; its own checkpoints use this one.
    _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return local, slice(offset[0], offset[0] + len(local))


def _rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """The learning rate of each parameter, by the parameter's id."""
    return {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
