import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.conversion import convert_linears, name_matches, revert_linears
from sbn_lightning.layers.sparse_linear import SparseBitLinear, SparseLinear


def _weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.h = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(11))
        self.odd = nn.Linear(10, 3)
        self.attention = nn.MultiheadAttention(16, 2)
        self.conv = nn.Conv2d(3, 16, 2)
        self.lstm = nn.LSTM(16, 16)
        self.normed = _weight_norm(nn.Linear(16, 8))
        self.lm_head = nn.Linear(16, 10, bias=False)
        self.tied = nn.Linear(16, 10, bias=False)
        self.tied.weight = self.embed.weight


def test_converts_in_place_and_reports_every_skip():
    model = Net()
    parameters = dict(model.named_parameters())
    first = model.h[0][0]
    report = convert_linears(model, "6:8", exclude=("lm_head", "h.1"))
    assert first is model.h[0][0]
    assert type(first) is SparseBitLinear
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert "h.10.0" in report.converted
    assert "h.1.0" not in report.converted
    assert report.skipped["h.1.0"] == "excluded by name"
    assert report.skipped["lm_head"] == "excluded by name"
    assert "in_features=10 is not a multiple of M=8" in report.skipped["odd"]
    assert "subclass" in report.skipped["attention.out_proj"]
    assert "shares its weight" in report.skipped["tied"]
    assert "packed q, k and v are a bare parameter" in report.skipped["attention.in_proj_weight"]
    assert "bare parameter of LSTM" in report.skipped["lstm.weight_ih_l0"]
    assert "part of many windows" in report.skipped["conv"]
    assert "computed from other parameters" in report.skipped["normed"]
    assert not any("embed" in name or "bias" in name for name in report.skipped)
    assert len(report.converted) == 20
    assert "skipped odd: in_features=10" in str(report)


def test_an_optimiser_made_before_still_trains():
    model = nn.Sequential(nn.Linear(16, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    convert_linears(model)
    before = model[0].weight.detach().clone()
    model(torch.randn(4, 16)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)


def test_include_and_kind():
    model = Net()
    report = convert_linears(model, "2:4", include=("h.*.2",), kind="masked")
    assert report.converted == [f"h.{i}.2" for i in range(11)]
    assert type(model.h[3][2]) is SparseLinear


def test_converting_nothing_is_an_error_that_says_why():
    with pytest.raises(ConfigError, match=r"0: in_features=10 is not a multiple of M=8"):
        convert_linears(nn.Sequential(nn.Linear(10, 4)), "6:8")
    with pytest.raises(ConfigError, match=r"no nn\.Linear"):
        convert_linears(nn.Sequential(nn.ReLU()))


def test_converting_twice_changes_nothing():
    model = nn.Sequential(nn.Linear(16, 16))
    convert_linears(model)
    assert convert_linears(model).converted == []


def test_revert_gives_plain_layers_with_the_effective_weight():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8, bias=False))
    convert_linears(model, "2:4", activation_bits=None)
    x = torch.randn(4, 16)
    expected = model(x)
    assert revert_linears(model) == ["0", "1"]
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    assert sorted(model.state_dict()) == ["0.bias", "0.weight", "1.weight"]
    torch.testing.assert_close(model(x), expected)


def test_revert_keeps_parameters_hooks_and_what_others_attached():
    model = nn.Sequential(nn.Linear(16, 16))
    model[0].note, seen = "theirs", []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    weight = model[0].weight
    convert_linears(model, "2:4")
    revert_linears(model)
    model(torch.randn(2, 16))
    assert model[0].weight is weight
    assert model[0].note == "theirs"
    assert seen == [1]
    assert set(vars(model[0])) - set(vars(nn.Linear(16, 16))) == {"note"}


def test_a_converted_model_can_be_copied_pickled_reverted_and_converted_again():
    model = nn.Sequential(nn.Linear(16, 16))
    convert_linears(model, "2:4", activation_bits=None)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        x = torch.randn(2, 16)
        torch.testing.assert_close(other(x), model(x))
        revert_linears(other)
        torch.testing.assert_close(other(x), model(x))
        assert convert_linears(other, "1:4").converted == ["0"]
        assert other[0].mask.float().mean() == 0.25
    assert type(model[0]) is SparseBitLinear


@pytest.mark.parametrize(
    ("name", "pattern", "matches"),
    [
        ("h.1.mlp", "h.1", True),
        ("h.10.mlp", "h.1", False),
        ("model.lm_head", "lm_head", True),
        ("model.layers.0.mlp.down_proj", "mlp.*_proj", True),
        ("model.layers.0.attn.o_proj", "mlp.*", False),
    ],
)
def test_names(name, pattern, matches):
    assert name_matches(name, [pattern]) is matches
