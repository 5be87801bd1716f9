"""Runs that continue with other options, and runs whose ``global_step`` does not grow by one."""

from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule
from torch import nn

from sbn_lightning import (
    DenseToSparseRamp,
    MaskRefresh,
    SparsityPatternLogger,
    TernarySparseConversion,
    convert_linears,
)
from sbn_lightning.cli import main
from sbn_lightning.fabric.run import FabricRun
from sbn_lightning.formats import load_model
from sbn_lightning.layers.sparse_linear import masked_layers
from sbn_lightning.sparsity.pattern import nonzeros_per_group
from tests.cli.test_cli import RECIPE, error_of, fit, small
from tests.helpers import ForeignModule, quiet_trainer, regression_loader

RUN = Path("logs/sparse_pretrain/version_0/checkpoints")


@pytest.mark.parametrize("command", ["fit", "fabric"])
def test_another_pattern_makes_masks_anew(tokens, recwarn, command):
    """The new pattern may have another M. The recipe's ramp is on, and masks are frozen when the run continues."""
    more = ["--mask_refresh.freeze_after=1"]
    words = [command, "--config", str(RECIPE), *small(tokens, *more)]
    assert main(words) == 0
    path = str(next(Path("logs").rglob("last.ckpt")))
    options = ["--model.config.pattern=1:4", "--trainer.max_steps=4", "--ckpt_path", path, "--checkpoint.dirpath=new"]
    assert main([*words, *options]) == 0
    assert any("masks of the pattern 6:8, this run has 1:4" in str(warning.message) for warning in recwarn)
    model = load_model("new").model
    assert all(int(nonzeros_per_group(layer.mask, 4).max()) == 1 for _, layer in masked_layers(model))


def test_validation_is_of_the_pattern_that_is_asked_for(tokens, capsys):
    assert fit(tokens) == 0
    losses = []
    for pattern in ("6:8", "1:8"):
        options = [option for option in small(tokens) if "checkpoint" not in option]
        options += [f"--model.config.pattern={pattern}", f"--ckpt_path={RUN / 'last.ckpt'}"]
        capsys.readouterr()
        assert main(["validate", "--config", str(RECIPE), *options]) == 0
        losses.append(next(line for line in capsys.readouterr().out.splitlines() if "val/loss" in line))
    assert losses[0] != losses[1]


def test_another_shape_is_one_clear_line(tokens, capsys):
    assert fit(tokens) == 0
    error = error_of(capsys, fit(tokens, "--ckpt_path=last", "--model.config.d_model=64"))
    assert "the checkpoint is of another model: it has d_model=32, not 64" in error


def test_the_optimisers_options_are_the_checkpoints_and_a_warning_says_so(tokens, recwarn):
    assert fit(tokens, "--model.optimizer.init_args.lr=0.003") == 0
    assert not [warning for warning in recwarn if "goes on with the checkpoint's" in str(warning.message)]
    assert fit(tokens, "--ckpt_path=last", "--trainer.max_steps=3", "--model.optimizer.init_args.lr=0.001") == 0
    told = [str(warning.message) for warning in recwarn if "goes on with the checkpoint's" in str(warning.message)]
    assert len(told) == 1
    assert "lr=0.003, not 0.001" in told[0]


def test_the_newest_of_a_runs_last_checkpoints_is_the_one(tokens):
    """ModelCheckpoint writes last-v1.ckpt beside the last.ckpt of a run whose ModelCheckpoint had other options."""
    assert fit(tokens) == 0
    assert fit(tokens, "--ckpt_path=last", "--trainer.max_steps=3", "--checkpoint.every_n_train_steps=3") == 0
    assert (RUN / "last-v1.ckpt").is_file()
    for folder in ("logs/sparse_pretrain", RUN.parent, RUN):
        assert load_model(folder).path.name == "last-v1.ckpt"


def test_folders_that_are_no_checkpoint_say_what_they_are(tokens, capsys):
    assert fit(tokens) == 0
    error = error_of(capsys, fit(tokens, f"--ckpt_path={RUN.parent}"))
    assert f"is a folder of checkpoints, such as {RUN / 'last.ckpt'}" in error
    assert main(["export", "--checkpoint", str(RUN / "last.ckpt"), "--output", "packed"]) == 0
    assert "is a model to run" in error_of(capsys, fit(tokens, "--ckpt_path=packed"))


def test_a_converted_dense_model_keeps_the_recipes_callbacks(tokens, capsys):
    extra = Path("conversion.yaml")
    extra.write_text(
        "trainer: {callbacks: [{class_path: sbn_lightning.TernarySparseConversion, init_args: {pattern: '2:4'}}]}\n"
        "model: {config: {linear: dense}}\n"
    )
    assert main(["fit", "--config", str(RECIPE), "--config", str(extra), *small(tokens)]) == 0
    saved = torch.load(RUN / "last.ckpt", weights_only=True)["callbacks"]
    assert {"MaskRefresh", "SparsityPatternLogger", "DenseToSparseRamp"} <= {name.split("{")[0] for name in saved}


def test_training_by_epochs_needs_no_length_where_nothing_depends_on_it(tokens):
    options = ["--trainer.max_steps=-1", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    assert fit(tokens, *options, "--model.schedule=constant", "--weight_decay.until=null") == 0


class TwoOptimisers(LightningModule):
    """The second optimiser does not step in the first batch, so ``global_step`` is 1, 3, 5."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)
        convert_linears(self, "2:4")

    def training_step(self, batch, batch_idx):
        x, y = batch
        for i, (layer, optimizer) in enumerate(zip((self.a, self.b), self.optimizers(), strict=True)):
            if i == 0 or self.trainer.global_step > 0:
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(layer(x), y))
                if i == 0 or batch_idx > 0:
                    optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.AdamW(layer.parameters(), lr=1e-2) for layer in (self.a, self.b)]


def test_steps_that_jump_over_the_one_that_is_due():
    refresh, logger = MaskRefresh(interval=2), SparsityPatternLogger(interval=4)
    looks = []
    logger._look = lambda trainer, module: (
        looks.append(trainer.global_step) or setattr(logger, "_last_look", trainer.global_step)
    )
    logger.total = lambda: type("Counts", (), {"shares": lambda self: {"zeros": 0.0}})()
    quiet_trainer([refresh, logger], max_steps=13).fit(TwoOptimisers(), regression_loader())
    assert refresh.last_refresh == 13
    assert looks == [0, 5, 9, 13]


def test_conversion_in_a_fabric_loop_of_ones_own():
    module = ForeignModule()
    fabric = Fabric(accelerator="cpu", callbacks=[TernarySparseConversion("2:4"), DenseToSparseRamp("walk", end=1.0)])
    run = FabricRun(fabric, max_steps=4, module=module, optimizers=[])
    run.call("setup", stage="fit")
    module.configure_model()  # a module with configure_model is converted in that hook
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    run.optimizers = [optimizer]
    run.call("on_train_start")
    for batch in list(regression_loader())[:4]:
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
        run.global_step += 1
        run.call("on_train_batch_end", batch=batch)
    assert [layer.density for _, layer in masked_layers(module)] == [(2, 1.0), (2, 1.0)]
