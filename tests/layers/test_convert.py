"""Layers are converted in place and reverted, and a model can be converted to match a state dict."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from sbn_lightning.backends.reference import ReferenceBackend
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers import convert_to_match
from sbn_lightning.layers.candidates import name_matches
from sbn_lightning.layers.conversion import convert_linears, revert_linears
from sbn_lightning.layers.sparse_linear import SparseBitLinear, SparseLinear
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import nonzeros_per_group


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


# A conversion changes all layers or none


def state_of(model):
    return {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_bits": 7}, "activation_bits=7"),
        ({"split_sizes": {"0": (8, 8), "2": (9, 8)}}, r"2: split_sizes=\(9, 8\) do not add up"),
        ({"split_sizes": {"*.qkv": (8, 8)}}, r"no converted layer has a name like \*\.qkv"),
        ({"include": ("nothing",)}, "include fits no linear layer of the model: nothing; the linear layers are 0, 2"),
    ],
)
def test_a_refused_conversion_changes_nothing(options, message):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    before = state_of(model)
    with pytest.raises(ConfigError, match=message):
        convert_linears(model, "2:4", **options)
    assert state_of(model) == before
    assert convert_linears(model, "2:4").converted == ["0", "2"]


def test_a_mask_that_cannot_be_computed_leaves_the_model_alone(monkeypatch):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    before = state_of(model)
    fresh_mask = ReferenceBackend.fresh_mask

    def fails_for_the_second(self, scores, *args):
        if len(scores) == 8:
            raise RuntimeError("out of memory")
        return fresh_mask(self, scores, *args)

    monkeypatch.setattr(ReferenceBackend, "fresh_mask", fails_for_the_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        convert_linears(model, "2:4")
    assert state_of(model) == before


@pytest.mark.parametrize("how", ["loaded", "held"])
def test_a_reversion_leaves_nothing_behind(how):
    """Any optimiser in the process asks for the layers whose masks stay."""
    model = nn.Sequential(nn.Linear(16, 16))
    convert_linears(model, "2:4")
    if how == "loaded":
        model.load_state_dict(model.state_dict())
    else:
        model[0].hold_mask = True
        model[0].keep_mask()
    revert_linears(model)
    assert set(vars(model[0])) == set(vars(nn.Linear(16, 16)))
    other = nn.Linear(4, 4)
    optimizer = torch.optim.SGD([*other.parameters(), *model.parameters()], lr=0.1)
    other(torch.randn(2, 4)).sum().backward()
    optimizer.step()


def test_a_refused_reversion_changes_nothing():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    convert_linears(model, "2:4")
    parametrizations.weight_norm(model[1])
    before, weight = type(model[0]), model[0].weight.detach().clone()
    with pytest.raises(ConfigError, match="no parameter any more"):
        revert_linears(model)
    assert type(model[0]) is before
    assert torch.equal(model[0].weight, weight)


# A second conversion with other options is not ignored


def test_a_second_conversion_to_something_else_is_refused():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    convert_linears(model, "6:8", include=("0",))
    for options in ({"pattern": "2:4"}, {"pattern": "6:8", "activation_bits": 4}, {"pattern": "6:8", "kind": "masked"}):
        with pytest.raises(ConfigError, match=r"0 is converted already, to 6:8, and not to .*revert_linears"):
            convert_linears(model, **options)
    assert type(model[1]) is nn.Linear
    assert convert_linears(model, "2:4", exclude=("0",)).converted == ["1"]
    revert_linears(model)
    assert convert_linears(model, "2:4").converted == ["0", "1"]


@pytest.mark.parametrize("kind", ["ternary", "masked"])
@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("saved", ["6:8", "3:4", "1:4"])
def test_a_mask_of_another_pattern_is_refused_and_the_layer_stays(saved, metadata, kind):
    torch.manual_seed(0)
    source, model = (nn.Sequential(nn.Linear(64, 16)) for _ in range(2))
    convert_linears(source, saved, kind=kind)
    convert_linears(model, "2:4", kind=kind)
    state, before = source.state_dict(), copy.deepcopy(model.state_dict())
    if not metadata:
        state = dict(state)
        if saved == "3:4":  # judged by the mask alone, this is a stage of a ramp to 2:4
            model.load_state_dict(state)
            return
    with pytest.raises(
        RuntimeError, match=r"0: the saved mask .*the layer'?s? .*2:4.*set layer\.pattern|leave the masks"
    ):
        model.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.load_state_dict({name: value for name, value in state.items() if not name.endswith("mask_bits")})
    assert nonzeros_per_group(model[0].mask, 4).unique().tolist() == [2]


def test_the_way_back_from_a_state_dict_of_a_converted_model(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    convert_linears(model, "2:4", include="0", activation_bits=4)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    x = torch.randn(3, 16)
    for bare in (False, True):
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        other = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        if bare:  # safetensors and sharded checkpoints keep no metadata
            state = dict(state)
            with pytest.raises(ConfigError, match="does not say how 0 was converted"):
                convert_to_match(other, state)
            assert type(other[0]) is nn.Linear
        assert convert_to_match(other, state, **({"pattern": "2:4", "activation_bits": 4} if bare else {})) == ["0"]
        other.load_state_dict(state)
        assert torch.equal(other(x), model(x))
    with pytest.raises(ConfigError, match="has no masks"):
        convert_to_match(model, nn.Linear(2, 2).state_dict())
    with pytest.raises(ConfigError, match="leave out exclude: the masks of the state dict say which layers are"):
        convert_to_match(other, state, "2:4", exclude=["2"])


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (lambda: nn.Linear(16, 16), {"pattern": "6:8"}, r"0 was converted to 2:4, and not to 6:8: leave the options"),
        (lambda: nn.Linear(16, 16), {"activation_bits": 4}, r"to 2:4, and not to 2:4, activation_bits=4"),
        (lambda: nn.Linear(32, 16), {}, r"the layer is 32 -> 16, and the mask is of 16 rows with 16 bits"),
        (lambda: nn.Embedding(16, 16), {}, "Embedding is no linear layer"),
        (lambda: OwnLinear(16, 16), {}, "OwnLinear is a subclass"),
        (lambda: nn.Identity(), {}, "Identity is no linear layer"),
    ],
)
def test_a_model_that_cannot_match_a_state_dict_is_left_alone(build, options, message):
    source = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    convert_linears(source, "2:4")
    model = nn.Sequential(build(), nn.Linear(16, 8))
    kinds = [type(layer) for layer in model]
    with pytest.raises(ConfigError, match=message):
        convert_to_match(model, source.state_dict(), **options)
    assert [type(layer) for layer in model] == kinds


def test_the_options_that_a_state_dict_has_may_be_given_again():
    source, model = (nn.Sequential(nn.Linear(16, 16)) for _ in range(2))
    convert_linears(source, "2:4", split_sizes={"0": (8, 8)})
    assert convert_to_match(model, source.state_dict(), SparsityConfig("2:4"), activation_bits=8) == ["0"]
    assert model[0].split_sizes == (8, 8)
