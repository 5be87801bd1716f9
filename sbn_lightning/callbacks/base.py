"""The base classes of the callbacks: one interface for two kinds of run, and one action for each optimiser step.

A callback here is a Lightning ``Callback`` that uses only a few attributes of its trainer. :data:`Run` is either a
``Trainer`` or a :class:`LoopRun`, which has these attributes under the same names. Hooks keep Lightning's names and
parameter names, so ``fabric.call(hook, trainer=run, pl_module=module, ...)`` can call them with keywords.

``on_train_batch_end`` fires for every micro-batch, but the optimiser steps only at the end of an accumulation window.
``trainer.global_step`` tells the two apart. When this hook fires, the weights are updated. Checkpoints and validation
come later, so both see the changes that a callback made. The decision of a callback at this hook is a pure function of
the step count, so a run that resumes at any step decides the same.

The order of callbacks does not matter. When training starts, every :class:`StepCallback` first puts its saved state
back (:meth:`StepCallback.restore`), and only then does the first of them act (:meth:`StepCallback.on_step`).
"""

from __future__ import annotations

from math import inf, isfinite
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from sbn_lightning.callbacks.lightning_internals import is_compiled_module, is_optimizer_step
from sbn_lightning.callbacks.weight_averaging import refuse_plain_averaging
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.masked_linear import MaskedLinear, masked_layers


class LoopRun(Protocol):
    """The attributes that a loop other than a ``Trainer`` must have, under the names that a ``Trainer`` uses.

    :class:`sbn_lightning.fabric.FabricRun` has them.
    """

    ckpt_path: Any
    max_steps: int
    global_step: int
    log_every_n_steps: int
    optimizers: list[Optimizer]
    callback_metrics: dict[str, Any]
    fast_dev_run: bool
    sanity_checking: bool
    fabric: Any

    @property
    def callbacks(self) -> list[Any]: ...
    @property
    def loggers(self) -> list[Any]: ...
    @property
    def logger(self) -> Any: ...
    @property
    def checkpoint_callback(self) -> Any: ...
    @property
    def world_size(self) -> int: ...
    @property
    def is_global_zero(self) -> bool: ...
    @property
    def strategy(self) -> Any: ...
    @property
    def is_step(self) -> bool: ...
    def show(self, name: str, value: float, *, logger: bool = True) -> None: ...
    def save_checkpoint(self, path: str | Path, weights_only: bool | None = False) -> None: ...


Run: TypeAlias = Trainer | LoopRun


def require_masked_layers(callback: Callback, module: nn.Module) -> dict[str, MaskedLinear]:
    """Return the masked layers of ``module`` by name.

    Args:
        callback: The callback that needs masked layers, for the message.
        module: The model.

    Raises:
        ConfigError: If the model has no masked layer. Training would be dense without anyone noticing.
    """
    layers = dict(masked_layers(module))
    if not layers:
        raise ConfigError(
            f"{type(callback).__name__} found no SparseBitLinear or SparseLinear in {type(module).__name__}; "
            "add the TernarySparseConversion callback, or build the model with these layers"
        )
    return layers


def schedule_length(callback: Callback, trainer: Run, total_steps: int | None) -> int:
    """Return the number of optimiser steps that a schedule spans.

    Callbacks ask when training starts, or later. Before that, Lightning would set up the data loaders early to answer,
    and a resumed loader would lose its position.

    Args:
        callback: The callback that has the schedule, for the message.
        trainer: The run. If ``total_steps`` is None, the length is its ``max_steps``, or else the steps in its
            ``max_epochs``.
        total_steps: The length that the user gave, or None.

    Raises:
        ConfigError: If nothing says how long training is.
    """
    steps = total_steps if total_steps is not None else trainer.max_steps
    if total_steps is None and steps < 1:
        steps = _steps_of_epochs(trainer)
    if steps < 1:
        raise ConfigError(
            f"{type(callback).__name__} must know how long training is: set the trainer's max_steps, "
            "or the callback's total_steps"
        )
    return steps


def warn_of_early_end(trainer: Run, warning: str | None) -> None:
    """Show what a schedule says of a training that ended before it, unless the run is a trial of a few batches."""
    if warning and not trainer.fast_dev_run:  # type: ignore[union-attr]
        rank_zero_warn(warning)


def _steps_of_epochs(trainer: Run) -> int:
    """The number of optimiser steps in all epochs of a run whose data loaders are set up; -1 if nobody knows.

    Nobody knows if the data or the epochs have no end, if a callback schedules the accumulation, if the module calls
    its optimisers by hand, or if a loop does not say.
    """
    if isinstance(trainer, Trainer):
        accumulation = [one for one in trainer.callbacks if isinstance(one, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
        # The scheduler sets the accumulation when an epoch starts. Callbacks ask before that.
        scheduled = any(set(one.scheduling.values()) != {1} for one in accumulation)
        if scheduled or not trainer.lightning_module.automatic_optimization or trainer.train_dataloader is None:
            return -1
    steps = getattr(trainer, "estimated_stepping_batches", inf)
    return int(steps) if isfinite(steps) else -1


def is_step(trainer: Run) -> bool:
    """Whether the present micro-batch ends with an optimiser step, as at the end of a window or of an epoch."""
    return is_optimizer_step(trainer) if isinstance(trainer, Trainer) else trainer.is_step


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` was used on a model or on a part of the model."""
    return any(map(is_compiled_module, model.modules()))


def show(trainer: Run, module: nn.Module, name: str, value: float, *, logger: bool = True) -> None:
    """Put a value in the progress bar, and in the logs unless ``logger`` is False."""
    if isinstance(trainer, Trainer):
        assert isinstance(module, LightningModule)
        # The value is a tensor on the CPU. Lightning would copy a number to the device, and the host would wait.
        module.log(name, torch.tensor(float(value)), prog_bar=True, logger=logger)
    else:
        trainer.show(name, value, logger=logger)


class RunCallback(Callback):
    """A Lightning callback that also works in the Fabric loop, because it uses only what a :data:`Run` has.

    Attributes:
        needs_masked_layers: Whether the command line leaves the callback out of a run whose model is dense.
    """

    needs_masked_layers = False


class StepCallback(RunCallback):
    """A callback whose :meth:`on_step` runs once before training and once after each optimiser step."""

    def __init__(self) -> None:
        self._seen = self._before = -1

    def restore(self, trainer: Run, module: nn.Module) -> None:
        """Put the state of a checkpoint back into the model, before any callback acts. May be called several times."""

    def on_step(self, trainer: Run, module: nn.Module, step: int) -> None:
        """Act on the model after ``step`` optimiser steps; ``step`` is ``trainer.global_step``."""
        raise NotImplementedError

    def on_train_start(self, trainer: Run, pl_module: nn.Module) -> None:
        """Restore all step callbacks of the run, then act for the first time."""
        callbacks = trainer.callbacks  # type: ignore[union-attr]
        refuse_plain_averaging(callbacks)
        for callback in callbacks:
            if isinstance(callback, StepCallback):
                callback.restore(trainer, pl_module)
        self._seen, self._before = trainer.global_step, trainer.global_step - 1
        self.on_step(trainer, pl_module, trainer.global_step)

    def on_train_batch_end(self, trainer: Run, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Act if the optimiser has stepped since the last call."""
        if trainer.global_step > self._seen:
            self._seen, self._before = trainer.global_step, self._seen
            self.on_step(trainer, pl_module, trainer.global_step)
