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

from sbn_lightning.callbacks.lightning_internals import writes_shards
from sbn_lightning.callbacks.sharded_average import LocalValues, copy_of_values, swap_values
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed.whole_states import load_weights
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
    ``TernarySparseConversion``. Under FSDP2 each rank averages the rows that it has
    (:mod:`~sbn_lightning.callbacks.sharded_average`), and a checkpoint is one file.

    Raises:
        ConfigError: When training starts, if every rank is to save its own shard of a checkpoint.
    """

    # Whether the weights have changed places: the average is in the model, and the trained weights are in the average.
    _swapped = False
    _sharded = False  # Whether the weights are sharded.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run. The average is a copy of the model, whose layers may not even be built yet."""
        if stage == "fit":
            self._average_model, self._swapped, self._sharded = None, False, False
            self._latest_update_step, self._latest_update_epoch = 0, -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._make_average(pl_module).to(self._device or pl_module.device)
        if self._sharded and writes_shards(trainer.strategy):
            raise ConfigError(
                f"{type(self).__name__} saves a checkpoint as one file if weights are sharded: set "
                "save_distributed_checkpoint=false"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, self._values(pl_module), outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, self._values(pl_module))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refresh_average(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._refresh_average(pl_module)
        super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._sharded:
            self._save_sharded(trainer, pl_module, checkpoint)
            return
        self._refresh_average(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:  # A signal can make DurableCheckpoint save within a validation.
            average, current = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, current

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.training:
            self._make_average(pl_module)
            if self._sharded and "averaging_state" in checkpoint:
                # The strategy has given the model the weights of "state_dict", which are the average.
                self._average_model = None
                average = self._make_average(pl_module)
                average.n_averaged.copy_(checkpoint["averaging_state"]["n_averaged"])
                load_weights(pl_module, checkpoint["current_model_state"])
                return
        super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def _make_average(self, pl_module: LightningModule) -> AveragedModel:
        if self._average_model is None:
            device = self._device or pl_module.device
            self._sharded = any(isinstance(parameter, DTensor) for parameter in pl_module.parameters())
            if self._sharded:
                self._average_model = AveragedModel(nn.Module(), device, use_buffers=self._use_buffers, **self._kwargs)
                self._average_model.module = copy_of_values(pl_module).to(device)
                return self._average_model
            self._average_model = AveragedModel(pl_module, device, use_buffers=self._use_buffers, **self._kwargs)
            for _, layer in masked_layers(self._average_model):
                # Only _refresh_average changes this mask. During a validation it has the mask of training.
                layer.hold_mask = True
        return self._average_model

    def _refresh_average(self, pl_module: LightningModule) -> None:
        if self._average_model is not None and not self._swapped and not self._sharded:
            for (_, average), (_, current) in zip(
                masked_layers(self._average_model.module), masked_layers(pl_module), strict=True
            ):
                average.set_density(*current.density)
                average.refresh_mask()

    def _values(self, pl_module: LightningModule) -> Any:
        """The model, or if it is sharded, the values of it that this rank holds."""
        return LocalValues(pl_module) if self._sharded else pl_module

    def _save_sharded(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average and the trained weights into a checkpoint. All ranks must call this together."""
        assert self._average_model is not None
        first = checkpoint["state_dict"]
        self._swap_models(pl_module)
        # Buffers in a state dict on a CPU are those of the model, which are about to change.
        second = {key: value.clone() for key, value in trainer.strategy.lightning_module_state_dict().items()}
        self._swap_models(pl_module)
        average, current = (first, second) if self._swapped else (second, first)
        checkpoint["state_dict"], checkpoint["current_model_state"] = average, current
        checkpoint["averaging_state"] = {"n_averaged": self._average_model.n_averaged.cpu()}

    def _swap_models(self, pl_module: LightningModule) -> None:
        if self._sharded:
            assert self._average_model is not None
            layers = [layer for _, layer in masked_layers(pl_module)]
            if not self._swapped:
                for layer in layers:
                    layer.packed_mask()  # Before another weight is there, if the mask is held.
            swap_values(self._average_model.module, pl_module)
            self._swapped = not self._swapped
            _show_new_values(pl_module)
            for layer in layers if self._swapped else ():
                layer.refresh_mask()
            return
        super()._swap_models(pl_module)
        self._swapped = not self._swapped
        assert self._average_model is not None
        _show_new_values(pl_module)
        _show_new_values(self._average_model)

    def _copy_average_to_current(self, pl_module: LightningModule) -> None:
        if self._sharded:
            self._swap_models(pl_module)
            self._swapped = False  # From now on both have the average.
            assert self._average_model is not None
            self._average_model.module = copy_of_values(pl_module).to(self._average_model.n_averaged.device)
            return
        super()._copy_average_to_current(pl_module)
        _show_new_values(pl_module)


class SparseEMAWeightAveraging(SparseWeightAveraging, EMAWeightAveraging):
    """Lightning's ``EMAWeightAveraging`` for models with masked layers. The arguments are the same."""


def _show_new_values(model: nn.Module) -> None:
    """Make masked layers see that their weights were replaced, which a copy into ``.data`` hides from them."""
    torch.autograd.graph.increment_version([layer.weight for _, layer in masked_layers(model)])
