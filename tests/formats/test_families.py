"""Model families: transformers' own models go in, compute the same here, train, and come out in every format."""

import json

import pytest
import torch

from sbn_lightning import SparseBitNet, TransformerConfig
from sbn_lightning.checkpoints.text_files import TextFiles
from sbn_lightning.cli import main
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data.tokenizer import byte_tokenizer
from sbn_lightning.formats import load_model
from sbn_lightning.formats.huggingface.config import from_hf, to_hf
from sbn_lightning.formats.huggingface.write import write_hf
from sbn_lightning.formats.packed import ternary_layers, write_packed
from sbn_lightning.inference import generate
from sbn_lightning.models.families.registry import FAMILIES, family_of, gguf_of
from tests.formats.models import logits, make_model, save, some_tokens
from tests.helpers import quiet_trainer, small_config, token_loader

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
# The name of a case begins with the family. Each case has fields of config.json, and the options that come of them.
CASES = {
    "Qwen3": ({"head_dim": 16}, {"head_dim": 16, "qk_norm": "head"}),
    "Qwen3, windows": (
        {"head_dim": 8, "attention_bias": True, "max_window_layers": 2, **WINDOW},
        {"qk_norm": "head", "qkv_bias": True, "o_bias": True, "sliding_window": 5, "sliding_layers": (2, 3)},
    ),
    "Mistral": ({"sliding_window": 5, "head_dim": 16}, {"sliding_window": 5, "head_dim": 16}),
    "Llama, biases": (
        {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "head_dim": 32},
    ),
    "Llama, YaRN": ({"rope_parameters": YARN}, {}),
    "Llama, YaRN of its own": (
        {"rope_parameters": {**YARN, "attention_factor": 1.7, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}},
        {},
    ),
    "Llama, YaRN of DeepSeek": ({"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}}, {}),
    "Llama, linear": ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, {}),
    "Llama, dynamic": ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, {}),
    "Llama, squared ReLU": ({"hidden_act": "relu2"}, {"activation": "relu2"}),
    "Qwen2, windows": (
        {"layer_types": ["full_attention", "sliding_attention"] * 2, **WINDOW},
        {"qkv_bias": True, "sliding_window": 5, "sliding_layers": (1, 3)},
    ),
    "SmolLM3": ({}, {"layers_without_rope": (3,)}),
    "SmolLM3, windows": (
        {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True, **WINDOW},
        {
            "layers_without_rope": (1, 3),
            "sliding_window": 5,
            "sliding_layers": (1, 3),
            "qkv_bias": True,
            "o_bias": True,
            "mlp_bias": True,
        },
    ),
    "Olmo2": ({"rope_parameters": YARN}, {"qk_norm": "projection", "post_norm": True}),
    "Olmo2, biases": (
        {"attention_bias": True, "tie_word_embeddings": True},
        {"qk_norm": "projection", "post_norm": True, "qkv_bias": True, "o_bias": True},
    ),
    "BitNet": ({}, {"sub_norms": True, "activation": "relu2"}),
    "BitNet, biases": (
        {"attention_bias": True, "tie_word_embeddings": True},
        {"sub_norms": True, "activation": "relu2", "qkv_bias": True, "o_bias": True},
    ),
}


def make_hf(case, **more):
    """A small random model in which norms and biases do not have their initial values."""
    family, (fields, _) = case.partition(",")[0], CASES[case]
    config_class, model_class = (getattr(transformers, f"{family}{kind}") for kind in ("Config", "ForCausalLM"))
    torch.manual_seed(0)
    model = model_class(config_class(**(SHAPE | fields | more)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(5)
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """The name of a case, the model of transformers, and the same model of ours."""
    folder = tmp_path_factory.mktemp("family")
    theirs = make_hf(request.param)
    theirs.save_pretrained(folder)
    return request.param, theirs, load_model(folder)


def test_logits_are_those_of_transformers(case):
    """The text is longer than the windows, and than the contexts that scaled positions were first trained with."""
    name, theirs, ours = case
    tokens = some_tokens(length=60)
    expected = logits(theirs, tokens)
    torch.testing.assert_close(
        logits(ours.model, tokens) / expected.std(), expected / expected.std(), rtol=0, atol=2e-5
    )
    found = ours.config.beyond_plain_blocks() | ({"qkv_bias": True} if ours.config.qkv_bias else {})
    assert found == CASES[name][1]


def test_an_export_is_the_same_model_for_transformers_and_for_us(case, tmp_path):
    _, theirs, ours = case
    write_hf(ours, tmp_path)
    back, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(back) is type(theirs)
    assert torch.equal(logits(back, some_tokens()), logits(theirs, some_tokens()))
    again = load_model(tmp_path)
    assert again.config == ours.config
    state = ours.model.state_dict()
    assert again.model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in again.model.state_dict().items())


def test_generation_continues_as_the_whole_forward_does(case):
    """Prompts are shorter and longer than the windows, and grow beyond them."""
    name, _, ours = case
    if "," in name and not ours.config.sliding_window:
        pytest.skip("this case differs from another one in biases and positions only")
    prompts = [row[:length].tolist() for row, length in zip(some_tokens(length=12), (12, 3), strict=True)]
    for prompt, new in zip(prompts, generate(ours.model, prompts, max_new_tokens=8), strict=True):
        text = list(prompt)
        for _ in range(8):
            text.append(int(logits(ours.model, torch.tensor([text]))[0, -1].argmax()))
        assert new == text[len(prompt) :]


TERNARY = {
    "llama": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "head_dim": 32},
    "qwen2": {"qkv_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen3": {"qk_norm": "head", "head_dim": 32},
    "smollm3": {"layers_without_rope": (3,), "head_dim": 32},
    "olmo2": {"qk_norm": "projection", "post_norm": True, "tie_embeddings": False},
    "bitnet": {"sub_norms": True, "activation": "relu2"},
}


def make_ternary(name, **more):
    shape = {"d_model": 64, "n_layers": 4 if name == "smollm3" else 2, "vocab_size": 257, "pattern": "2:4"}
    return make_model(**shape, **TERNARY[name], **more)


@pytest.mark.parametrize("name", TERNARY)
def test_a_ternary_model_of_the_family_trains_and_is_packed(name, tmp_path):
    model = make_ternary(name)
    assert family_of(model.config).name == name
    module = SparseBitNet(model.config)
    before = {key: value.clone() for key, value in module.model.state_dict().items() if "norm" in key}
    quiet_trainer(max_steps=2).fit(module, token_loader(vocab_size=257))
    assert all(not torch.equal(value, before[key]) for key, value in module.model.state_dict().items() if key in before)
    write_packed(module.model, tmp_path, TextFiles(), embedding_bits=32)
    back = load_model(tmp_path)
    assert back.config == model.config
    assert torch.equal(logits(back.model, some_tokens(257)), logits(module.model.eval(), some_tokens(257)))


@pytest.mark.parametrize("name", [name for name in TERNARY if name != "mistral"])
def test_gguf_holds_the_family(name, tmp_path):
    pytest.importorskip("gguf")
    changes = {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16, "rope_type": "yarn"}}
    model = make_ternary(name, d_ffn=128, **changes)
    save(model, tmp_path / "m.ckpt")
    arguments = ["--checkpoint", "m.ckpt", "--output", "out", "--quantization", "Q4_0", "--embedding_bits", "32"]
    assert main(["export", "--format", "gguf", *arguments]) == 0
    back = load_model("out")
    # The file says nothing of the pattern and of quantised activations.
    wanted = TransformerConfig(**(model.config.to_dict() | {"linear": "dense", "pattern": "6:8"}))
    assert back.config == wanted
    for layer in ternary_layers(model).values():
        layer.activation_bits = None
    expected = logits(model, some_tokens(257))
    assert (logits(back.model, some_tokens(257)) - expected).abs().max() < 0.02 * expected.std()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sliding_window": 5}, "llama does not read sliding_window=5"),
        ({"activation": "relu2"}, "llama does not read activation=relu2"),
        ({"qk_norm": "head", "qkv_bias": True, "o_bias": True}, "qwen3 does not read o_bias=True"),
        ({"layers_without_rope": (1,)}, "smollm3 needs layers_without_rope=(), not (1,)"),
        ({"qk_norm": "projection", "post_norm": True}, "olmo2 needs tie_embeddings=False"),
        ({"sub_norms": True, "tie_embeddings": False}, "bitnet needs tie_embeddings=True"),
        (
            {"qk_norm": "head", "rope_scaling": (8.0, 1.0, 4.0, 32)},
            "qwen3 does not read rope_scaling of the type llama3",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "beta_fast": 8.0}}, "llama reads YaRN with beta_fast=32"),
        ({"sub_norms": True, "mlp_bias": True}, "no model family of transformers has these options together"),
    ],
    ids=str,
)
def test_what_llama_cpp_does_not_compute_is_refused(options, reason):
    scaling = options.get("rope_scaling")
    if isinstance(scaling, tuple):
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        options = options | {"rope_scaling": dict(zip(names, scaling, strict=True))}
    elif scaling is not None:
        options = options | {"rope_scaling": {"factor": 2.0, "original_max_position_embeddings": 32, **scaling}}
    with pytest.raises(ConfigError) as error:
        gguf_of(small_config(**options))
    assert reason in str(error.value)
    assert "--format packed" in str(error.value)


def test_a_window_beyond_the_context_is_no_obstacle():
    assert gguf_of(small_config(sliding_window=64)).name == "llama"
    assert family_of(small_config(sliding_window=64)).name == "mistral"


def test_every_family_reads_what_it_writes():
    for family in FAMILIES.values():
        config = from_hf(SHAPE | {"model_type": family.name}, "config.json")
        assert family.differing(config) == {}
        written = json.loads(json.dumps(to_hf(config, "float32")))
        assert from_hf(written, "config.json") == config


def test_import_and_init_from_by_command(tmp_path, capsys):
    """The new run gets every option of the family from the weights, and computes the same before its first step."""
    theirs = make_hf("Qwen3, windows")
    theirs.save_pretrained(tmp_path / "in")
    byte_tokenizer().save(str(tmp_path / "in" / "tokenizer.json"))
    assert main(["import-hf", "--input", "in", "--output", "m.ckpt"]) == 0
    assert "qk_norm head, sliding_window 5" in capsys.readouterr().out
    loaded = load_model("m.ckpt")
    with pytest.raises(ConfigError, match=r"qk_norm: head, sliding_window: 5, sliding_layers: \[2, 3\]"):
        SparseBitNet(small_config(linear="dense", n_layers=4), init_from="m.ckpt").configure_model()
    module = SparseBitNet(loaded.config, init_from="m.ckpt")
    module.configure_model()
    tokens = some_tokens(length=40)
    assert torch.equal(logits(module.model.eval(), tokens), logits(loaded.model, tokens))
