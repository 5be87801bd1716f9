"""``sbn fabric``: which keys of a recipe it uses, and what it refuses."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from sbn_lightning import MaskRefresh, SparseBitNet, TokenDataModule
from sbn_lightning.cli import main
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.fabric.loop import FabricRun, train
from sbn_lightning.fabric.options import fabric_run
from tests.cli.test_cli import RECIPE, error_of, small
from tests.helpers import small_config


def fabric_command(tokens, *more):
    return main(["fabric", "--config", str(RECIPE), *small(tokens, *more)])


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sbn"])


def test_fabric_and_fit_take_the_same_recipe_and_continue_each_other(tokens, capsys):
    fit = ["fit", "--config", str(RECIPE)]
    assert fabric_command(tokens) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("Trained 2 steps", "val/perplexity", "gate_up", "checkpoint (last)"))
    assert main([*fit, *small(tokens)]) == 0
    folder = Path("logs/sparse_pretrain")
    ours, theirs = (torch.load(folder / f"version_{i}/checkpoints/last.ckpt", weights_only=True) for i in range(2))
    assert all(torch.equal(ours["state_dict"][key], theirs["state_dict"][key]) for key in theirs["state_dict"])
    assert set(ours) == set(theirs)
    assert ours["hyper_parameters"] == theirs["hyper_parameters"]
    ours, theirs = (yaml.safe_load((folder / f"version_{i}/config.yaml").read_text()) for i in range(2))
    assert ours == {key: value for key, value in theirs.items() if key != "weights_only"}  # an option that only fit has
    assert fabric_command(tokens, "--trainer.max_steps=3", "--ckpt_path=last") == 0
    assert main([*fit, *small(tokens, "--trainer.max_steps=4", "--ckpt_path=last")]) == 0
    last = folder / "version_1/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4
    capsys.readouterr()
    beyond = small(tokens, "--trainer.max_steps=3", "--ckpt_path=last")
    for command in ("fit", "fabric"):
        assert main([command, "--config", str(RECIPE), *beyond]) == 0
        assert "Nothing to do: the checkpoint is at step 4, and max_steps is 3." in capsys.readouterr().out
        assert torch.load(last, weights_only=True)["global_step"] == 4
    assert not list(folder.glob("**/*.tmp"))
    options = [option for option in small(tokens) if "checkpoint" not in option]
    checkpoint = str(folder / "version_0/checkpoints/last.ckpt")
    assert main(["validate", "--config", str(RECIPE), *options, "--ckpt_path", checkpoint]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.max_time=00:01:00:00"], "cannot honour trainer.max_time"),
        (
            ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss"],
            "EarlyStopping needs a Trainer",
        ),
        (["--mask_refresh.intervall=3"], "did you mean mask_refresh.interval?"),
    ],
)
def test_what_the_loop_cannot_honour_is_one_line(tokens, capsys, options, message):
    assert message in error_of(capsys, fabric_command(tokens, *options))


def test_fabric_run_launches_and_conflicts_are_one_line(tokens, capsys, monkeypatch):
    for name, value in {"CLI_USED": "1", "ACCELERATOR": "cpu", "DEVICES": "1", "NUM_NODES": "1"}.items():
        monkeypatch.setenv(f"LT_{name}", value)  # `fabric run` sets this
    assert fabric_command(tokens, "--trainer.max_steps=1") == 0
    assert "conflicts with the value `--devices=1`" in error_of(capsys, fabric_command(tokens, "--trainer.devices=2"))


def trainer_options(**changes):
    import inspect

    from lightning.pytorch import Trainer

    parameters = list(inspect.signature(Trainer.__init__).parameters.values())[1:]
    defaults = {parameter.name: parameter.default for parameter in parameters}
    return {**defaults, "accelerator": "cpu", "devices": 1, "logger": False, "callbacks": [], "max_steps": 1, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1}, "set trainer.max_steps or trainer.max_epochs"),
        ({"strategy": "deepspeed"}, "trainer.strategy=deepspeed"),
        ({"min_steps": 5}, "trainer.min_steps=5"),
        ({"overfit_batches": 2}, "trainer.overfit_batches=2"),
        ({"fast_dev_run": True}, "trainer.fast_dev_run=True"),
        ({"profiler": "simple"}, "trainer.profiler='simple'"),
        ({"val_check_interval": "00:00:10:00"}, "trainer.val_check_interval='00:00:10:00'"),
        ({"strategy": ModelParallelStrategy()}, "trainer.strategy=ModelParallelStrategy"),
        ({"plugins": [MixedPrecision("bf16-mixed", "cpu")]}, "MixedPrecision in trainer.plugins"),
    ],
)
def test_trainer_options_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        fabric_run(**trainer_options(**changes))


def test_trainer_options_that_are_taken():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strategy = DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True)
        checkpoints = ModelCheckpoint()
        run = fabric_run(
            **trainer_options(
                strategy=strategy,
                max_steps=-1,
                max_epochs=3,
                val_check_interval=0.5,
                precision="bf16-mixed",
                limit_test_batches=3,
                enable_checkpointing=False,
                callbacks=[checkpoints, MaskRefresh()],
            )
        )
    assert run.fabric.strategy._ddp_kwargs == {"gradient_as_bucket_view": True}
    assert run.fabric.strategy.process_group_backend == "gloo"
    assert (run.max_epochs, run.max_steps, run.val_check_interval) == (3, -1, 0.5)
    assert [type(callback) for callback in run.callbacks] == [MaskRefresh]
    with pytest.warns(UserWarning, match="without trainer.enable_model_summary"):
        fabric_run(**trainer_options(enable_model_summary=True))


@pytest.mark.parametrize(
    ("options", "callback", "message"),
    [
        ({}, EarlyStopping("val/loss"), "EarlyStopping needs a Trainer"),
        ({}, ModelCheckpoint(save_on_exception=True), "save_on_exception"),
        ({"check_val_every_n_epoch": None}, MaskRefresh(), "not the share 1.0"),
        ({"limit_train_batches": 0}, MaskRefresh(), "no training batches"),
        ({"val_check_interval": 10_000}, MaskRefresh(), "val_check_interval=10000 is more than"),
    ],
)
def test_the_loop_refuses_at_once(tokens, options, callback, message):
    data = TokenDataModule(str(tokens), batch_size=8, sequence_length=32, num_workers=0)
    run = FabricRun(Fabric(accelerator="cpu", devices=1, callbacks=[callback]), max_steps=1, **options)
    with pytest.raises(ConfigError, match=message):
        train(run, SparseBitNet(small_config(n_layers=1)), data)
    assert run.global_step == 0
