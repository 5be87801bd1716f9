"""``RunState``: settings and progress of a run on Fabric, under the names that a ``Trainer`` has for them.

:class:`~sbn_lightning.fabric.run.FabricRun` adds the writing of checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from types import SimpleNamespace
from typing import Any, Literal, cast

from lightning.fabric import Fabric
from lightning.fabric.loggers.csv_logs import CSVLogger
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer

from sbn_lightning.callbacks.lightning_internals import fabric_callbacks
from sbn_lightning.core.errors import ConfigError


@dataclass(eq=False)
class RunState:
    """Settings and progress; the arguments and attributes are described at :class:`FabricRun`."""

    fabric: Fabric
    max_steps: int = -1
    max_epochs: int = -1
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    val_check_interval: int | float = 1.0
    check_val_every_n_epoch: int | None = 1
    num_sanity_val_steps: int = 2
    log_every_n_steps: int = 50
    enable_progress_bar: bool = True
    enable_autolog_hparams: bool = True
    default_root_dir: str = "."
    module: nn.Module | None = None
    optimizers: list[Optimizer] = field(default_factory=list)

    schedulers: list[Any] = field(default_factory=list, init=False)
    datamodule: LightningDataModule | None = field(default=None, init=False)
    ckpt_path: str | None = field(default=None, init=False)
    global_step: int = field(default=0, init=False)
    current_epoch: int = field(default=0, init=False)
    batches_done: int = field(default=0, init=False)
    total_batches: int = field(default=0, init=False)
    num_training_batches: int = field(default=0, init=False)
    num_val_batches: int = field(default=0, init=False)
    has_validated: bool = field(default=False, init=False)
    callback_metrics: dict[str, Any] = field(default_factory=dict, init=False)
    in_bar: dict[str, Any] = field(default_factory=dict, init=False)
    to_log: dict[str, Any] = field(default_factory=dict, init=False)
    train_loader: Any = field(default=None, init=False)

    # Lightning's own callbacks read these attributes too.
    fast_dev_run = False
    sanity_checking = False
    reload_dataloaders_every_n_epochs = 0
    state = SimpleNamespace(fn=TrainerFn.FITTING)

    def __post_init__(self) -> None:
        # Checkpoints come last, as in a Trainer, so that they see what every other callback did at the same hook.
        self.callbacks.sort(key=lambda callback: isinstance(callback, Checkpoint))

    @property
    def callbacks(self) -> list[Any]:
        """The callbacks of the run."""
        return fabric_callbacks(self.fabric)

    @property
    def loggers(self) -> list[Logger]:
        return self.fabric.loggers

    @property
    def logger(self) -> Logger | None:
        return self.loggers[0] if self.loggers else None

    @property
    def checkpoint_callback(self) -> Checkpoint | None:
        return next((callback for callback in self.callbacks if isinstance(callback, Checkpoint)), None)

    @property
    def world_size(self) -> int:
        return self.fabric.world_size

    @property
    def local_rank(self) -> int:
        return self.fabric.local_rank

    @property
    def is_global_zero(self) -> bool:
        return self.fabric.is_global_zero

    @property
    def strategy(self) -> _Strategy:
        return _Strategy(self.fabric)

    @property
    def enable_validation(self) -> bool:
        return self.num_val_batches > 0

    @property
    def fit_loop(self) -> Any:
        """The two values that ``ModelCheckpoint`` looks up in a Trainer's loops."""
        progress = SimpleNamespace(is_last_batch=self.is_last_batch)
        validation = SimpleNamespace(_has_run=self.has_validated)
        return SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress, val_loop=validation))

    @property
    def log_dir(self) -> str | None:
        logger = cast(Any, self.logger)
        if logger is None:
            return self.default_root_dir
        return logger.log_dir if isinstance(logger, (TensorBoardLogger, CSVLogger)) else logger.save_dir

    def call(self, hook: str, **keywords: Any) -> None:
        """Call a hook of every callback, with the keywords that the hook takes.

        Lightning's callbacks need all arguments of a hook. An argument that is not given is None here.

        Args:
            hook: The name of the hook, such as ``"on_train_batch_end"``.
            **keywords: The arguments of the hook besides ``trainer`` and ``pl_module``.
        """
        defaults = {"outputs": None, "batch": None, "batch_idx": None}
        self.fabric.call(hook, **(defaults | {"trainer": self, "pl_module": self.module} | keywords))

    def show(self, name: str, value: float, *, logger: bool = True) -> None:
        """Put a callback's value in the progress bar, and in the logs unless ``logger`` is False."""
        self.in_bar[name] = value
        if logger:
            self.to_log[name] = value

    def log(self, metrics: dict[str, Any]) -> None:
        """Log metrics under the number, from 0, of the optimiser step under way, as a Trainer does."""
        if metrics:
            self.fabric.log_dict(metrics | {"epoch": self.current_epoch}, step=self.steps_before_this_batch())
            for logger in self.loggers:
                logger.save()

    def log_hyperparameters(self) -> None:
        """Log the module's hyperparameters."""
        if self.enable_autolog_hparams and isinstance(self.module, LightningModule):
            hparams = {key: value for key, value in self.module.hparams.items() if key != "_instantiator"}
            for logger in self.loggers:
                logger.log_hyperparams(hparams)
                logger.save()

    # Progress.

    @property
    def is_last_batch(self) -> bool:
        """Whether the micro-batch under way is the last of its epoch."""
        return self.batches_done == self.num_training_batches

    @property
    def is_step(self) -> bool:
        """Whether the optimiser steps after this micro-batch, the last of an accumulation or of an epoch."""
        return self.batches_done % self.accumulate_grad_batches == 0 or self.is_last_batch

    @property
    def is_done(self) -> bool:
        epochs = self.current_epoch + (self.is_last_batch and self.batches_done > 0)
        return 0 <= self.max_steps <= self.global_step or 0 <= self.max_epochs <= epochs

    @property
    def estimated_stepping_batches(self) -> float:
        """The number of optimiser steps in ``max_epochs``; infinite if the epochs or the loader are not known."""
        if self.max_epochs < 0 or self.num_training_batches == 0:
            return inf
        return -(-self.num_training_batches // self.accumulate_grad_batches) * self.max_epochs

    @property
    def validation_is_due(self) -> bool:
        """Whether to validate after this micro-batch."""
        every = self.val_check_interval
        if isinstance(every, float):
            every = max(1, int(self.num_training_batches * every))
        if self.num_val_batches == 0:
            return False
        if self.check_val_every_n_epoch is None:
            return self.total_batches % every == 0
        return (self.current_epoch + 1) % self.check_val_every_n_epoch == 0 and self.batches_done % every == 0

    def begin_epoch(self) -> None:
        """Go on to the next epoch, unless a resumed run is still inside the present one."""
        if self.batches_done == self.num_training_batches:
            self.current_epoch, self.batches_done = self.current_epoch + 1, 0

    def end_epoch(self) -> None:
        """End the epoch, even if the loader had fewer batches than its length says."""
        self.batches_done = self.num_training_batches

    def begin_batch(self) -> None:
        """Count a micro-batch."""
        self.batches_done, self.total_batches = self.batches_done + 1, self.total_batches + 1

    def steps_before_this_batch(self) -> int:
        """Return the number of optimiser steps done before the micro-batch under way."""
        return self.global_step - (self.is_step and self.global_step > 0)

    # Data.

    def connect_loaders(self, train_loader: Any, val_loader: Any) -> None:
        """Take over the loaders, and compute the lengths of an epoch and of a validation from their lengths.

        Args:
            train_loader: The loader of training batches; it has a length.
            val_loader: The loader of validation batches; None or an empty list if there is no validation.

        Raises:
            ConfigError: If the limits and the lengths do not fit together.
        """
        self.train_loader = train_loader
        self.num_training_batches = _limited(len(train_loader), self.limit_train_batches)
        self.num_val_batches = _limited(len(val_loader), self.limit_val_batches) if val_loader else 0
        if self.num_training_batches == 0:
            raise ConfigError(f"no training batches: limit_train_batches={self.limit_train_batches}")
        if self.num_sanity_val_steps < 0:
            self.num_sanity_val_steps = self.num_val_batches
        every = self.val_check_interval
        never = isinstance(every, int) and every > self.num_training_batches
        if never and self.check_val_every_n_epoch and self.num_val_batches:
            raise ConfigError(
                f"val_check_interval={every} is more than the {self.num_training_batches} batches of an epoch; "
                "with check_val_every_n_epoch=null it counts across epochs"
            )


class _Strategy:
    """The methods of a Trainer's strategy that Lightning's callbacks call."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return self._fabric.broadcast(obj, src)

    def barrier(self, name: str | None = None) -> None:
        self._fabric.barrier(name)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return self._fabric.strategy.reduce_boolean_decision(decision, all)

    def remove_checkpoint(self, path: str) -> None:
        if self._fabric.is_global_zero:
            self._fabric.strategy.checkpoint_io.remove_checkpoint(path)


def _limited(batches: int, limit: int | float | None) -> int:
    """Return ``batches`` under a limit: a number, a share, or None for no limit."""
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
