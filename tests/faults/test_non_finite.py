"""A NaN or infinite loss or weight is found, named and not saved; and what the check costs."""

import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric

from sbn_lightning import NonFiniteGuard, TokenDataModule
from sbn_lightning.callbacks import DurableCheckpoint
from sbn_lightning.callbacks.base import RunCallback
from sbn_lightning.callbacks.non_finite import NonFiniteError
from sbn_lightning.cli import main
from sbn_lightning.fabric.loop import FabricRun, train
from tests.callbacks.test_progress import Fetches
from tests.cli.test_cli import RECIPE, error_of, small
from tests.helpers import ForeignModule, quiet_trainer, regression_loader, small_module, token_loader

FOLDER = Path("logs/sparse_pretrain/version_0/checkpoints")


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sbn"])


class Poison(RunCallback):
    """Makes one weight NaN before step ``at``."""

    def __init__(self, name: str, at: int = 2):
        self.name, self.at = name, at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at:
            with torch.no_grad():
                dict(pl_module.named_parameters())[self.name].view(-1)[3] = float("nan")


@pytest.mark.parametrize("loop", ["fit", "fabric"])
def test_a_nan_stops_the_run_names_its_layer_and_keeps_the_last_checkpoint(tokens, capsys, loop):
    name = "model.blocks.0.mlp.down.weight"
    more = ["--trainer.callbacks+=tests.faults.test_non_finite.Poison", f"--trainer.callbacks.name={name}"]
    error = error_of(capsys, main([loop, "--config", str(RECIPE), *small(tokens, "--trainer.max_steps=6", *more)]))
    assert "the loss is NaN or infinite in optimiser step 3" in error
    assert "it begins in model.blocks.0.mlp.down: its weight is not finite" in error
    assert error.endswith(f"the last good checkpoint is {FOLDER}/last.ckpt")
    saved = torch.load(FOLDER / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values() if value.is_floating_point())


def test_an_activation_that_overflows_is_named_in_any_module():
    class Overflows(torch.nn.Module):
        def forward(self, x):
            return x.exp()

    module = ForeignModule()
    module.net = torch.nn.Sequential(torch.nn.Linear(16, 32), Overflows(), torch.nn.Linear(32, 8))
    module.net[0].bias.data += 1000
    with pytest.raises(
        NonFiniteError, match=r"begins in net\.1: its output is not finite, its parameters are; there is"
    ):
        quiet_trainer([NonFiniteGuard()]).fit(module, regression_loader())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """The guard looks at the loss too rarely to stop the run. Even so, the checkpoint must not be overwritten."""
    callbacks = [Poison("net.0.weight"), NonFiniteGuard(interval=100)]
    checkpoint = DurableCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    trainer = quiet_trainer([*callbacks, checkpoint], enable_checkpointing=True)
    with pytest.raises(NonFiniteError, match=r"net\.0\.weight is not finite after optimiser step 3: nothing is saved"):
        trainer.fit(ForeignModule(), regression_loader())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_look_now_and_then_finds_it_late_and_says_so():
    callbacks = [Poison("net.0.weight"), NonFiniteGuard(interval=5)]
    with pytest.raises(NonFiniteError, match=r"optimiser steps 1 and 5; .*set non_finite_guard\.interval to 1"):
        quiet_trainer(callbacks).fit(ForeignModule(), regression_loader())


class Hot(RunCallback):
    """Makes the values of one micro-batch, given by its number in the epoch, too large for float32."""

    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.at:
            batch[0].mul_(1e30)


# An epoch has 8 micro-batches in windows of 3, so the last window has 2.
@pytest.mark.parametrize(("at", "step"), [(0, 1), (1, 1), (2, 1), (4, 2), (6, 3), (7, 3)])
def test_a_nan_in_any_micro_batch_stops_its_step(at, step):
    module = ForeignModule()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = quiet_trainer([Hot(at), NonFiniteGuard(1)], accumulate_grad_batches=3)
    with pytest.raises(NonFiniteError, match=f"in optimiser step {step}; ") as error:
        trainer.fit(module, regression_loader())
    assert trainer.global_step == step - 1
    is_last_of_its_step = at in (2, 7)
    assert ("it came with an earlier micro-batch than the last" in str(error.value)) != is_last_of_its_step
    assert ("it is the loss itself" in str(error.value)) == is_last_of_its_step
    assert step > 1 or all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_hooks_exist_only_when_a_layer_is_looked_for():
    class Hooks(RunCallback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert not any(module._forward_hooks for module in pl_module.modules())

    quiet_trainer([NonFiniteGuard(), Hooks()]).fit(small_module(), token_loader())


@pytest.mark.parametrize("loop", ["trainer", "fabric"])
@pytest.mark.parametrize(("interval", "looks"), [(1, 4), (2, 2)])
def test_the_guard_fetches_once_a_step_it_looks_at(tokens, loop, interval, looks):
    """An epoch of 11 micro-batches has four steps: three of 3 micro-batches, and the last of 2."""
    fetches, guard, module = Fetches(), NonFiniteGuard(interval), small_module()
    options = {"max_steps": 4, "accumulate_grad_batches": 3, "limit_train_batches": 11}
    with fetches:
        if loop == "trainer":
            quiet_trainer([guard], **options).fit(module, token_loader(batches=12))
        else:
            run = FabricRun(Fabric(accelerator="cpu", devices=1, callbacks=[guard]), limit_val_batches=0, **options)
            train(run, module, TokenDataModule(str(tokens), batch_size=2, sequence_length=16, num_workers=0))
    assert sum("callbacks/non_finite.py" in place for place in fetches.places) == looks
