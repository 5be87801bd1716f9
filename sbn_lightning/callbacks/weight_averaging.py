"""``SparseWeightAveraging``: averaged weights (EMA, SWA) of a model with masks.

Lightning's callbacks average every buffer, but an average of masks is not a mask, and here eight mask values share a
byte. They also put averaged weights into the model through ``.data``, which autograd does not see, so layers would keep
the masks and ternary codes of the old weights. Here the latent weights are averaged, and masks and codes are computed
from the average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.sparse_linear import masked_layers


def refuse_plain_averaging(callbacks: Sequence[Any]) -> None:
    """Check that no callback averages masks.

    Args:
        callbacks: The callbacks of a run.

    Raises:
        ConfigError: If a callback averages masks. The message names the callback and the one to use instead.
    """
    for callback in callbacks:
        if isinstance(callback, WeightAveraging) and not isinstance(callback, SparseWeightAveraging):
            instead = SparseEMAWeightAveraging if isinstance(callback, EMAWeightAveraging) else SparseWeightAveraging
            raise ConfigError(
                f"{type(callback).__name__} does not keep N:M masks and ternary codes true to the averaged weights; "
                f"use sbn_lightning's {instead.__name__}, which takes the same arguments"
            )


class SparseWeightAveraging(WeightAveraging):
    """Lightning's ``WeightAveraging`` for models with masked layers. The arguments are the same.

    The averaged weights are in the model during validation and after training, and in the ``state_dict`` of
    checkpoints. Their masks keep the largest averaged weights, at the present density of training. Training itself goes
    on with its own masks, also with masks that ``MaskRefresh`` holds. The callback may stand before or after
    ``TernarySparseConversion``. It works on one process and under DDP.

    Raises:
        ConfigError: When training starts, if the weights are sharded.
    """

    # Whether the weights have changed places: the average is in the model, and the trained weights are in the average.
    _swapped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run. The average is a copy of the model, whose layers may not even be built yet."""
        if stage == "fit":
            self._average_model, self._swapped = None, False
            self._latest_update_step, self._latest_update_epoch = 0, -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._make_average(pl_module).to(self._device or pl_module.device)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refresh_average(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refresh_average(pl_module)
        super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._refresh_average(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:  # A signal can make DurableCheckpoint save within a validation.
            average, current = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, current

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.training:
            self._make_average(pl_module)
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _make_average(self, pl_module: LightningModule) -> AveragedModel:
        if self._average_model is None:
            if any(isinstance(parameter, DTensor) for parameter in pl_module.parameters()):
                raise ConfigError(
                    f"{type(self).__name__} needs a copy of the model, and FSDP2 allows none: use the strategy ddp, or "
                    "leave the callback out"
                )
            device = self._device or pl_module.device
            self._average_model = AveragedModel(pl_module, device, use_buffers=self._use_buffers, **self._kwargs)
            for _, layer in masked_layers(self._average_model):
                # Only _refresh_average changes this mask. During a validation it has the mask of training.
                layer.hold_mask = True
        return self._average_model

    def _refresh_average(self, pl_module: LightningModule) -> None:
        if self._average_model is not None and not self._swapped:
            for (_, average), (_, current) in zip(
                masked_layers(self._average_model.module), masked_layers(pl_module), strict=True
            ):
                average.set_density(*current.density)
                average.refresh_mask()

    def _swap_models(self, pl_module: LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped
        assert self._average_model is not None
        _show_new_values(pl_module)
        _show_new_values(self._average_model)

    def _copy_average_to_current(self, pl_module: LightningModule) -> None:
        super()._copy_average_to_current(pl_module)
        _show_new_values(pl_module)


class SparseEMAWeightAveraging(SparseWeightAveraging, EMAWeightAveraging):
    """Lightning's ``EMAWeightAveraging`` for models with masked layers. The arguments are the same."""


def _show_new_values(model: nn.Module) -> None:
    """Make masked layers see that their weights were replaced, which a copy into ``.data`` hides from them."""
    torch.autograd.graph.increment_version([layer.weight for _, layer in masked_layers(model)])
