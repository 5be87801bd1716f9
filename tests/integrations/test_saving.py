"""``save_packed``: the options of ``save_pretrained``, and models in the middle of a ramp or a warm-up."""

import json
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

import sbn_lightning.backends.selection as selection  # noqa: E402
from sbn_lightning.core.errors import ConfigError  # noqa: E402
from sbn_lightning.formats.huggingface.sbn import model_card  # noqa: E402
from sbn_lightning.integrations.folder import save_sparse  # noqa: E402
from sbn_lightning.integrations.huggingface import save_packed  # noqa: E402
from sbn_lightning.integrations.pytorch import convert  # noqa: E402
from sbn_lightning.layers.experts_linear import PackedExperts  # noqa: E402
from sbn_lightning.layers.packed import PackedTernaryLinear, pack_layers  # noqa: E402
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear, ternary_layers  # noqa: E402
from tests.formats.models import make_model, save  # noqa: E402
from tests.integrations.families import build  # noqa: E402

TOKENS = torch.arange(3, 15)[None]


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def ternary(name="qwen2", pattern="2:4"):
    model = build(name).eval()
    convert(model, pattern)
    return model


def early(name="qwen2"):
    """A model in the middle of a ramp: of one layer, half of the rows are dense."""
    model = ternary(name)
    next(reversed(ternary_layers(model).values())).set_density(2, 0.5)
    return model


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_a_folder_from_the_middle_of_a_ramp_says_so_and_loads(name, tmp_path, monkeypatch):
    model = early(name)
    expected = logits(model)
    with pytest.warns(UserWarning, match="written before the ramp to 2:4 had ended"):
        save_packed(model, tmp_path / "early")
    values = json.loads((tmp_path / "early" / "config.json").read_text())["quantization_config"]
    # One pattern for all layers: vLLM computes q, k and v as one layer, and refuses parts that differ.
    assert values["pattern"] == "4:4"
    assert not any("pattern" in own for own in values["modules"].values())
    card = (tmp_path / "early" / "README.md").read_text()
    assert "| pattern | 4:4: no fixed pattern of zeros. Written before the ramp to 2:4 had ended |" in card
    assert "at most 2 of every 4" not in card
    assert torch.equal(logits(load(tmp_path / "early")), expected)


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_codes_that_break_their_pattern_get_a_kernel_that_can_hold_them(name, tmp_path, monkeypatch):
    # The folders of earlier versions name 2:4 although groups have more than two non-zeros.
    asked = []
    choose = selection.choose_packed
    monkeypatch.setattr(selection, "choose_packed", lambda *args: (asked.append(args[2:4]), choose(*args))[1])
    model = pack_layers(early(name))
    layers = [layer for layer in model.modules() if isinstance(layer, PackedTernaryLinear)]
    assert any(isinstance(layer, PackedExperts) for layer in layers) == (name == "mixtral")
    for layer in layers:
        layer._settle()
    assert asked == [(2, 4)] * (len(layers) - 1) + [(4, 4)]
    asked.clear()
    for pattern in ("6:8", "1:4", "4:4"):
        layer = SparseBitLinear(32, 8, pattern=pattern)
        pack_layers(torch.nn.ModuleList([layer]))[0]._settle()
    assert asked == [(6, 8), (2, 4), (4, 4)]


def test_our_own_export_says_so_too(tmp_path):
    from sbn_lightning.formats.huggingface.sbn import write_hf_sbn
    from sbn_lightning.formats.load import load_model

    model = make_model(pattern="2:4")
    for layer in ternary_layers(model).values():
        layer.set_density(3)
    save(model, tmp_path / "m.ckpt")
    (tmp_path / "out").mkdir()
    with pytest.warns(UserWarning, match="before the ramp to 2:4 had ended"):
        write_hf_sbn(load_model(tmp_path / "m.ckpt"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["pattern"] == "3:4"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| pattern | 3:4: at most 3 of every 4 weights in a row are not zero. Written before" in card


def test_a_whole_model_is_saved_without_a_warning(tmp_path, recwarn):
    save_packed(ternary(), tmp_path / "packed")
    assert not [one for one in recwarn if "sbn_lightning" in one.filename or "save_packed" in str(one.message)]
    assert "| pattern | 2:4: at most 2 of every 4" in (tmp_path / "packed" / "README.md").read_text()


def test_a_card_names_all_patterns_of_a_model():
    modules = {"a": {"pattern": "2:4", "activation_bits": 8}, "b": {"pattern": "6:8", "activation_bits": None}}
    card = model_card({"architecture": "A", "modules": modules, "remark": None, "zeros": 0.5, "perplexity": None})
    assert "# A ternary model, 2:4, 6:8" in card
    assert "| pattern | 2:4: at most 2 of every 4 weights in a row are not zero; 6:8: at most 6 of every 8" in card
    assert "| activations | quantised to 8 bits, token by token; as they are |" in card


def test_a_model_within_its_rounding_warm_up_is_named(tmp_path):
    model = ternary()
    for layer in ternary_layers(model).values():
        layer.set_rounding(0.5, 0.5)
    with pytest.warns(UserWarning, match=r"q_proj and 13 more layers are in the middle of the rounding warm-up"):
        save_packed(model, tmp_path / "packed")
    for layer in list(ternary_layers(model).values())[1:]:
        layer.set_rounding(1, 1)
    with pytest.warns(UserWarning, match=r"save_sparse: .*q_proj is in the middle of the rounding warm-up") as got:
        save_sparse(model, tmp_path / "sparse")
    assert got[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_sparse(model, tmp_path / "latent", form="latent")


def test_options_of_save_pretrained(tmp_path):
    model = ternary()
    save_packed(model, tmp_path / "packed", max_shard_size="20KB")
    assert len(list((tmp_path / "packed").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "packed")), logits(model))
    save_packed(model, tmp_path / "other", variant="small")
    assert torch.equal(logits(load(tmp_path / "other", variant="small")), logits(model))
    save_packed(model, tmp_path / "second", is_main_process=False)
    assert not (tmp_path / "second" / "README.md").exists()
    with pytest.raises(ConfigError, match="push_to_hub would replace the model card"):
        save_packed(model, tmp_path / "packed", push_to_hub=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("named", ["4:4", "2:4"])
def test_a_folder_from_the_middle_of_a_ramp_loads_on_a_gpu(named, tmp_path):
    model = build("qwen2", hidden_size=256, intermediate_size=512).eval()
    convert(model, "2:4")
    next(reversed(ternary_layers(model).values())).set_density(2, 0.5)
    with pytest.warns(UserWarning, match="written before the ramp"):
        save_packed(model, tmp_path / "early")
    file = tmp_path / "early" / "config.json"
    values = json.loads(file.read_text())
    values["quantization_config"]["pattern"] = named  # Earlier versions named the final pattern.
    file.write_text(json.dumps(values))
    loaded = load(tmp_path / "early", device_map={"": 0})
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=TOKENS.cuda()).logits.cpu(), logits(model), rtol=1e-3, atol=1e-3)
