"""Learned factors on gamma: their gradient, and that everything that reads gamma reads the factor too."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sbn_lightning import (
    SparseBitLinear,
    TernaryTransformer,
    convert_linears,
    load_sparse,
    revert_linears,
    save_sparse,
)
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.evaluation.inspection import dense_twin
from sbn_lightning.formats import load_model
from sbn_lightning.formats.init_from import load_weights
from sbn_lightning.formats.write import WriteOptions, write_model
from sbn_lightning.inference.prepared import PreparedWeights
from sbn_lightning.layers.experts_linear import SparseBitExperts
from sbn_lightning.layers.masked_linear import prepare_layers
from sbn_lightning.layers.packed import packed_layer
from sbn_lightning.layers.sparse_bit_linear import ternary_layers
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.learned_scale import factor_of_rows
from tests.formats.models import logits, make_model, save, some_tokens
from tests.helpers import small_config


def make_layer(**options):
    torch.manual_seed(0)
    layer = SparseBitLinear(16, 12, split_sizes=(5, 7), learnable_scales=True, **({"pattern": "2:4"} | options))
    with torch.no_grad():
        layer.log_scale.copy_(torch.tensor([0.3, -0.2]))
    return layer


@pytest.mark.parametrize("activation_bits", [8, None])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_the_gradient_is_that_of_finite_differences(activation_bits, share):
    layer = make_layer(activation_bits=activation_bits, dtype=torch.float64)
    layer.set_rounding(share, 1.0)
    x, dy = torch.randn(9, 16, dtype=torch.float64), torch.randn(9, 12, dtype=torch.float64)
    layer(x).backward(dy)
    found = layer.log_scale.grad
    with torch.no_grad():
        for part in range(2):
            values = []
            for change in (1e-6, -2e-6):
                layer.log_scale[part] += change
                values.append((layer(x) * dy).sum())
            layer.log_scale[part] += 1e-6
            torch.testing.assert_close(found[part], (values[0] - values[1]) / 2e-6, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_each_expert_has_factors_of_its_own(share):
    """A layer of experts computes and learns what one layer for each expert does."""
    torch.manual_seed(0)
    sparsity = SparsityConfig(pattern="2:4", learnable_scales=True)
    experts = SparseBitExperts(3, 16, (5, 7), sparsity=sparsity)
    nn.init.uniform_(experts.log_scale, -0.5, 0.5)
    experts.set_rounding(share, 1.0)
    counts, x = torch.tensor([4, 0, 5]), torch.randn(9, 16)
    y = experts(x, counts)
    y.square().sum().backward()
    parts = []
    for e, (weight, scale) in enumerate(zip(experts.weight.chunk(3), experts.log_scale.chunk(3), strict=True)):
        one = make_layer(bias=False)
        one.weight.data, one.log_scale.data = weight.detach().clone(), scale.detach().clone()
        one.set_rounding(share, 1.0)
        parts.append(one(x.split(counts.tolist())[e]))
        parts[-1].square().sum().backward()
        torch.testing.assert_close(experts.log_scale.grad.chunk(3)[e], one.log_scale.grad)
        torch.testing.assert_close(experts.weight.grad.chunk(3)[e], one.weight.grad)
    torch.testing.assert_close(y, torch.cat(parts))


def test_factors_of_one_are_no_factors():
    """The learned factor, whatever its value, does not change the gradient of the latent weight."""
    layer, x = make_layer(), torch.randn(9, 16)
    plain = SparseBitLinear(16, 12, pattern="2:4", split_sizes=(5, 7))
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if name != "log_scale"})
    layer(x).sum().backward()
    plain(x).sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    assert not torch.equal(layer(x), plain(x))
    nn.init.zeros_(layer.log_scale)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": False}])
def test_the_factor_follows_its_optimiser(options, frozen):
    """A fused optimiser does not increment version counters, and may train the factors alone."""
    layer, x = make_layer(), torch.randn(9, 16)
    layer.weight.requires_grad_(not frozen)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.05, **options)
    for _ in range(3):
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        fresh = make_layer()
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), fresh(x))
    assert not torch.equal(layer.log_scale, make_layer().log_scale)


@pytest.mark.parametrize("prepare", [SparseBitLinear.prepare, prepare_layers])
@pytest.mark.parametrize("grad", [True, False])
def test_a_write_to_the_factor_is_seen(grad, prepare):
    """As averages of weights do when they are swapped in for an evaluation."""
    layer, x = make_layer(), torch.randn(9, 16)
    with torch.set_grad_enabled(grad):
        layer(x)
        layer.log_scale.data.add_(0.5)
        prepare(layer)
        fresh = make_layer()
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), fresh(x))


def test_what_is_made_of_a_layer_has_the_factor():
    layer, x = make_layer(), torch.randn(9, 16)
    gamma = make_layer().ternary()[1]
    plain = SparseBitLinear(16, 12, pattern="2:4", split_sizes=(5, 7))
    plain.weight.data = layer.weight.data
    torch.testing.assert_close(gamma, plain.ternary()[1] * layer.log_scale.exp())
    assert torch.equal(layer.values(masked=False), plain.values(masked=False))
    assert torch.equal(packed_layer(layer).eval()(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    model = nn.Sequential(nn.Linear(16, 12))
    convert_linears(model, "2:4", learnable_scales=True, activation_bits=None)
    nn.init.constant_(model[0].log_scale, 0.5)
    wanted = model(x)
    revert_linears(model)
    torch.testing.assert_close(model(x), wanted)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


def test_a_compiled_layer():
    layer, x = make_layer(), torch.randn(9, 16)
    y = layer(x)
    y.square().sum().backward()
    wanted, layer.log_scale.grad = layer.log_scale.grad, None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), y)
    compiled(x).square().sum().backward()
    torch.testing.assert_close(layer.log_scale.grad, wanted)


def scaled_model(**changes):
    model = make_model(learnable_scales=True, n_layers=1, **changes)
    with torch.no_grad():
        for layer in ternary_layers(model).values():
            layer.log_scale.uniform_(-0.5, 0.5)
    return model


@pytest.mark.parametrize("format", ["packed", "hf-sbn", "gguf", "hf-bitnet"])
def test_every_format_holds_the_factor_in_gamma(tmp_path, format):
    model, tokens = scaled_model(), some_tokens()
    loaded = load_model(save(model, tmp_path / "m.ckpt"))
    assert torch.equal(logits(loaded.model, tokens), logits(model, tokens))
    folder = tmp_path / "out"
    folder.mkdir()
    write_model(loaded, folder, format, WriteOptions())
    if format == "hf-sbn":  # transformers reads this format.
        gamma = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.gamma"]
        assert torch.equal(gamma, model.blocks[0].mlp.down.ternary()[1])
        return
    back = load_model(next(folder.glob("*.gguf")) if format == "gguf" else folder).model
    tolerance = 0.0 if format == "packed" else 1e-3  # the others round gamma, or write 1 / gamma
    for name, layer in ternary_layers(model).items():
        read = back.get_submodule(name)  # A GGUF file is read as a dense model.
        weight = read.weight if type(read) is nn.Linear else read.effective_weight()
        assert torch.equal(weight.sign(), layer.values().sign())
        torch.testing.assert_close(weight, layer.effective_weight(), rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("changes", [{}, {"n_experts": 4, "d_expert": 16}])
def test_weights_start_a_run_with_and_without_learned_scales(changes, tmp_path):
    model, tokens = scaled_model(**changes), some_tokens()
    path = str(save(model, tmp_path / "m.ckpt"))
    for learnable in (True, False):
        other = TernaryTransformer(small_config(n_layers=1, learnable_scales=learnable, **changes)).eval()
        load_weights(other, path)
        torch.testing.assert_close(logits(other, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)
    plain = make_model(n_layers=1, **changes)
    load_weights(model, str(save(plain, tmp_path / "plain.ckpt")))  # the model has factors, and the weights have none
    nn.init.zeros_(model.blocks[0].mlp.down.log_scale)
    assert torch.equal(model.blocks[0].mlp.down.ternary()[1], plain.blocks[0].mlp.down.ternary()[1])


def test_a_dense_model_around_the_weights_has_the_factor():
    model = scaled_model()
    layer = model.blocks[0].attention.qkv
    factor = factor_of_rows(layer.log_scale, layer.split_sizes, layer.out_features)
    dense = dense_twin(model).blocks[0].attention.qkv
    assert torch.equal(dense.weight, layer.weight * factor.unsqueeze(-1))


def test_folders_of_plain_pytorch_models(tmp_path):
    model, x = nn.Sequential(nn.Linear(16, 12)), torch.randn(9, 16)
    convert_linears(model, "2:4", learnable_scales=True)
    nn.init.constant_(model[0].log_scale, 0.5)
    for form in ("packed", "latent"):
        save_sparse(model, tmp_path / form, form)
        other = nn.Sequential(nn.Linear(16, 12))
        load_sparse(other, tmp_path / form)
        assert torch.equal(other(x), model(x))
    assert torch.equal(other[0].log_scale, model[0].log_scale)


def test_a_decoder_sees_that_a_factor_has_changed():
    model = scaled_model()
    prepared = PreparedWeights(model)
    assert prepared.prepare()
    assert not prepared.prepare()
    with torch.no_grad():
        model.blocks[0].mlp.down.log_scale += 1
    assert prepared.prepare()


def test_options_without_learned_scales_are_written_as_before():
    assert "learnable_scales" not in json.dumps(SparsityConfig().to_dict())
    assert SparsityConfig(**SparsityConfig(learnable_scales=True).to_dict()).learnable_scales


def test_what_cannot_have_learned_scales_says_so():
    layer = SparseBitLinear(16, 12)
    with pytest.raises(ConfigError, match="a layer with 0 learned scales cannot have 1; make a new layer"):
        layer.learnable_scales = True
