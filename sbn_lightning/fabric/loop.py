"""The same training on Lightning Fabric: a loop that reads from top to bottom, for people who want to own it.

:func:`train` is the whole loop. Copy the function and change what you like. On one process the loop gives the losses,
masks and weights of a ``Trainer`` with the same recipe to the last bit. Both can continue each other's checkpoints.

The callbacks are the Trainer's own, and they work in any other Fabric loop too. A :class:`FabricRun` takes the place of
the ``Trainer``: the callbacks read its attributes, and it calls their hooks::

    fabric = Fabric(callbacks=[MaskRefresh(interval=3), DenseToSparseRamp("walk")])
    run = FabricRun(fabric, max_steps=1000, module=module, optimizers=[optimizer])
    model, optimizer = fabric.setup(module, optimizer)
    run.call("on_train_start")
    for batch in batches:
        run.call("on_train_batch_start", batch=batch)
        optimizer.zero_grad()
        fabric.backward(model(batch))
        optimizer.step()
        run.global_step += 1
        run.call("on_train_batch_end", batch=batch)
    run.call("on_train_end")

``python cli.py fabric --config RECIPE`` trains a recipe, and so does ``fabric run cli.py fabric --config RECIPE``.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.single_device import SingleDeviceStrategy
from lightning.fabric.wrappers import _FabricModule, _FabricOptimizer
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from torch import Tensor
from tqdm import tqdm

from sbn_lightning.callbacks.base import RunCallback
from sbn_lightning.callbacks.conversion import TernarySparseConversion
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed.fabric_strategy import FabricShardedStrategy
from sbn_lightning.distributed.sharding import keep_masks_out_of_broadcasts
from sbn_lightning.fabric import checkpoint as fabric_checkpoint
from sbn_lightning.fabric.run import FabricRun
from sbn_lightning.training.module import Perplexity, SparseBitNet

__all__ = ["FabricRun", "evaluate", "train"]

# The callbacks that use no more of a Trainer than a FabricRun has.
WORK_ON_FABRIC = (RunCallback, TernarySparseConversion, ModelCheckpoint, SaveConfigCallback)


def train(run: FabricRun, module: SparseBitNet, data: LightningDataModule, ckpt_path: str | None = None) -> None:
    """Train ``module`` on ``data`` until ``run.max_steps`` or ``run.max_epochs``.

    Args:
        run: The settings of the run. It records the progress. Its Fabric must be launched.
        module: The module to train.
        data: The data module that makes the loaders. The loaders must have a length.
        ckpt_path: A checkpoint to continue from, of this loop or of a Trainer.

    Raises:
        ConfigError: If a setting, a callback or the checkpoint cannot work here.
    """
    fabric = run.fabric
    check(run)
    # The module and the data read max_steps, world_size and the like from their trainer.
    module.trainer = data.trainer = cast(Any, run)
    run.module, run.datamodule, run.ckpt_path = module, data, ckpt_path
    if fabric.local_rank == 0:
        data.prepare_data()
    fabric.barrier()
    data.setup("fit")
    module.check_data(data, "fit")  # The callbacks write into the run's folder. A refused run shall leave none.
    run.call("setup", stage="fit")
    module.setup("fit")
    module.configure_model()

    checkpoint = fabric_checkpoint.read(run, ckpt_path) if ckpt_path else None
    sharded = isinstance(fabric.strategy, FabricShardedStrategy)
    if sharded:
        # Sharding replaces the parameters, so the optimiser comes after it.
        model = fabric.setup_module(module.model)
    if checkpoint:
        fabric_checkpoint.restore_model(run, checkpoint)
    configured = cast(dict[str, Any], module.configure_optimizers())
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    run.optimizers, run.schedulers = [optimizer], [scheduler]
    if sharded:
        optimizer = fabric.setup_optimizers(optimizer)
    else:
        keep_masks_out_of_broadcasts(module.model)
        model, optimizer = fabric.setup(module.model, optimizer)
    model.mark_forward_method("loss")
    if module.distillation is not None or module.answers is not None:
        model.mark_forward_method("run")
    if checkpoint:
        fabric_checkpoint.restore_progress(run, checkpoint)
    train_loader, val_loader = data.train_dataloader(), data.val_dataloader()
    run.connect_loaders(train_loader, val_loader)
    if checkpoint:
        fabric_checkpoint.restore_position(run, checkpoint)
    del checkpoint  # Its tensors would stay in memory for the whole run.

    run.call("on_fit_start")
    run.log_hyperparameters()
    if not ckpt_path:  # An error in validation shows now, and not hours later.
        evaluate(fabric, module, val_loader, min(run.num_sanity_val_steps, run.num_val_batches))
    model.train()
    run.call("on_train_start")
    bar = tqdm(
        total=run.max_steps if run.max_steps > 0 else None,
        initial=run.global_step,
        unit="step",
        disable=not (run.enable_progress_bar and fabric.is_global_zero),
    )
    try:
        while not run.is_done:
            run.begin_epoch()
            run.call("on_train_epoch_start")
            first = run.batches_done
            for batch_idx, batch in enumerate(islice(train_loader, run.num_training_batches - first), start=first):
                run.begin_batch()
                batch = fabric.to_device(batch)
                run.call("on_train_batch_start", batch=batch, batch_idx=batch_idx)

                with fabric.no_backward_sync(model, enabled=not run.is_step):
                    # On a single device Fabric applies its precision to forward alone, not to a marked method.
                    with fabric.autocast():
                        loss, computed = module.compute_loss(model, batch)
                    share = loss / run.accumulate_grad_batches
                    if batch_idx % run.accumulate_grad_batches == 0:
                        run.call("on_before_zero_grad", optimizer=run.optimizers[0])
                        optimizer.zero_grad()
                    run.call("on_before_backward", loss=share)
                    fabric.backward(share, model=model)
                run.call("on_after_backward")
                metrics = computed | {"learning_rate": optimizer.param_groups[0]["lr"]}
                run.callback_metrics |= metrics
                if run.is_step:
                    run.call("on_before_optimizer_step", optimizer=run.optimizers[0])
                    clip_gradients(run, model, optimizer)
                    optimizer.step()
                    scheduler.step()
                    run.global_step += 1
                    bar.update()
                run.call("on_train_batch_end", outputs={"loss": share.detach()}, batch=batch, batch_idx=batch_idx)

                if run.is_step and run.global_step % run.log_every_n_steps == 0:
                    run.log(metrics | run.to_log)
                    shown = {key: f"{float(value):.4g}" for key, value in (run.in_bar | metrics).items()}
                    bar.set_postfix(shown, refresh=False)
                if run.validation_is_due:
                    if run.is_step:  # Gradients would take memory during the validation.
                        optimizer.zero_grad()
                    run.call("on_validation_start")
                    run.call("on_validation_epoch_start")
                    results = evaluate(fabric, module, val_loader, run.num_val_batches)
                    run.has_validated = True
                    run.callback_metrics |= results
                    run.in_bar |= results
                    run.log(results)
                    run.call("on_validation_epoch_end")
                    run.call("on_validation_end")
                if run.is_done:
                    break
            else:
                run.end_epoch()
            run.call("on_train_epoch_end")
        run.call("on_train_end")
        bar.close()
        run.call("on_fit_end")
        for logger in run.loggers:
            logger.finalize("success")
    except BaseException as error:
        run.call("on_exception", exception=error)
        raise
    finally:
        bar.close()
        run.call("teardown", stage="fit")
        module.teardown("fit")


@torch.no_grad()
def evaluate(fabric: Fabric, module: SparseBitNet, loader: Iterable[Tensor], batches: int) -> dict[str, Tensor]:
    """Return ``val/loss`` (a mean over sequences) and ``val/perplexity``.

    Args:
        fabric: The Fabric of the run.
        module: The module to evaluate.
        loader: The loader of batches, int64 ``[batch, sequence_length + 1]``.
        batches: The number of batches that each rank takes.
    """
    if batches == 0:
        return {}
    perplexity = Perplexity().to(fabric.device)
    loss_sum, weights = torch.zeros(2, device=fabric.device)
    module.model.eval()
    for batch in islice(loader, batches):
        batch = fabric.to_device(batch)
        with fabric.autocast():
            loss, tokens, weight = module.held_out_loss(batch)
        perplexity.update(loss, tokens)
        loss_sum, weights = loss_sum + loss * weight, weights + weight
    module.model.train()
    loss_sum, weights = fabric.all_reduce(torch.stack([loss_sum, weights]), reduce_op="sum")
    return {"val/loss": loss_sum / weights, "val/perplexity": perplexity.compute()}


def check(run: FabricRun) -> None:
    """Refuse what cannot work before the training starts.

    Raises:
        ConfigError: If strategy, a callback or a setting does not fit the loop.
    """
    strategy = run.fabric.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, FabricShardedStrategy)):
        raise ConfigError(
            f"the Fabric loop trains on one device, with DDP or with sbn_fsdp2, not with {type(strategy).__name__}; "
            "use `fit`"
        )
    for callback in run.callbacks:
        if isinstance(callback, Callback) and not isinstance(callback, WORK_ON_FABRIC):
            raise ConfigError(
                f"{type(callback).__name__} needs a Trainer, the Fabric loop has none: leave it out, or use `fit`; one "
                "of your own may derive from sbn_lightning.callbacks.base.RunCallback if a FabricRun has what it asks"
            )
        if isinstance(callback, ModelCheckpoint) and callback.save_on_exception:
            raise ConfigError(
                "ModelCheckpoint: save_on_exception=True would save in the middle of a step; set it to false"
            )
    if run.check_val_every_n_epoch is None and isinstance(run.val_check_interval, float):
        raise ConfigError(
            "check_val_every_n_epoch=null needs a number of batches in val_check_interval, not the share "
            f"{run.val_check_interval}"
        )


def clip_gradients(run: FabricRun, model: _FabricModule, optimizer: _FabricOptimizer) -> None:
    """Clip gradients by norm or by value, as ``run`` says."""
    if run.gradient_clip_val and run.gradient_clip_algorithm == "value":
        run.fabric.clip_gradients(model, optimizer, clip_val=run.gradient_clip_val)
    elif run.gradient_clip_val:
        run.fabric.clip_gradients(model, optimizer, max_norm=run.gradient_clip_val, error_if_nonfinite=False)
