"""``SparsityPatternLogger``: zeros, flip rates, gamma, histograms and pictures of the pattern, for any logger.

The logger looks at the model when the first batch after a due step begins. By then every other callback has done its
work for that step, so the order of callbacks does not matter. Scalars go to all loggers, histograms and pictures go to
TensorBoard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sbn_lightning.callbacks.base import RunCallback, require_masked_layers, show
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.sparse_linear import MaskedLinear, SparseBitLinear
from sbn_lightning.layers.statistics import Counts, Snapshot, count, kind_of
from sbn_lightning.sparsity.pattern import nonzeros_per_group

if TYPE_CHECKING:
    from sbn_lightning.callbacks.base import Run

HISTOGRAM_SAMPLE = 1 << 18
PICTURE_SIZE, PICTURE_ZOOM = 64, 6
# Colours of a picture: masked (enforced zero), natural zero, +1, -1.
COLOURS = torch.tensor([[55, 55, 65], [255, 255, 255], [214, 69, 65], [52, 101, 164]], dtype=torch.uint8)


class SparsityPatternLogger(RunCallback):
    """Log what masks and codes look like, every ``interval`` optimiser steps and when training ends.

    * ``sparsity/...`` in total, and ``.../<layer>`` for each layer: ``zeros``, ``zeros_natural``, ``zeros_enforced``,
      ``mask_density``, ``flip_rate_mask`` and ``flip_rate_code``. Flip rates count changes since the last look.
    * ``gamma/<layer>``, one for each split of a fused layer.
    * TensorBoard histograms of latent weights, ternary codes and non-zeros in a group.
    * TensorBoard pictures of the top left corner of the first layer of each kind: red is +1, blue is -1, white is a
      natural zero, and dark is a weight that the mask removes.

    Args:
        interval: The number of optimiser steps between two looks.
        histograms: Whether to write histograms.
        pictures: Whether to write pictures.
        per_layer: Whether to log scalars of each layer besides the totals.

    Raises:
        ConfigError: If ``interval`` is less than 1, and when training starts if the model has no masked layer.
    """

    needs_masked_layers = True

    def __init__(
        self, interval: int = 100, histograms: bool = True, pictures: bool = True, per_layer: bool = True
    ) -> None:
        if interval < 1:
            raise ConfigError(f"SparsityPatternLogger: interval={interval} must be at least 1")
        self.interval = interval
        self.histograms, self.pictures, self.per_layer = histograms, pictures, per_layer
        self.counts: dict[str, Counts] = {}
        self._before: dict[str, Snapshot] = {}
        self._last_look = -1
        self._not_finite: set[str] = set()

    def on_train_start(self, trainer: Run, pl_module: nn.Module) -> None:
        """Forget an earlier run. A run that resumes is never behind its last look."""
        if trainer.global_step < self._last_look:
            self.counts, self._before, self._last_look = {}, {}, -1

    def on_train_batch_start(self, trainer: Run, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Look if that is due."""
        if trainer.global_step // self.interval > self._last_look // self.interval:
            self._look(trainer, pl_module)
            show(trainer, pl_module, "zeros", self.total().shares()["zeros"], logger=False)

    def on_train_end(self, trainer: Run, pl_module: nn.Module) -> None:
        """Look at the end of training."""
        if trainer.global_step > self._last_look:
            self._look(trainer, pl_module)

    def total(self) -> Counts:
        """Return the counts of the last look, summed over layers."""
        return sum(self.counts.values(), Counts())

    def _look(self, trainer: Run, module: nn.Module) -> None:
        step = self._last_look = trainer.global_step
        layers = require_masked_layers(self, module)
        is_first = not self._before
        self.counts, self._before = count(layers, self._before)
        metrics = {f"sparsity/{key}": value for key, value in self.total().shares().items()}
        if self.per_layer:
            for name, counts in self.counts.items():
                metrics |= {f"{key}/{name}": value for key, value in counts.shares().items()}
            metrics |= _gammas(layers)
        if is_first:  # There is nothing to compare with yet.
            metrics = {key: value for key, value in metrics.items() if "flip_rate" not in key}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if boards and (self.histograms or self.pictures):
            self._write_tensorboard([board.experiment for board in boards], layers, step, trainer.is_global_zero)

    @torch.no_grad()
    def _write_tensorboard(self, writers: list[Any], layers: dict[str, MaskedLinear], step: int, writes: bool) -> None:
        """Write histograms and pictures of all layers.

        Args:
            writers: The writers of TensorBoard.
            layers: The masked layers by name.
            step: The optimiser step.
            writes: Whether this rank writes. All ranks look at the values, because sharded layers gather them.
        """
        pictured = set()
        for name, layer in layers.items():
            values = layer.values()
            if not writes:
                continue
            sample = _sample(layer.weight.detach())
            if self.histograms and not (values.isfinite().all() and sample.isfinite().all()):
                if name not in self._not_finite:  # The warning comes once for each layer.
                    rank_zero_warn(
                        f"SparsityPatternLogger: the weight of {name} has a value that is NaN or infinite at step "
                        f"{step}: its histograms are left out (NonFiniteGuard stops a training when that happens)"
                    )
                    self._not_finite.add(name)
            elif self.histograms:
                for writer in writers:
                    writer.add_histogram(f"latent_weight/{name}", sample.float().cpu(), step)
                    counts = nonzeros_per_group(values, layer.pattern.m)
                    _write_counts(writer, f"nonzeros_per_group/{name}", counts, step)
                    if isinstance(layer, SparseBitLinear):
                        _write_counts(writer, f"ternary_code/{name}", values, step)
            if self.pictures and kind_of(name) not in pictured:
                pictured.add(kind_of(name))
                for writer in writers:
                    writer.add_image(f"pattern/{name}", picture(values, layer.mask), step)

    def state_dict(self) -> dict[str, Any]:
        """Return the last look. After a resume, flip rates are counted from this look."""
        before = {name: [part.cpu() for part in snapshot] for name, snapshot in self._before.items()}
        return {"last_look": self._last_look, "before": before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the last look of the run that goes on."""
        self._last_look = state_dict["last_look"]
        self._before = {name: Snapshot(*parts) for name, parts in state_dict["before"].items()}


def picture(values: Tensor, mask: Tensor, size: int = PICTURE_SIZE) -> Tensor:
    """Return the top left ``size x size`` weights as an image, uint8 ``[3, height, width]``.

    Args:
        values: The codes of a ternary layer, or the weights of another layer, ``[out_features, in_features]``.
        mask: Which of them the mask keeps, boolean, of the same shape.
        size: The most rows and columns.
    """
    values, mask = values[:size, :size].cpu(), mask[:size, :size].cpu()
    index = torch.where(mask, torch.where(values > 0, 2, torch.where(values < 0, 3, 1)), 0)
    image = COLOURS[index].permute(2, 0, 1)
    return image.repeat_interleave(PICTURE_ZOOM, 1).repeat_interleave(PICTURE_ZOOM, 2)


def _gammas(layers: dict[str, MaskedLinear]) -> dict[str, float]:
    """Return gamma of every ternary layer, as ``gamma/<layer>`` or ``gamma/<layer>/<split>``, in one transfer."""
    names, values = [], []
    for name, layer in layers.items():
        if isinstance(layer, SparseBitLinear):
            gamma = layer.ternary()[1]
            names += [f"gamma/{name}"] if len(gamma) == 1 else [f"gamma/{name}/{i}" for i in range(len(gamma))]
            values.append(gamma)
    return dict(zip(names, torch.cat(values).tolist(), strict=True)) if values else {}


def _sample(weight: Tensor) -> Tensor:
    """Return at most ``HISTOGRAM_SAMPLE`` weights, evenly spread over the rows that this rank holds."""
    flat = (weight.to_local() if isinstance(weight, DTensor) else weight).flatten()
    return flat[:: max(1, flat.numel() // HISTOGRAM_SAMPLE)]


def _write_counts(writer: Any, tag: str, values: Tensor, step: int) -> None:
    """Write a histogram of small integers with exactly one bucket for each integer."""
    low, high = int(values.min()), int(values.max())
    counts = torch.bincount((values.flatten() - low).long(), minlength=high - low + 1).cpu().double()
    integers = torch.arange(low, high + 1, dtype=torch.float64)
    writer.add_histogram_raw(
        tag,
        min=low,
        max=high,
        num=int(counts.sum()),
        sum=float((counts * integers).sum()),
        sum_squares=float((counts * integers**2).sum()),
        bucket_limits=(integers + 0.5).tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )
