"""``SparsityConfig``: the options of a sparse layer as one value."""

import dataclasses
import json

import pytest
import torch
from jsonargparse import ArgumentParser

from sbn_lightning import SparseBitLinear, SparseLinear, TernarySparseConversion, TransformerConfig
from sbn_lightning.backends.reference import ReferenceBackend
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.conversion import convert_linears
from sbn_lightning.layers.packed import packed_layer
from sbn_lightning.models.transformer import TernaryTransformer
from sbn_lightning.sparsity.config import SparsityConfig, SparsityOptions
from sbn_lightning.sparsity.pattern import NMPattern, top_n_mask

OTHER = {
    "pattern": NMPattern(2, 4),
    "kind": "masked",
    "split_sizes": (6, 2),
    "activation_bits": 4,
    "mask_source": "ternary",
    "gradient": "masked",
    "gamma_over": "kept",
    "learnable_scales": True,
}


def test_it_is_a_value():
    config = SparsityConfig("2:4", activation_bits=4)
    assert config == SparsityConfig(NMPattern(2, 4), activation_bits=4)
    assert hash(config) == hash(SparsityConfig("2:4", activation_bits=4))
    assert SparsityConfig(**json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.activation_bits = 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_bits": 7}, "activation_bits=7 is not one of 8, 4, None"),
        ({"activation_bits": True}, "activation_bits=True"),
        ({"pattern": "5:4"}, "1 <= N <= M"),
        ({"kind": "dense"}, "kind='dense'"),
        ({"mask_source": "gradient"}, "mask_source='gradient'"),
        ({"gradient": "sparse"}, "gradient='sparse'"),
        ({"gamma_over": "all"}, "gamma_over='all'"),
        ({"split_sizes": ()}, "must be numbers of rows"),
        ({"split_sizes": (4, 0)}, "must be numbers of rows"),
        ({"split_sizes": (4.0, 4)}, "must be numbers of rows"),
    ],
)
def test_a_bad_option_fails_where_it_is_given(options, message):
    with pytest.raises(ConfigError, match=message):
        SparsityConfig(**options)


def test_make_takes_a_config_a_pattern_or_options():
    assert SparsityConfig.make() == SparsityConfig()
    assert SparsityConfig.make("2:4", gradient="masked") == SparsityConfig("2:4", gradient="masked")
    whole = SparsityConfig("2:4", activation_bits=4)
    assert SparsityConfig.make(whole) is not None
    assert SparsityConfig.make(whole, gradient="masked") == dataclasses.replace(whole, gradient="masked")
    assert SparsityConfig.make(whole, pattern="6:8", activation_bits=8) == whole  # the command line fills in defaults
    with pytest.raises(ConfigError, match="two patterns"):
        SparsityConfig.make("2:4", pattern="1:4")
    with pytest.raises(TypeError, match="bits"):
        SparsityConfig.make("2:4", bits=4)


@pytest.mark.parametrize("option", [f.name for f in dataclasses.fields(SparsityConfig)])
def test_every_option_reaches_layer_backend_and_packed_layer(option, monkeypatch):
    """An option needs no entry in any list between the caller and the code that acts on it."""
    seen = []
    prepare = ReferenceBackend.prepare
    monkeypatch.setattr(ReferenceBackend, "prepare", lambda self, *args: seen.append(args[-1]) or prepare(self, *args))
    value = OTHER[option]
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    convert_linears(model, SparsityConfig(**{option: value}))
    if option == "kind":
        assert type(model[0]) is SparseLinear
        return
    assert getattr(model[0].sparsity, option) == getattr(model[0], option) == value
    model(torch.randn(2, 16))
    assert {getattr(config, option) for config in seen} == {value}
    assert packed_layer(model[0]).sparsity == model[0].sparsity
    assert getattr(SparseBitLinear(16, 8, **{option: value}), option) == value
    if option != "split_sizes":  # a conversion takes split_sizes by name, because layers differ
        assert getattr(TernarySparseConversion(**{option: value}).sparsity, option) == value


@pytest.mark.parametrize("option", [f.name for f in dataclasses.fields(SparsityOptions)])
def test_every_shared_option_is_one_of_a_model_too(option):
    value = OTHER[option]
    config = TransformerConfig(**{option: value}, d_model=32, d_ffn=32, n_layers=1, vocab_size=16)
    assert getattr(config, option) == getattr(config.sparsity, option) == value
    assert TransformerConfig(**config.to_dict()) == config
    layer = TernaryTransformer(config).blocks[0].attention.qkv
    assert layer.sparsity == dataclasses.replace(config.sparsity, split_sizes=(32, 16, 16))


def test_the_command_line_has_every_option():
    parser = ArgumentParser()
    parser.add_class_arguments(TransformerConfig, "config")
    parser.add_class_arguments(TernarySparseConversion, "conversion")
    given = parser.parse_object(
        {"config": {"gamma_over": "kept"}, "conversion": {"pattern": "2:4", "gamma_over": "kept"}}
    )
    conversion = parser.instantiate(given).conversion
    assert given.config.gamma_over == "kept"
    assert conversion.sparsity == SparsityConfig("2:4", gamma_over="kept")
    text = parser.format_help()
    for option in (f.name for f in dataclasses.fields(SparsityOptions)):
        assert f"--config.{option}" in text
        assert f"--conversion.{option}" in text


@pytest.mark.parametrize("make", [SparseBitLinear, SparseLinear])
def test_options_that_are_set_later_take_effect(make):
    torch.manual_seed(0)
    layer = make(16, 8, pattern="2:4")
    x = torch.randn(3, 16)
    layer(x)
    layer.pattern = "1:4"
    assert torch.equal(layer.mask, top_n_mask(layer.weight, NMPattern(1, 4)))
    fresh = make(16, 8, pattern="1:4")
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), fresh(x))


def test_split_sizes_that_are_set_later_take_effect_or_are_refused():
    torch.manual_seed(0)
    layer, x = SparseBitLinear(16, 8, pattern="2:4"), torch.randn(3, 16)
    before = layer(x)
    layer.split_sizes = (6, 2)
    assert layer.ternary()[1].shape == (2,)
    after = layer(x)
    assert not torch.equal(before, after)
    for value, message in (((6, 3), "do not add up"), ((8, 0), "1 or more")):
        with pytest.raises(ConfigError, match=message):
            layer.split_sizes = value
    with pytest.raises(ConfigError, match="activation_bits=7"):
        layer.activation_bits = 7
    assert layer.sparsity == SparsityConfig("2:4", split_sizes=(6, 2))
    assert torch.equal(layer(x), after)


def test_options_are_not_changed_under_a_backend_that_was_chosen_for_others():
    layer = SparseBitLinear(16, 8, pattern="2:4")
    layer.backend = ReferenceBackend()
    with pytest.raises(ConfigError, match="backend was chosen for"):
        layer.activation_bits = None


def test_a_ternary_layer_is_not_made_of_masked_options():
    with pytest.raises(ConfigError, match=r"SparseBitLinear\(16, 8\).*is SparseLinear"):
        SparseBitLinear(16, 8, sparsity=SparsityConfig("2:4", kind="masked"))
