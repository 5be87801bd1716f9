"""Which layers a conversion takes, what it says about the others, and the rows of fused layers."""

import warnings
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.integrations.pytorch import convert, convert_by_name
from sbn_lightning.layers.conversion import convert_linears, convert_quietly
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear


def test_a_name_that_fits_nothing_is_a_warning():
    model = nn.Sequential(OrderedDict(body=nn.Linear(16, 16), head=nn.Linear(16, 8)))
    with pytest.warns(UserWarning, match="names that fit nothing in the model: haed, l.*") as got:
        report = convert_linears(model, "2:4", exclude=["lm_head", "haed", "l.*", "body.bias"])
    assert len(got) == 1
    assert report.unmatched == ["haed", "l.*"]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"moe": Experts(), "head": nn.Linear(16, 16)}) for _ in range(2))
        self.blocks[0]["glu"] = nn.ModuleDict({"gate": nn.Linear(16, 32), "up": nn.Linear(16, 32)})
        self.blocks[0]["shared_expert_gate"] = nn.Linear(16, 1)
        self.blocks[0]["q"] = nn.ModuleDict({"base_layer": nn.Linear(16, 16), "lora_A": nn.Linear(16, 8)})
        self.classifier = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
        self.text_projection = nn.Linear(16, 16)


def test_heads_routers_gates_and_loras_are_left_alone_unless_named():
    report = convert_linears(Decoder(), "2:4")
    skipped = {
        "blocks.0.moe.gate": "router",
        "blocks.1.moe.gate": "router",
        "blocks.0.shared_expert_gate": "one row",
        "blocks.0.q.lora_A": "LoRA",
        "classifier.0": "output head",
        "classifier.1": "output head",
        "text_projection": "output head",
    }
    assert set(report.skipped) == set(skipped)
    for name, reason in skipped.items():
        assert reason in report.skipped[name]
        assert "name it in include" in report.skipped[name]
    assert "blocks.0.glu.gate" in report.converted
    assert "blocks.0.head" in report.converted
    named = convert_linears(Decoder(), "2:4", include=("*", "classifier", "*.moe.gate"))
    assert set(report.converted) < set(named.converted)
    assert {"classifier.0", "blocks.1.moe.gate"} <= set(named.converted)


def heads():
    blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
    return nn.ModuleDict({"blocks": blocks, "lm_head": nn.Linear(16, 64)})


@pytest.mark.parametrize("include", [["lm_head"], ["lm_head", "blocks"], "lm_head", ["*", "lm_*"]])
def test_include_names_an_output_head_without_another_option(include):
    model = heads()
    report = convert(model, "2:4", include=include)
    assert "lm_head" in report.converted
    assert isinstance(model["lm_head"], SparseBitLinear)
    assert convert_linears(heads(), "2:4", include=include).converted == report.converted


def test_a_head_is_left_alone_by_default_also_in_a_list_of_models():
    model = nn.ModuleList([heads(), heads()])
    report = convert_linears(model, "2:4")
    assert report.converted == [f"{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)]
    assert set(report.skipped) == {"0.lm_head", "1.lm_head"}
    assert all("an output head; name it in include" in reason for reason in report.skipped.values())


def test_a_converted_head_is_not_in_the_way_of_a_second_conversion():
    """The head keeps its options, because a conversion that does not name the head leaves the head alone."""
    model = heads()
    convert_linears(model, "1:4", include=("lm_head",))
    with warnings.catch_warnings():  # The head counts as sparse.
        warnings.simplefilter("error")
        assert convert_linears(model, "2:4").converted == ["blocks.0", "blocks.1"]
    assert str(model["lm_head"].pattern) == "1:4"


def test_a_large_head_that_cannot_be_converted_is_no_reason_to_warn():
    model = nn.ModuleDict({"body": nn.Linear(16, 16), "lm_head": nn.Linear(18, 512)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convert_linears(model, "2:4").converted == ["body"]


@pytest.mark.parametrize("name", ["lm_head", "gate", "router"])
def test_layers_that_a_conversion_leaves_alone_are_converted_by_name(name):
    """This is how a saved model gets its layers back, so the names must not matter."""
    model = nn.ModuleDict({"body": nn.Linear(16, 16), name: nn.Linear(16, 2)})
    convert_by_name(model, {name: {"pattern": "2:4"}})
    assert isinstance(model[name], SparseBitLinear)
    assert type(model["body"]) is nn.Linear


def test_an_include_that_fits_no_layer_says_so_and_names_the_layers():
    message = (
        r"include fits no linear layer of the model: zzz, lm\.\*; the linear layers are blocks\.0, blocks\.1, lm_head$"
    )
    with pytest.raises(ConfigError, match=message):
        convert_linears(heads(), "2:4", include=("zzz", "lm.*"))
    with pytest.raises(ConfigError, match="the linear layers are 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"):
        convert_linears(nn.Sequential(*(nn.Linear(16, 16) for _ in range(10))), "2:4", include="x")


def test_what_include_leaves_out_is_not_called_excluded():
    report = convert_linears(heads(), "2:4", include="blocks", exclude="blocks.0")
    assert report.skipped == {"blocks.0": "excluded by name", "lm_head": "include does not name it"}


@pytest.mark.parametrize(
    ("widths", "remedy", "example"),
    [
        ((64, 64), "choose a pattern whose M divides 64, for example 2:4", "2:4"),
        ((18, 36), "choose a pattern whose M divides 18, 36, for example 1:2", "1:2"),
        ((16, 37), "choose a pattern whose M divides 16, for example 2:4", "2:4"),
        ((37,), "no M from 2 to 32 divides 37: give the layer another in_features", None),
    ],
)
def test_if_no_layer_divides_the_error_names_a_pattern_that_does(widths, remedy, example):
    def model():
        return nn.Sequential(*(nn.Linear(width, 16) for width in widths))

    with pytest.raises(ConfigError, match=f"no layer was converted to 2:5 .*; {remedy}$"):
        convert_linears(model(), "2:5")
    if example is not None:
        assert convert_quietly(model(), example).converted


class Fused(nn.Module):
    """Experts as in transformers 5: one parameter holds the weights of all experts."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(8, 32, 16))
        self.attention = nn.Linear(16, 16, bias=False)


def test_a_conversion_that_reaches_little_warns_and_says_the_share():
    with pytest.warns(UserWarning, match=r"only 5\.9% of the model's linear parameters"):
        report = convert_linears(Fused(), "2:4")
    assert (report.converted_parameters, report.linear_parameters) == (256, 256 + 8 * 32 * 16)
    assert "5.9% of the linear parameters" in str(report)
    assert "bare parameter" in report.skipped["up"]


def test_what_the_caller_excluded_is_no_reason_to_warn():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 256), nn.Linear(256, 256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_linears(model, "2:4", exclude=("1", "2"))


# Fused projections.


def test_rows_of_fused_layers_are_given_by_name():
    model = nn.ModuleDict(
        {f"block{i}": nn.ModuleDict({"qkv": nn.Linear(16, 24), "o": nn.Linear(8, 16)}) for i in (0, 1)}
    )
    report = convert_linears(model, "2:4", split_sizes={"qkv": (8, 8, 8), "block1.o": None})
    assert report.split_sizes == {"block0.qkv": (8, 8, 8), "block1.qkv": (8, 8, 8)}
    assert model["block0"]["qkv"].ternary()[1].shape == (3,)
    assert model["block1"]["o"].split_sizes is None
    assert "(8, 8, 8)" in str(report)


@pytest.mark.parametrize(
    ("origin", "name", "attributes", "rows", "sizes"),
    [
        ("timm.layers", "qkv", {}, 24, (8, 8, 8)),
        ("litgpt.model", "qkv", {"config": SimpleNamespace(n_query_groups=2, head_size=4)}, 32, (16, 8, 8)),
        ("transformers.models.phi3", "qkv_proj", {"num_key_value_heads": 2, "head_dim": 4}, 32, (16, 8, 8)),
        ("transformers.models.phi3", "gate_up_proj", {}, 64, (32, 32)),
        ("transformers.models.gpt_neox", "query_key_value", {}, 24, None),
        ("mine", "qkv", {}, 24, None),
    ],
)
def test_rows_of_fused_layers_are_guessed_where_the_class_is_known(origin, name, attributes, rows, sizes):
    holder = type("Holder", (nn.Module,), {"__module__": origin})()
    for key, value in attributes.items():
        setattr(holder, key, value)
    holder.add_module(name, nn.Linear(16, rows))
    report = convert_linears(holder, "2:4")
    assert report.split_sizes.get(name) == sizes
    assert getattr(holder, name).split_sizes == sizes


def test_a_1x1_convolution_is_said_to_be_a_linear_layer():
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3), nn.Linear(512, 512))
    skipped = convert_linears(model, "2:4").skipped
    assert "linear layer over channels" in skipped["0"]
    assert "many windows" in skipped["1"]


def test_frozen_layers_are_named_once_with_the_way_to_leave_them_out():
    """Weights that never train, for example those of a teacher, cannot adapt to their rounding."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.ModuleDict({"a": nn.Linear(16, 16), "ab": nn.Linear(16, 16)})
            self.teacher = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(False)
            self.net["a"].requires_grad_(False)

    with pytest.warns(UserWarning, match="frozen") as got:
        report = convert_linears(Pair(), "2:4")
    assert report.frozen == ["net.a", "teacher.0", "teacher.1"]
    assert len(got) == 1
    message = str(got[0].message)
    assert message.startswith("net.a and 2 more are frozen")
    assert "add ['net.a', 'teacher'] to exclude" in message
    with pytest.warns(UserWarning, match="net.ab and 2 more are frozen.* train them, or leave them dense"):
        convert_linears(Pair().requires_grad_(False), "2:4", exclude="net.a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convert_linears(Pair(), "2:4", exclude=["net.a", "teacher"]).converted == ["net.ab"]
        # A saved conversion says which layers it has, and the weights that come were trained.
        convert_by_name(Pair(), {"teacher.0": {"pattern": "2:4"}})


def test_a_warning_of_many_frozen_layers_stays_short():
    layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(60)])
    layers[::2].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"0 and 29 more are frozen.*'36', '38'\] and 10 more to exclude"):
        convert_linears(layers, "2:4")
