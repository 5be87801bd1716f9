"""All access to Lightning's private state, but for ``distributed/stopping.py``, which replaces two of its methods.

Each function here exists because Lightning has no public name for its result. When a new version of Lightning breaks
one of them, this file is the place to look, and the docstring says what the function must return or do.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any, cast

from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from torch import nn


def is_optimizer_step(trainer: Trainer) -> bool:
    """Whether the present micro-batch ends with an optimiser step, as at the end of a window or of an epoch."""
    return not trainer.fit_loop._should_accumulate()


def batches_done_in_epoch(trainer: Trainer) -> int:
    """The number of micro-batches of the present epoch that training has seen. Those from before a resume count."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def batches_done_at_epoch_start(trainer: Trainer) -> int:
    """The number of micro-batches that the starting epoch has seen: none, unless a run resumes inside the epoch.

    In ``on_train_epoch_start`` Lightning still counts the batches of the epoch before, if there was one.
    """
    ended = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return 0 if ended else batches_done_in_epoch(trainer)


def is_compiled_module(module: nn.Module) -> bool:
    """Whether ``torch.compile`` was used on exactly this module, by the user or by Lightning."""
    return (
        module._compiled_call_impl is not None
        or hasattr(module, "_orig_mod")
        or (isinstance(module, LightningModule) and module._compiler_ctx is not None)
    )


def fit_loop_before_validation(trainer: Trainer) -> dict[str, Any]:
    """The state of the fit loop as it was in ``on_train_batch_end``, before the validation that starts.

    A run that continues from this state goes on with the next batch, without the validation. From a state inside the
    validation, Lightning would run the remaining number of validation batches, but from the first batch on, and log the
    mean over these batches.
    """
    state = deepcopy(trainer.fit_loop.state_dict())
    progress = state["epoch_loop.batch_progress"]
    for count in ("total", "current"):
        progress[count]["completed"] -= 1
    # The state of the validation loop is left out. Lightning then counts it from zero.
    return {key: value for key, value in state.items() if "val_loop" not in key}


def writes_shards(strategy: Any) -> bool:
    """Whether a strategy saves a checkpoint as a folder of shards."""
    return bool(getattr(strategy, "_save_distributed_checkpoint", False))


def checkpoint_io_of(strategy: Any) -> Any:
    """The plugin that a user gave a strategy for reading and writing checkpoints; None if there is none."""
    return getattr(strategy, "_checkpoint_io", None)


def last_saved(checkpoint_callback: Any) -> str:
    """The path of the checkpoint that a ``ModelCheckpoint`` saved last; empty if it has saved none."""
    return getattr(checkpoint_callback, "_last_checkpoint_saved", "")


def fabric_callbacks(fabric: Fabric) -> list[Any]:
    """The callbacks of a Fabric, as the list that Fabric itself calls."""
    return fabric._callbacks


def precision_of(run: Any) -> Any:
    """The precision plugin of a ``Trainer``, or of a run that has a Fabric."""
    return run.precision_plugin if isinstance(run, Trainer) else run.fabric._precision


def options_of_process_group(strategy: Any) -> dict[str, Any]:
    """How the ranks of a Trainer's ``DDPStrategy`` start and meet, as arguments of Fabric's ``DDPStrategy``."""
    return {
        "process_group_backend": strategy.process_group_backend,
        "timeout": strategy._timeout,
        "start_method": strategy._start_method,
    }


def options_of_ddp(strategy: Any) -> dict[str, Any]:
    """What a Trainer's ``DDPStrategy`` gives to torch's ``DistributedDataParallel``."""
    return dict(strategy._ddp_kwargs)


def has_comm_hook(strategy: Any) -> bool:
    """Whether a hook changes the gradients that a Trainer's ``DDPStrategy`` sends."""
    return strategy._ddp_comm_hook is not None


def take_next_version(logger: Any) -> None:
    """Make a logger choose a new version number, because another process already has the number that it chose."""
    logger._version = None


def keep_slurm_checkpoints_with_their_run(trainer: Trainer, folder: str | Path | None) -> None:
    """Stop Lightning's Slurm handler from mixing runs that share a current folder.

    Lightning saves ``hpc_ckpt_N.ckpt`` to ``default_root_dir`` when Slurm is about to stop the job. Any later run that
    starts there without ``ckpt_path`` continues from the file with the highest number. Here the file goes to the run's
    own folder of checkpoints, and a run without ``ckpt_path`` starts anew.

    Args:
        trainer: The trainer, before ``fit``.
        folder: The run's folder of checkpoints. None leaves the file in ``default_root_dir``.
    """
    connector = trainer._checkpoint_connector
    connector.__class__ = _OwnCheckpoints
    cast(_OwnCheckpoints, connector).folder = folder


class _OwnCheckpoints(_CheckpointConnector):
    folder: str | Path | None = None

    @property
    def _hpc_resume_path(self) -> None:  # type: ignore[override]
        return None

    def hpc_save_path(self, folderpath: Any) -> str:  # type: ignore[override]
        return super().hpc_save_path(folderpath if self.folder is None else str(self.folder))
