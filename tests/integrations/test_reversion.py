"""Back to plain layers: what ``save_pretrained`` writes after a reversion, and ``model.dequantize()``."""

import json

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5")

from sbn_lightning.core.errors import ConfigError  # noqa: E402
from sbn_lightning.integrations.folder import load_sparse, save_sparse, sparse_layers  # noqa: E402
from sbn_lightning.integrations.huggingface import SBNConfig, save_packed  # noqa: E402
from sbn_lightning.integrations.huggingface.quantizer import config_of  # noqa: E402
from sbn_lightning.integrations.pytorch import convert, revert  # noqa: E402
from sbn_lightning.layers.packed import pack_layers  # noqa: E402
from tests.integrations.families import build  # noqa: E402

TOKENS = torch.arange(3, 15)[None]
FAMILIES = ["qwen2-tied", "gpt2", "phi3", "mixtral"]


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def folder_of(name, form, tmp_path):
    """A latent or a packed folder of a model whose tokens are not quantised, so a reversion changes no output."""
    build(name).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=SBNConfig("2:4", activation_bits=None))
    (model.save_pretrained if form == "latent" else lambda folder: save_packed(model, folder))(tmp_path / form)
    return tmp_path / form


def check_dense_folder(model, tmp_path, expected):
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = load(tmp_path / "plain")
    assert not sparse_layers(again)
    torch.testing.assert_close(logits(again), expected)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("way", ["revert", "dequantize"])
@pytest.mark.parametrize("form", ["converted", "latent", "packed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_reverted_model_saves_a_dense_folder(name, form, way, tmp_path):
    if form == "converted":
        build(name).save_pretrained(tmp_path / "dense")
        model = load(tmp_path / "dense", quantization_config=SBNConfig("2:4", activation_bits=None))
    else:
        model = load(folder_of(name, form, tmp_path))
    expected, sparse = logits(model), list(sparse_layers(model))
    dense = build(name)
    if way == "revert":
        assert revert(model) == sparse
    else:
        assert model.dequantize() is model
    kinds = {name: type(module) for name, module in dense.named_modules()}
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert model.state_dict().keys() == dense.state_dict().keys()
    torch.testing.assert_close(logits(model), expected)
    check_dense_folder(model, tmp_path, expected)
    assert sorted(convert(model, "2:4").converted) == sorted(sparse)  # The plain model can be converted again.
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_inside_another_module_is_no_longer_quantised(tmp_path):
    model = load(folder_of("qwen2", "latent", tmp_path))
    expected = logits(model)
    revert(nn.ModuleDict({"network": model}))
    check_dense_folder(model, tmp_path, expected)


def test_a_configuration_set_by_hand_is_removed_and_that_of_others_stays():
    model = build("qwen2")
    convert(model, "2:4")
    model.config.quantization_config = config_of(model, "latent")
    revert(model)
    assert not hasattr(model.config, "quantization_config")
    convert(model, "2:4")
    model.config.quantization_config = {"quant_method": "another"}
    revert(model)
    assert model.config.quantization_config == {"quant_method": "another"}


def test_dtypes(tmp_path):
    folder = folder_of("qwen2", "packed", tmp_path)
    model = load(folder, dtype=torch.bfloat16)
    revert(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for form in ("packed", "latent"):
        model = load(folder_of("qwen2", form, tmp_path))
        names = list(sparse_layers(model))
        model.dequantize(torch.bfloat16)
        assert {model.get_submodule(name).weight.dtype for name in names} == {torch.bfloat16}
        assert model.model.embed_tokens.weight.dtype == torch.float32


@pytest.mark.parametrize("form", ["packed", "latent"])
def test_a_model_that_was_cast_after_loading_is_dequantised_in_its_present_dtype(form, tmp_path):
    model = load(folder_of("qwen2", form, tmp_path), dtype=torch.bfloat16).to(torch.float32)
    expected = logits(model)
    model.dequantize()  # The configuration still says bfloat16.
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "mixtral"])
def test_layers_that_were_packed_in_place_or_loaded_packed(name, tmp_path):
    expected = build(name).eval()
    convert(expected, "2:4", activation_bits=None)
    save_sparse(expected, tmp_path / "packed")
    packed = pack_layers(build(name).eval())  # Nothing is sparse yet.
    convert(packed, "2:4", activation_bits=None)
    pack_layers(packed)
    loaded = build(name).eval()
    load_sparse(loaded, tmp_path / "packed")
    load_sparse(loaded, tmp_path / "packed")  # The second time, the layers are packed already.
    revert(expected)
    for model in (packed, loaded):
        assert revert(model)
        assert {key: type(one) for key, one in model.named_modules()} == {
            key: type(one) for key, one in expected.named_modules()
        }
        torch.testing.assert_close(logits(model), logits(expected))


def test_a_packed_layer_by_itself_and_one_that_cannot_be_reverted():
    layer = nn.Linear(8, 4)
    convert(layer, "2:4", activation_bits=None)
    x = torch.randn(3, 8)
    expected = layer(x)
    root = pack_layers(nn.Sequential(layer))
    packed = root[0]
    assert revert(packed) == [""]
    assert root[0] is packed
    assert type(packed) is nn.Linear
    assert vars(packed).keys() == vars(nn.Linear(8, 4)).keys()
    torch.testing.assert_close(packed(x), expected)
    assert packed.weight.requires_grad
    convert(root, "2:4")
    pack_layers(root)
    root[0].forward = lambda x: x
    with pytest.raises(ConfigError, match="cannot be reverted: 0: somebody replaced its forward"):
        revert(root)
