"""Checkpoints of the Fabric loop, in the Trainer's format.

Both loops write the Trainer's format, because other tools read it too. Every checkpoint has the progress that a Trainer
has in ``on_train_batch_end``, no matter when it is saved: the micro-batch counts as done, and the validation after the
micro-batch does not. A Trainer continues from there with the next micro-batch.
"""

from __future__ import annotations

from typing import Any, cast

import lightning
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_warn

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.distributed.fabric_strategy import FabricShardedStrategy
from sbn_lightning.distributed.optimizer_states import name_optimizer_states
from sbn_lightning.distributed.strategies import check_checkpoint
from sbn_lightning.distributed.whole_states import (
    load_optimizer_state,
    load_weights,
    whole_optimizer_state,
    whole_weights,
)
from sbn_lightning.fabric.state import RunState


def dump(run: RunState, weights_only: bool) -> dict[str, Any]:
    """Return the checkpoint of a run as it is now.

    Args:
        run: The run.
        weights_only: Whether to leave out what training needs besides the weights.
    """
    module = run.module
    assert isinstance(module, LightningModule)
    checkpoint: dict[str, Any] = {
        "epoch": run.current_epoch,
        "global_step": run.global_step,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": whole_weights(module) if module_is_sharded(run) else module.state_dict(),
        "loops": {"fit_loop": _loops(run), "validate_loop": {}, "test_loop": {}, "predict_loop": {}},
    }
    if not weights_only:
        states = {_state_key(c): c.state_dict() for c in run.callbacks if hasattr(c, "state_dict")}
        checkpoint["callbacks"] = {key: state for key, state in states.items() if state}
        checkpoint["optimizer_states"] = [
            whole_optimizer_state(module, optimizer) if module_is_sharded(run) else optimizer.state_dict()
            for optimizer in run.optimizers
        ]
        name_optimizer_states(checkpoint["optimizer_states"], module, run.optimizers)
        checkpoint["lr_schedulers"] = [scheduler.state_dict() for scheduler in run.schedulers]
        precision = run.fabric.strategy.precision
        if state := precision.state_dict():
            checkpoint[type(precision).__qualname__] = state
    for part in (module, run.datamodule):
        if part is not None and part.hparams:
            checkpoint[part.CHECKPOINT_HYPER_PARAMS_KEY] = dict(part.hparams)
            checkpoint[part.CHECKPOINT_HYPER_PARAMS_NAME] = cast(Any, part)._hparams_name
    if run.datamodule is not None and (state := run.datamodule.state_dict()):
        checkpoint[type(run.datamodule).__qualname__] = state
    run.call("on_save_checkpoint", checkpoint=checkpoint)
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def _loops(run: RunState) -> dict[str, Any]:
    """Return a Trainer's fit loop state in ``on_train_batch_end``. Lightning counts missing entries from zero."""

    def batches(n: int) -> dict[str, int]:
        return {"ready": n, "started": n, "processed": n, "completed": max(n - 1, 0)}

    def done(n: int) -> dict[str, int]:
        return {"ready": n, "started": n, "completed": n}

    in_epoch = -(-run.batches_done // run.accumulate_grad_batches)
    steps = {"total": done(run.global_step), "current": done(in_epoch)}
    epoch = {"ready": run.current_epoch + 1, "started": run.current_epoch + 1}
    epoch |= {"processed": run.current_epoch, "completed": run.current_epoch}
    loader = run.train_loader
    return {
        "state_dict": {"combined_loader": [loader.state_dict()]} if hasattr(loader, "state_dict") else {},
        "epoch_progress": {"total": epoch, "current": epoch},
        "epoch_loop.state_dict": {"_batches_that_stepped": run.steps_before_this_batch()},
        "epoch_loop.batch_progress": {
            "total": batches(run.total_batches),
            "current": batches(run.batches_done),
            "is_last_batch": run.is_last_batch,
        },
        "epoch_loop.scheduler_progress": steps,
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": steps, "zero_grad": steps}},
    }


def read(run: RunState, path: str) -> dict[str, Any]:
    """Read a checkpoint, of this loop or of a Trainer, for the three functions that restore from it.

    Args:
        run: The run that continues.
        path: The checkpoint.

    Raises:
        ConfigError: If the checkpoint holds no training to continue.
        DataError: If the checkpoint cannot be read.
    """
    check_checkpoint(path, run.fabric.strategy)
    try:
        load = run.fabric.strategy.checkpoint_io.load_checkpoint
        checkpoint: dict[str, Any] = load(path, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except Exception as error:  # A damaged file can make torch raise anything.
        raise DataError(f"{path} is damaged or no checkpoint: {str(error).splitlines()[0]}") from error
    missing = {"state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers"} - set(checkpoint)
    if missing:
        raise ConfigError(f"{path} has no {', '.join(sorted(missing))}: it holds weights, no training to continue")
    return checkpoint


def restore_model(run: RunState, checkpoint: dict[str, Any]) -> None:
    """Load the weights and the states of callbacks and data."""
    module = run.module
    assert isinstance(module, LightningModule)
    module.on_load_checkpoint(checkpoint)
    if module_is_sharded(run):
        load_weights(module, checkpoint["state_dict"])
    else:
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    states = checkpoint["callbacks"]
    lost = set(states) - {_state_key(callback) for callback in run.callbacks}
    if lost:
        rank_zero_warn(f"the checkpoint has states of callbacks that this run lacks: {', '.join(sorted(lost))}")
    run.call("on_load_checkpoint", checkpoint=checkpoint)
    for callback in run.callbacks:
        if state := states.get(_state_key(callback)):
            callback.load_state_dict(state)
    if run.datamodule is not None and (state := checkpoint.get(type(run.datamodule).__qualname__)):
        run.datamodule.load_state_dict(state)


def restore_progress(run: RunState, checkpoint: dict[str, Any]) -> None:
    """Load the optimiser, the schedule and the counters."""
    for optimizer, state in zip(run.optimizers, checkpoint["optimizer_states"], strict=True):
        if module_is_sharded(run):
            assert run.module is not None
            load_optimizer_state(run.module, optimizer, state)
        else:
            optimizer.load_state_dict(state)
    for scheduler, state in zip(run.schedulers, checkpoint["lr_schedulers"], strict=True):
        scheduler.load_state_dict(state)
    precision = run.fabric.strategy.precision
    if state := checkpoint.get(type(precision).__qualname__):
        precision.load_state_dict(state)
    loops = checkpoint["loops"]["fit_loop"]
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    batches = loops["epoch_loop.batch_progress"]
    run.global_step = steps["total"]["completed"]
    run.current_epoch = max(loops["epoch_progress"]["current"]["started"] - 1, 0)
    run.batches_done, run.total_batches = batches["current"]["ready"], batches["total"]["ready"]


def restore_position(run: RunState, checkpoint: dict[str, Any]) -> None:
    """Bring the training loader to the position in the checkpoint.

    Raises:
        ConfigError: If training cannot continue from that position.
    """
    loader = run.train_loader
    loops = checkpoint["loops"]["fit_loop"]
    if loops["epoch_loop.batch_progress"]["is_last_batch"] or run.batches_done > run.num_training_batches:
        run.batches_done = run.num_training_batches
    if not run.is_step:
        raise ConfigError(
            f"{run.ckpt_path} was saved after micro-batch {run.batches_done} of its epoch, inside a window of "
            f"accumulate_grad_batches={run.accumulate_grad_batches}; gradients are not in a checkpoint: continue "
            "from one saved by every_n_train_steps"
        )
    states = loops["state_dict"].get("combined_loader")
    if run.datamodule is None or type(run.datamodule).__qualname__ not in checkpoint:
        if states and hasattr(loader, "load_state_dict"):
            loader.load_state_dict(states[0])
        elif not run.is_last_batch:
            raise ConfigError(
                f"{run.ckpt_path} ends inside an epoch and has no position in the data of {type(loader).__name__}"
            )


def module_is_sharded(run: RunState) -> bool:
    """Whether the ranks of a run share weights and optimiser states."""
    return isinstance(run.fabric.strategy, FabricShardedStrategy)


def _state_key(callback: Any) -> str:
    """Return the key of a callback's state in a checkpoint. Fabric also takes objects that are not a ``Callback``."""
    return callback.state_key if isinstance(callback, Callback) else type(callback).__qualname__
