"""The report of an audit of a model."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sbn_lightning.layers.audit import audit
from sbn_lightning.layers.conversion import convert_linears
from sbn_lightning.layers.packed import pack_layers


class Net(nn.Module):
    """A block that runs twice, a layer that is bypassed, one that is never used, and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.up, self.bypassed, self.unused = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.experts = nn.Parameter(torch.randn(2, 16, 16))
        self.lm_head = nn.Linear(16, 10, bias=False)

    def forward(self, tokens):
        x = self.up(self.up(self.embed(tokens)))
        return self.lm_head(F.linear(x, self.bypassed.weight))


def test_shares_reasons_and_bypassed_layers():
    model, tokens = Net(), torch.zeros(3, 5, dtype=torch.int64)
    convert_linears(model, "2:4", include=("up", "bypassed", "unused"))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = audit(model, lambda: model(tokens))
    linear = 3 * 256 + 512 + 160
    assert (report.sparse_parameters, report.linear_parameters) == (768, linear)
    assert report.parameters == linear + 160 + 3 * 16
    assert report.linear_flops == 2 * 15 * (2 * 256 + 160 + 256)  # the bypassed layer computes too
    assert report.sparse_flops == 2 * 15 * 2 * 256
    assert report.bypassed == ["bypassed"]
    assert report.not_called == ["unused"]
    assert "bare parameter" in report.skipped["experts"]
    assert report.skipped["lm_head"] == "an output head"
    assert f"{768 / linear:.1%}" in str(report)
    assert "neither sparse nor ternary: bypassed" in str(report)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_without_an_example_each_weight_multiplies_each_token():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 48))
    assert audit(model).flop_share == 0
    convert_linears(model, "2:4", exclude="1")
    for each in (model, pack_layers(model)):
        report = audit(each)
        assert report.flop_share == report.linear_share == pytest.approx(0.25)
        assert not report.measured


@pytest.mark.parametrize("fused", [True, False])
def test_the_fused_inference_of_torch_is_found(fused):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    convert_linears(layer, "2:4")
    layer.activation_relu_or_gelu = int(fused)
    report = audit(layer, lambda: layer(torch.randn(2, 5, 16)))
    assert report.bypassed == (["linear1", "linear2"] if fused else [])


@pytest.mark.parametrize("training", [True, False])  # in evaluation nn.MultiheadAttention is one fused operator
def test_products_outside_of_linear_layers_count(training):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).train(training)
    convert_linears(layer, "2:4")
    report = audit(layer, lambda: layer(torch.randn(2, 5, 16)))
    assert report.linear_share == report.flop_share == pytest.approx(0.5)  # q, k, v and the output are the other half
    assert report.linear_flops == 2 * 10 * (4 * 16 * 16 + 2 * 16 * 32)


def test_flops_of_the_fused_encoder_layer_count():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    report = audit(layer, lambda: layer(torch.randn(2, 5, 16)))
    assert report.linear_flops == 2 * 10 * (4 * 16 * 16 + 2 * 16 * 32)
