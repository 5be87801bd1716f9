"""Gradient accumulation under FSDP2 that talks to the other ranks once an optimiser step.

``ModelParallelStrategy`` treats each micro-batch as if it were a step of its own: weights are gathered for its forward,
gathered again for its backward, and gradients reduced after it. Between two optimiser steps the weights do not change,
and gradients can be summed before they are reduced, as DDP does it under Lightning. What is not sent has to be kept.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.fsdp import FSDPModule

from sbn_lightning.callbacks.base import is_step
from sbn_lightning.core.errors import ConfigError


class UnshardedAccumulation(Callback):
    """Keeps weights whole, and gradients too, from a step's first micro-batch to its last.

    For each parameter it takes 8 bytes more (float32) on every rank: 12 GiB at a billion and a half. Optimiser states
    stay sharded; weights are sharded again between steps, also after a validation there.

    Raises:
        ConfigError: At the start of training, if nothing is sharded with FSDP2.
    """

    def __init__(self) -> None:
        self._last: bool | None = None  # what the flags say; setting them walks over all modules

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = None
        roots = _roots(pl_module)
        if not roots:
            raise ConfigError(
                "UnshardedAccumulation is for FSDP2, and nothing here is sharded: leave it out, or train with "
                "ModelParallelStrategy"
            )
        for root in roots:
            root.set_reshard_after_forward(False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        last = is_step(trainer)
        if last == self._last:
            return
        self._last = last
        for root in _roots(pl_module):
            root.set_requires_gradient_sync(last)
            root.set_reshard_after_backward(last)
            root.set_is_last_backward(last)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Its forwards leave weights whole, and no backward follows that would shard them. Within a step they stay.
        if is_step(trainer):
            for module in pl_module.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


def _roots(module: nn.Module) -> list[FSDPModule]:
    """The outermost modules that FSDP2 shards; what is set on one holds for those within."""
    if isinstance(module, FSDPModule):
        return [module]
    return [root for child in module.children() for root in _roots(child)]
