"""The packed layout of transformers' bitnet; transformers itself reads what is written."""

import json

import pytest
import safetensors.torch as safetensors
import torch

from sbn_lightning.cli import main
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.formats import load_model
from sbn_lightning.formats.huggingface.bitnet import unpack_rows
from sbn_lightning.formats.huggingface.write import pack_rows
from sbn_lightning.formats.packed import ternary_layers
from tests.formats.models import logits, make_model, save, some_tokens

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers needs it to load a bitnet model")


@pytest.fixture(autouse=True)
def _eager():
    """Run the quantisers of transformers eagerly. Compiled, they take half a minute and round differently."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def export(*more):
    return main(["export", "--checkpoint", "m.ckpt", "--output", "out", "--format", "hf-bitnet", *more])


def test_rows_are_packed_as_transformers_packs_them():
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    codes = torch.randint(-1, 2, (12, 7), dtype=torch.int8)
    packed = pack_rows(codes)
    assert torch.equal(packed, pack_weights(codes.clone()))  # which changes its argument
    assert torch.equal(unpack_weights(packed, torch.float32), codes.float())
    assert packed[1, 2] == sum((int(codes[1 + 3 * i, 2]) + 1) << 2 * i for i in range(4))


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
@pytest.mark.parametrize(
    ("options", "architecture"),
    [
        ({"pattern": "2:4"}, "LlamaForCausalLM"),
        ({"qkv_bias": True, "tie_embeddings": False, "rope_theta": 1e6}, "Qwen2ForCausalLM"),
        ({"sub_norms": True, "activation": "relu2"}, "BitNetForCausalLM"),
        ({"qk_norm": "head", "head_dim": 16, "sliding_window": 9, "sliding_layers": (1,)}, "Qwen3ForCausalLM"),
    ],
)
def test_logits_are_ours(tmp_path, linear_class, options, architecture):
    """Equal up to float32 rounding, and one 8-bit step where ``x * (127 / max)`` is not ``x / (max / 127)``."""
    model = make_model(**options)
    save(model, tmp_path / "m.ckpt")
    assert export("--linear_class", linear_class) == 0
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not any(report.values())
    assert type(theirs).__name__ == architecture
    assert "BitLinear" in type(theirs.model.layers[0].mlp.up_proj).__name__
    tokens = some_tokens(length=48)
    expected, actual = logits(model, tokens), logits(theirs.eval(), tokens)
    error = (actual - expected).abs().amax(-1) / expected.std()
    assert error.median() < 1e-5
    assert error.max() < 2e-2
    # Gate and up have different scales, and so have q, k and v. A scale shared by mistake would show.
    assert model.blocks[0].mlp.gate_up.ternary()[1].unique().numel() == 2


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_in_bfloat16(tmp_path, linear_class):
    """The export chooses the dtype, because transformers does not cast the dense part of a bitnet model."""
    model = make_model(qkv_bias=True)
    save(model, tmp_path / "m.ckpt")
    assert export("--linear_class", linear_class, "--dtype", "bfloat16") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out")
    actual, expected = logits(theirs, some_tokens()), logits(model, some_tokens())
    assert actual.dtype == torch.bfloat16
    assert ((actual - expected).abs().amax(-1) / expected.std()).median() < 0.1


def test_each_layer_is_ours(tmp_path):
    """A layer by itself, without roundings before it, differs by float32 rounding only."""
    model = make_model(qkv_bias=True)
    save(model, tmp_path / "m.ckpt")
    x = torch.randint(-127, 128, (5, 32)).float()
    x[:, 0] = 127  # s = 1: the tokens are their own codes
    layer = model.blocks[1].attention.qkv
    for linear_class in ("bitlinear", "autobitlinear"):
        export("--linear_class", linear_class, "--overwrite=true")
        attention = transformers.AutoModelForCausalLM.from_pretrained("out").model.layers[1].self_attn
        with torch.no_grad():
            actual = torch.cat(
                [projection(x) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)], -1
            )
            torch.testing.assert_close(actual, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"qkv_bias": True, "tie_embeddings": False}])
def test_it_is_read_back(tmp_path, linear_class, options):
    """Codes come back exactly. Gamma and biases are rounded, because the layout stores quotients."""
    model = make_model(**options)
    save(model, tmp_path / "m.ckpt")
    assert export("--linear_class", linear_class) == 0
    loaded = load_model("out")
    assert (loaded.format, loaded.config.pattern) == ("hf-bitnet", model.config.pattern)
    for name, layer in ternary_layers(model).items():
        again = loaded.model.get_submodule(name)
        assert torch.equal(again.codes, layer.ternary()[0])
        torch.testing.assert_close(again.gamma, layer.ternary()[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(logits(loaded.model, some_tokens()), logits(model, some_tokens()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_mode": "sometimes"}, "quantization_mode 'sometimes' is neither offline nor online"),
        ({"use_rms_norm": True}, "use_rms_norm puts a norm before each linear layer"),
    ],
)
def test_other_layouts_of_it_are_refused(tmp_path, change, message):
    save(make_model(), tmp_path / "m.ckpt")
    export()
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        load_model("out")


def test_a_model_of_others_counts_as_dense(tmp_path):
    """The config of such a model names no pattern."""
    save(make_model(pattern="2:4"), tmp_path / "m.ckpt")
    export()
    config = json.loads((tmp_path / "out/config.json").read_text())
    del config["sbn"]
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    assert str(load_model("out").config.pattern) == "8:8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_bits": 4}, "activation_bits=4"),
        ({"linear": "masked"}, "use --format hf"),
        # k has one head of 2 features, which is too few.
        ({"d_model": 24, "n_heads": 12, "n_kv_heads": 1, "d_ffn": 32}, "k_proj has 2 rows, not a multiple of 4"),
    ],
)
def test_what_it_cannot_hold_is_refused(tmp_path, capsys, options, message):
    save(make_model(**options), tmp_path / "m.ckpt")
    assert export() == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def median_error(found, expected):
    """The error of a typical token. At a tie one 8-bit step differs, which moves a few tokens by more."""
    return float(((found - expected).abs().amax(-1) / expected.std()).median())


def test_codes_that_are_numbers(tmp_path):
    """Codes of BitNet b1.58 2B4T that are not packed; transformers reads them as well."""
    model = make_model(sub_norms=True, activation="relu2")
    save(model, tmp_path / "m.ckpt")
    assert export("--linear_class", "autobitlinear") == 0
    tensors = safetensors.load_file("out/model.safetensors")
    numbers = {name: unpack_rows(t).float() if t.dtype == torch.uint8 else t for name, t in tensors.items()}
    safetensors.save_file(numbers, "out/model.safetensors", {"format": "pt"})
    again = load_model("out")
    assert again.config.sub_norms
    for name, layer in ternary_layers(model).items():
        assert torch.equal(again.model.get_submodule(name).codes, layer.ternary()[0])
    tokens = some_tokens(length=48)
    assert median_error(logits(again.model, tokens), logits(model, tokens)) < 1e-5
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert median_error(logits(theirs.eval(), tokens), logits(model, tokens)) < 1e-5
    numbers["model.layers.0.mlp.up_proj.weight"][0, 0] = 2
    safetensors.save_file(numbers, "out/model.safetensors")
    with pytest.raises(DataError, match=r"up_proj\.weight is of torch\.float32; codes are packed in uint8, or are -1"):
        load_model("out")


def test_latent_weights_that_transformers_quantises_in_each_forward(tmp_path):
    """The form in which BitNet b1.58 2B4T was published for training. The checkpoint holds the latent weights."""
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = transformers.BitNetConfig(**shape, **special)
    transformers.BitNetForCausalLM(config).save_pretrained("latent")
    values = json.loads((tmp_path / "latent/config.json").read_text())
    (tmp_path / "latent/config.json").write_text(json.dumps(values | {"quantization_config": quantization}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained("latent").eval()
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "AutoBitLinear"
    assert main(["import-hf", "--input", "latent", "--output", "m.ckpt"]) == 0
    loaded = load_model("m.ckpt")
    assert (loaded.config.linear, str(loaded.config.pattern)) == ("ternary", "8:8")
    tokens = some_tokens(length=48)
    assert median_error(logits(loaded.model, tokens), logits(theirs, tokens)) < 1e-5
