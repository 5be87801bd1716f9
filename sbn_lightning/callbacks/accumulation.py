"""Gradient accumulation under FSDP2 with one communication for each optimiser step.

``ModelParallelStrategy`` treats each micro-batch like a step of its own: it gathers the weights for the forward,
gathers them again for the backward, and then reduces the gradients. But between two optimiser steps the weights do not
change, and gradients can be summed before they are reduced, as DDP does under Lightning. The price is memory: each rank
keeps whole weights and whole gradients.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.fsdp import FSDPModule

from sbn_lightning.callbacks.base import is_step
from sbn_lightning.core.errors import ConfigError


class UnshardedAccumulation(Callback):
    """Keep weights and gradients whole from the first micro-batch of an optimiser step to the last one.

    This takes 8 bytes more for each float32 parameter on every rank: 12 GiB for 1.5 billion parameters. The states of
    the optimiser stay sharded. Weights are sharded again between steps, also after a validation between two steps.

    Raises:
        ConfigError: At the start of training, if nothing is sharded with FSDP2.
    """

    def __init__(self) -> None:
        # The last value of the flags, which are set only when it changes: setting them walks over all modules.
        self._last: bool | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights whole after a forward."""
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
        """Reduce gradients and shard weights only with the last micro-batch of a step."""
        last = is_step(trainer)
        if last == self._last:
            return
        self._last = last
        for root in _roots(pl_module):
            root.set_requires_gradient_sync(last)
            root.set_reshard_after_backward(last)
            root.set_is_last_backward(last)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shard the weights again, if the validation was between two steps."""
        # The forwards of a validation leave weights whole, and no backward follows that would shard them.
        if is_step(trainer):
            for module in pl_module.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


def _roots(module: nn.Module) -> list[FSDPModule]:
    """Return the outermost modules that FSDP2 shards. A flag on one of them also applies to the modules inside."""
    if isinstance(module, FSDPModule):
        return [module]
    return [root for child in module.children() for root in _roots(child)]
