import itertools

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging

from sbn_lightning import DenseToSparseRamp, MaskRefresh, NMPattern, TernarySparseConversion
from sbn_lightning.callbacks.weight_averaging import SparseEMAWeightAveraging, SparseWeightAveraging
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.sparse_linear import masked_layers
from sbn_lightning.sparsity.pattern import top_n_mask, unpack_mask
from tests.helpers import ForeignModule, quiet_trainer, regression_loader

DECAY = 0.8


class Validated(ForeignModule):
    """A module with a validation step, and with a buffer to average."""

    def configure_model(self):
        super().configure_model()
        if not hasattr(self, "running"):
            self.register_buffer("running", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.running.add_(1)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val", super().training_step(batch, batch_idx))


class Witness(Callback):
    """Computes the average itself, and compares it with the weights that validation and training see."""

    def __init__(self):
        self.average, self.seen, self.training_masks = None, 0, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.training_masks.append(pl_module.net[0].mask)
        if self.seen > 0:
            assert torch.equal(pl_module.net[0].weight, self.current)
            self.check_codes(pl_module.net[0])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.current = pl_module.net[0].weight.detach().clone()
        self.average = self.current if self.average is None else DECAY * self.average + (1 - DECAY) * self.current

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.check(pl_module.net[0])
        assert not torch.equal(pl_module.net[0].weight, self.current)
        self.seen += 1

    def check(self, layer):
        torch.testing.assert_close(layer.weight, self.average)
        assert torch.equal(layer.mask, top_n_mask(layer.weight, NMPattern(2, 4)))
        self.check_codes(layer)

    @staticmethod
    def check_codes(layer):
        large = layer.weight.abs() > layer.weight.abs().mean() / 2  # weights that round to 1 or -1
        assert torch.equal(layer.values() != 0, large & layer.mask)


def fit(callbacks, module=None, **options):
    module = Validated() if module is None else module
    options = {"max_steps": 10, "val_check_interval": 3, "check_val_every_n_epoch": None} | options
    trainer = quiet_trainer(callbacks, **options)
    trainer.fit(
        module, regression_loader(batch_size=64), regression_loader(1, batch_size=64), options.pop("ckpt_path", None)
    )
    return trainer


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("in_configure_model", [True, False])
@pytest.mark.parametrize("ema_first", [True, False])
def test_masks_and_codes_follow_the_averaged_weights(use_buffers, in_configure_model, ema_first):
    witness = Witness()
    callbacks = [TernarySparseConversion("2:4"), SparseEMAWeightAveraging(decay=DECAY, use_buffers=use_buffers)]
    module = Validated(in_configure_model)
    fit([*(callbacks[::-1] if ema_first else callbacks), witness], module)
    assert witness.seen == 3
    witness.check(module.net[0])
    assert (module.running == 10) is not use_buffers


def test_held_masks_of_training_survive_validation():
    witness = Witness()
    ema = SparseEMAWeightAveraging(decay=DECAY)
    fit([TernarySparseConversion("2:4"), MaskRefresh(interval=4), ema, witness])
    masks = witness.training_masks
    assert [torch.equal(a, b) for a, b in itertools.pairwise(masks)] == [i % 4 != 3 for i in range(9)]


def test_the_average_has_the_density_of_the_ramp():
    kept = []

    class Density(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kept.append(pl_module.net[0].mask.float().mean().item())

    fit([TernarySparseConversion("2:4"), DenseToSparseRamp("walk", end=0.6), SparseWeightAveraging(), Density()])
    assert kept == [0.75, 0.5, 0.5]


def test_a_second_run_has_an_average_of_its_own():
    averages = []
    for callback in (ema := SparseEMAWeightAveraging(decay=DECAY), ema, SparseEMAWeightAveraging(decay=DECAY)):
        module = Validated()
        with torch.no_grad():
            module.net[0].weight.mul_(len(averages) + 1 if len(averages) < 2 else 2)
        fit([callback, TernarySparseConversion("2:4")], module)
        averages.append(module.net[0].weight)
    assert not torch.equal(averages[0], averages[1])
    assert torch.equal(averages[1], averages[2])


def test_a_run_with_ema_resumes_exactly():
    def run(steps, ckpt_path=None):
        callbacks = [TernarySparseConversion("2:4"), MaskRefresh(interval=4), SparseEMAWeightAveraging(decay=DECAY)]
        module = Validated()
        trainer = quiet_trainer(callbacks, max_steps=steps, limit_val_batches=0)
        trainer.fit(module, regression_loader(batch_size=64), ckpt_path=ckpt_path)
        return trainer, module

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 6:
                trainer.save_checkpoint("6.ckpt")

    _, straight = run(11)
    callbacks = [TernarySparseConversion("2:4"), MaskRefresh(interval=4), SparseEMAWeightAveraging(decay=DECAY), Save()]
    quiet_trainer(callbacks, max_steps=11).fit(Validated(), regression_loader(batch_size=64))
    saved = torch.load("6.ckpt", weights_only=True)
    assert not torch.equal(saved["state_dict"]["net.0.weight"], saved["current_model_state"]["net.0.weight"])
    _, resumed = run(11, "6.ckpt")
    expected = straight.state_dict()
    assert all(torch.equal(expected[key], value) for key, value in resumed.state_dict().items())


def test_a_checkpoint_from_within_validation_is_not_mixed_up():
    module, witness = Validated(), Witness()

    class Save(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint("val.ckpt")

    ema = SparseEMAWeightAveraging(decay=DECAY)
    fit([TernarySparseConversion("2:4"), MaskRefresh(interval=4), ema, witness, Save()], module, max_steps=3)
    saved = torch.load("val.ckpt", weights_only=True)
    torch.testing.assert_close(saved["state_dict"]["net.0.weight"], witness.average)
    assert torch.equal(saved["current_model_state"]["net.0.weight"], witness.current)
    training_mask = unpack_mask(saved["current_model_state"]["net.0.mask_bits"], 16)
    assert torch.equal(training_mask, witness.training_masks[-1])
    assert not torch.equal(training_mask, top_n_mask(witness.current, NMPattern(2, 4)))


def test_a_saved_average_loads_as_a_plain_model():
    trained, again = Validated(), Validated()
    fit([TernarySparseConversion("2:4"), SparseEMAWeightAveraging(decay=DECAY)], trained).save_checkpoint(
        "average.ckpt"
    )
    loader = regression_loader(1, batch_size=64)
    tester = quiet_trainer([TernarySparseConversion("2:4")])
    loaded = tester.validate(again, loader, ckpt_path="average.ckpt", verbose=False)
    assert loaded == quiet_trainer().validate(trained, loader, verbose=False)
    assert dict(masked_layers(again))["net.0"].mask.float().mean() == 0.5


@pytest.mark.parametrize(
    ("callback", "name"),
    [(EMAWeightAveraging(), "SparseEMAWeightAveraging"), (WeightAveraging(use_buffers=False), "SparseWeightAveraging")],
)
def test_lightnings_own_averaging_is_refused(callback, name):
    with pytest.raises(ConfigError, match=f"use sbn_lightning's {name}"):
        fit([callback, TernarySparseConversion("2:4")])
