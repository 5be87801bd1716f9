"""Converted models under torch.compile."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sbn_lightning import DenseToSparseRamp, MaskRefresh, TernarySparseConversion
from sbn_lightning.layers.conversion import convert_linears, revert_linears
from sbn_lightning.layers.sparse_linear import masked_layers
from tests.helpers import ForeignModule, quiet_trainer, regression_loader


class CompiledInside(ForeignModule):
    def configure_model(self):
        if self.net is None:
            super().configure_model()
            self.net = torch.compile(self.net, backend="aot_eager")


class CompiledInPlace(ForeignModule):
    def configure_model(self):
        if self.net is None:
            super().configure_model()
            self.net[0].compile(backend="aot_eager")


def compiled_whole(in_configure_model):
    return torch.compile(ForeignModule(in_configure_model), backend="aot_eager")


@pytest.mark.parametrize(
    ("build", "in_configure_model", "kind", "interval"),
    [
        (compiled_whole, False, "ternary", 2),
        (compiled_whole, True, "masked", 1),
        (CompiledInside, False, "masked", 2),
        (CompiledInside, True, "ternary", 1),
        (CompiledInPlace, True, "ternary", 2),
    ],
)
def test_compiled_models_train_like_eager_ones(build, in_configure_model, kind, interval):
    def run(module):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        conversion = TernarySparseConversion("2:4", exclude=("net.2",), kind=kind)
        callbacks = [conversion, DenseToSparseRamp("step", start=0.3), MaskRefresh(interval)]
        trainer = quiet_trainer(callbacks, max_steps=7)
        trainer.fit(module, regression_loader())
        assert conversion.report.converted == ["net.0"]
        assert conversion.report.skipped == {"net.2": "excluded by name"}
        state = trainer.lightning_module.state_dict()
        frames = dict(torch._dynamo.utils.counters["frames"])
        return {key.replace("_orig_mod.", ""): value for key, value in state.items()}, frames

    expected, frames = run(ForeignModule(in_configure_model))
    assert frames == {}
    actual, frames = run(build(in_configure_model))
    assert frames["ok"] > 0
    assert expected.keys() == actual.keys()
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], msg=key)


def test_a_compiled_model_sees_refreshed_masks_and_reverts():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    convert_linears(model, "2:4", activation_bits=None)
    compiled, x = torch.compile(model, backend="aot_eager"), torch.randn(3, 16)
    for _, layer in masked_layers(model):
        layer.hold_mask = True
    before = compiled(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    stale = compiled(x)
    torch.testing.assert_close(stale, model(x))
    for _, layer in masked_layers(model):
        layer.refresh_mask()
    fresh = compiled(x)
    torch.testing.assert_close(fresh, model(x))
    assert not torch.equal(stale, fresh)
    assert not torch.equal(before, fresh)
    revert_linears(model)
    torch.testing.assert_close(compiled(x), fresh)


@pytest.mark.parametrize(("shape", "warns"), [("walk", True), ("rows", False)])
def test_a_ramp_says_when_torch_will_stop_compiling(shape, warns, recwarn):
    torch._dynamo.utils.counters.clear()
    module = compiled_whole(False)
    callbacks = [TernarySparseConversion("8:16", exclude=("net.2",)), DenseToSparseRamp(shape, end=1.0)]
    quiet_trainer(callbacks, max_steps=24).fit(module, regression_loader())
    told = [str(warning.message) for warning in recwarn if "goes on uncompiled" in str(warning.message)]
    assert len(told) == warns
    assert all("changes density 8 times" in line and "after 8 times" in line for line in told)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert (compiled == torch._dynamo.config.recompile_limit) is warns


def test_a_compiled_model_sees_a_new_density_while_its_mask_is_held():
    layer, x = nn.Sequential(nn.Linear(16, 4)), torch.randn(3, 16)
    convert_linears(layer, "2:4", kind="masked")
    layer[0].hold_mask = True
    compiled = torch.compile(layer, backend="aot_eager")
    sparse = compiled(x)
    layer[0].set_density(4)
    dense = compiled(x)
    assert not torch.equal(sparse, dense)
    torch.testing.assert_close(dense, F.linear(x, layer[0].weight, layer[0].bias))
