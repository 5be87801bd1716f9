"""How long training is: schedules span ``max_steps`` or ``max_epochs``, and a run that ends too early says so."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from sbn_lightning import (
    DenseToSparseRamp,
    MaskedWeightDecay,
    RoundingWarmup,
    TernarySparseConversion,
    WeightDecaySchedule,
)
from sbn_lightning.callbacks.base import RunCallback
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data import TokenDataModule, prepare
from sbn_lightning.fabric.loop import train as run
from sbn_lightning.fabric.run import FabricRun
from sbn_lightning.layers.masked_linear import masked_layers
from tests.helpers import ForeignModule, quiet_trainer, regression_loader, small_module, token_loader, unbounded

MAKE = {
    "ramp": lambda **options: DenseToSparseRamp("rows", end=0.9, **options),
    "rounding": lambda **options: RoundingWarmup(end=0.8, **options),
    "weight decay": lambda **options: WeightDecaySchedule(until=1.0, **options),
    "masked decay": lambda **options: MaskedWeightDecay(decay=1.0, until=0.7, **options),
}


class Shares(RunCallback):
    """Records what the schedules did to the first layer and to the optimiser, by step."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        layer = next(layer for _, layer in masked_layers(pl_module))
        decay = trainer.optimizers[0].param_groups[0]["weight_decay"]
        self.seen[trainer.global_step] = (layer.density, outputs["loss"].item(), decay, layer.mask.sum().item())


def train(module, data, resume=None, saving=True, options=None, **trainer_options):
    shares = Shares()
    callbacks = [*(make(**(options or {})) for make in MAKE.values()), shares]
    if saving:
        callbacks.append(ModelCheckpoint("saved", "{step}", every_n_train_steps=1, save_top_k=-1))
    if isinstance(module, ForeignModule):
        callbacks.insert(0, TernarySparseConversion("2:4"))
    trainer = quiet_trainer(callbacks, enable_checkpointing=saving, **({"max_steps": -1} | trainer_options))
    trainer.fit(module, data, ckpt_path=resume)
    return shares.seen, [parameter.detach().clone() for parameter in module.parameters()]


def test_schedules_span_the_epochs():
    """Eight batches, of which three make a step, are three steps in an epoch. A resumed run is the same to the bit."""
    x, y = next(iter(regression_loader()))
    loader = DataLoader(TensorDataset(x.repeat(8, 1), y.repeat(8, 1)), batch_size=len(x))  # All batches are equal.
    epochs = {"max_epochs": 2, "accumulate_grad_batches": 3}
    seen, weights = train(ForeignModule(), loader, **epochs)
    assert max(seen) == 6
    assert seen == train(ForeignModule(), loader, saving=False, options={"total_steps": 6}, **epochs)[0]
    for step in range(1, 6):
        again, found = train(ForeignModule(), loader, f"saved/step={step}.ckpt", saving=False, **epochs)
        assert all(seen[later] == values for later, values in again.items() if later > step)
        assert max(again) == 6
        assert all(torch.equal(one, other) for one, other in zip(found, weights, strict=True))


def test_the_fabric_loop_spans_the_epochs_too():
    """Eight batches and windows of three, twice: the Trainer and the loop give the same numbers."""
    found = []
    for loop in ("trainer", "fabric"):
        module, shares = small_module(pattern="2:4"), Shares()
        module.hparams["schedule"] = "constant"  # A schedule of the learning rate needs max_steps.
        callbacks = [*(make() for make in MAKE.values()), shares]
        options = {"max_epochs": 2, "accumulate_grad_batches": 3}
        if loop == "trainer":
            quiet_trainer(callbacks, max_steps=-1, **options).fit(module, token_loader())
        else:
            data = LightningDataModule.from_datasets(token_loader().dataset, token_loader().dataset, batch_size=4)
            data.train_dataloader = token_loader  # In the order of the Trainer.
            fabric = Fabric(accelerator="cpu", devices=1, callbacks=callbacks)
            run(FabricRun(fabric, **options, enable_progress_bar=False), module, data)
        found.append(shares.seen)
    assert max(found[0]) == 6
    assert found[0] == found[1]


def test_a_resumed_stream_knows_its_length():
    prepare("stdlib", "tokens", tokenizer="byte", max_bytes=20_000, val_fraction=0.1, num_workers=1)

    def data():
        return TokenDataModule("tokens", sequence_length=64, batch_size=32, num_workers=0)

    def module():
        made = small_module(pattern="2:4")
        made.hparams["schedule"] = "constant"  # A schedule of the learning rate needs max_steps.
        return made

    seen, weights = train(module(), data(), max_epochs=2, limit_val_batches=0)
    steps = max(seen)
    resume = f"saved/step={steps // 2 - 1}.ckpt"
    again, found = train(module(), data(), resume, saving=False, max_epochs=2, limit_val_batches=0)
    assert {step: seen[step] for step in again} == again
    assert max(again) == steps > 8
    assert all(torch.equal(one, other) for one, other in zip(found, weights, strict=True))


class ByHand(ForeignModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize("name", list(MAKE))
@pytest.mark.parametrize("case", ["stream", "by hand", "accumulation", "accumulation of the first epoch"])
def test_a_length_that_nobody_knows_is_an_error(name, case):
    loader = unbounded(list(regression_loader())) if case == "stream" else regression_loader()
    schedule = {"accumulation": {0: 1, 1: 2}, "accumulation of the first epoch": {0: 2}}.get(case)
    more = [GradientAccumulationScheduler(schedule)] if schedule else []
    callbacks = [TernarySparseConversion("2:4"), MAKE[name](), *more]
    module = ByHand() if case == "by hand" else ForeignModule()
    with pytest.raises(ConfigError, match=r"must know how long training is: set .*max_steps.*total_steps"):
        quiet_trainer(callbacks, max_steps=-1, max_epochs=2).fit(module, loader)


def warned(callback, **options):
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter("always")
        module = ForeignModule()
        quiet_trainer([TernarySparseConversion("2:4"), callback], **options).fit(module, regression_loader())
    return [str(one.message) for one in got if "training ended" in str(one.message)]


class Reverting(Callback):
    def on_train_end(self, trainer, pl_module):
        TernarySparseConversion.revert(pl_module)


@pytest.mark.parametrize("callback", [RoundingWarmup(end=0.5), DenseToSparseRamp("rows", end=0.5)])
def test_a_model_that_is_reverted_at_the_end_of_training(callback):
    module = ForeignModule()
    callbacks = [TernarySparseConversion("2:4"), Reverting(), callback]
    quiet_trainer(callbacks, max_steps=8).fit(module, regression_loader())
    assert not any(masked_layers(module))


def test_a_run_that_ends_before_its_warm_up_or_its_ramp_says_so_once():
    """An epoch has eight steps."""
    early = {"max_steps": 100, "max_epochs": 1}
    (message,) = warned(RoundingWarmup(end=0.5), **early)
    assert message.startswith("RoundingWarmup: training ended after 8 of 100 steps, at 16% of the rounding.")
    (message,) = warned(DenseToSparseRamp("rows", end=0.5), **early)
    assert message.startswith(
        "DenseToSparseRamp: training ended after 8 of 100 steps, at 16% of the ramp. 2 of 2 layers"
    )
    assert "not yet 2:4" in message
    assert "layer.set_density(2, 1.0)" in message
    (message,) = warned(DenseToSparseRamp("step", start=0.5), **early)
    assert "at 0% of the ramp" in message
    (message,) = warned(DenseToSparseRamp("layers", end=0.3), **early)
    assert "1 of 2 layers" in message
    for callback in (
        RoundingWarmup(end=0.5),
        DenseToSparseRamp("walk", end=1.0),
        DenseToSparseRamp(),
        RoundingWarmup(),
    ):
        assert warned(callback, max_steps=8) == []
    assert warned(RoundingWarmup(end=0.5, total_steps=100), fast_dev_run=True) == []
    assert warned(DenseToSparseRamp("rows", total_steps=100), fast_dev_run=True) == []
