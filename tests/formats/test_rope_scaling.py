"""Rotary positions of Llama 3.1 to 3.3 (rope_type llama3): the formula, and the way through every format."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from sbn_lightning import RopeScaling
from sbn_lightning.checkpoints import lightning_file
from sbn_lightning.cli import main
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.formats import load_model
from sbn_lightning.formats.huggingface.config import from_hf, to_hf
from sbn_lightning.models.rope import rope_frequencies, rope_stretch, rope_tables
from tests.formats.models import logits, make_model, save, some_tokens
from tests.formats.test_hf import KINDS, SHAPE, import_hf, make_hf, save_hf
from tests.helpers import small_config

transformers = pytest.importorskip("transformers")

# A head of 8 features has four wavelengths: one is unchanged, one is stretched in part, two are stretched in full.
NUMBERS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SCALED = {"rope_scaling": NUMBERS, "max_sequence_length": 256}
HF = {"rope_theta": 1e4, "max_position_embeddings": 256}


def long_tokens():
    return some_tokens(length=200)


def test_each_wave_is_stretched_by_the_formula():
    config = small_config(d_model=512, rope_theta=5e5, **SCALED)
    stretch = rope_stretch(config.rope_scaling, rope_frequencies(config))
    assert stretch.shape == (64,)
    seen = set()
    for i, got in enumerate(stretch.tolist()):
        wave = 2 * math.pi * 5e5 ** (2 * i / 128)
        if wave < 64 / 4:
            expected, kind = 1.0, "kept"
        elif wave > 64 / 1:
            expected, kind = 8.0, "stretched"
        else:
            smooth = (64 / wave - 1) / (4 - 1)
            expected, kind = 1 / ((1 - smooth) / 8 + smooth), "between"
        assert got == pytest.approx(expected, rel=1e-12)
        seen.add(kind)
    assert seen == {"kept", "stretched", "between"}


def test_no_scaling_and_a_factor_of_1_are_the_same_tables():
    plain, one = (rope_tables(small_config(rope_scaling=scaling)) for scaling in (None, RopeScaling(1.0, 1.0, 4.0, 64)))
    assert all(torch.equal(a, b) for a, b in zip(plain, one, strict=True))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_in_from_transformers_and_back_out(tmp_path, kind):
    theirs = make_hf(kind, **HF, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, **NUMBERS})
    tokens = long_tokens()
    expected = logits(theirs, tokens)
    unscaled = make_hf(kind, **HF, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert (logits(unscaled, tokens) - expected).abs().max() > 0.1
    folder = save_hf(theirs, tmp_path / "in")
    assert import_hf("--input", folder, "--output", "m.ckpt") == 0
    loaded = load_model("m.ckpt")
    assert loaded.config.rope_scaling == RopeScaling(**NUMBERS)
    torch.testing.assert_close(logits(loaded.model, tokens), expected, rtol=1e-4, atol=1e-4)
    assert main(["export", "--checkpoint", "m.ckpt", "--output", "back", "--format", "hf"]) == 0
    back = getattr(transformers, KINDS[kind][1]).from_pretrained("back")
    assert torch.equal(logits(back, tokens), expected)


def test_config_json_of_transformers_4():
    """The file has ``rope_scaling``, as Llama 3.1 was published. An export writes the key too, for transformers 4."""
    published = SHAPE | HF | {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", **NUMBERS}}
    config = from_hf(published, "config.json")
    assert (config.rope_theta, config.rope_scaling) == (1e4, RopeScaling(**NUMBERS))
    written = to_hf(config, "float32")
    assert written["rope_scaling"] == {"rope_type": "llama3", **NUMBERS}
    assert "rope_scaling" not in to_hf(small_config(), "float32")
    for key in ("rope_scaling", "rope_parameters"):
        assert from_hf({name: value for name, value in written.items() if name != key}, "config.json") == config


def test_where_the_original_context_is_not_given_or_given_twice():
    scaling = {"rope_type": "llama3", **NUMBERS}
    values = SHAPE | HF | {"model_type": "llama", "rope_scaling": scaling}
    named = "original_max_position_embeddings"
    assert getattr(from_hf(values | {named: 32}, "config.json").rope_scaling, named) == 32
    del scaling[named]
    assert getattr(from_hf(values, "config.json").rope_scaling, named) == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 0.5}, r"config\.json: rope_scaling: factor=0\.5 must be 1 or more"),
        ({"high_freq_factor": 1.0}, "low_freq_factor=1.0 must be above 0 and below high_freq_factor=1.0"),
        ({"low_freq_factor": 0.0}, "low_freq_factor=0.0 must be above 0"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings=0 must be at least 1"),
        ({"factor": None}, "holds a value of the wrong kind"),
        ({"factor": "many"}, "holds a value of the wrong kind"),
    ],
)
def test_numbers_that_cannot_be_are_refused(changes, message):
    values = SHAPE | HF | {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", **NUMBERS, **changes}}
    with pytest.raises(ConfigError, match=message):
        from_hf(values, "config.json")


def test_a_number_that_is_missing_is_named():
    values = SHAPE | HF | {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    with pytest.raises(ConfigError, match=r"config\.json lacks low_freq_factor"):
        from_hf(values, "config.json")


def test_packed(tmp_path):
    model = make_model(**SCALED)
    save(model, tmp_path / "m.ckpt")
    assert main(["export", "--checkpoint", "m.ckpt", "--output", "packed", "--dtype", "float32"]) == 0
    loaded = load_model("packed")
    assert loaded.config.rope_scaling == RopeScaling(**NUMBERS)
    assert torch.equal(logits(loaded.model, long_tokens()), logits(model, long_tokens()))


def test_hf_bitnet(tmp_path):
    pytest.importorskip("accelerate", reason="transformers needs it to load a bitnet model")
    model = make_model(**SCALED)
    save(model, tmp_path / "m.ckpt")
    assert main(["export", "--checkpoint", "m.ckpt", "--output", "out", "--format", "hf-bitnet"]) == 0
    torch.compiler.set_stance("force_eager")
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained("out")
        expected, actual = logits(model, long_tokens()), logits(theirs.eval(), long_tokens())
    finally:
        torch.compiler.set_stance("default")
    assert ((actual - expected).abs().amax(-1) / expected.std()).median() < 1e-5


def test_gguf(tmp_path, capsys):
    gguf = pytest.importorskip("gguf")
    wide = {"d_model": 256, "d_ffn": 512, "n_layers": 1}
    for name, changes in (("m.ckpt", SCALED), ("plain.ckpt", {}), ("qwen.ckpt", SCALED | {"qkv_bias": True})):
        save(make_model(**wide, **changes), tmp_path / name)

    def export(name):
        return main(["export", "--checkpoint", name, "--output", f"{name}.out", "--format", "gguf"])

    def divisors(name):
        tensors = {t.name: t for t in gguf.GGUFReader(f"{name}.out/model-TQ2_0.gguf").tensors}
        return tensors.get(f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight")

    assert export("m.ckpt") == 0
    assert export("plain.ckpt") == 0
    found, config = divisors("m.ckpt"), small_config(**wide, **SCALED)
    assert divisors("plain.ckpt") is None
    assert found.tensor_type.name == "F32"
    # llama.cpp turns pair j at position p by p * theta ** (-2 j / E) / divisor j.
    angles = 1e4 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64) / torch.tensor(found.data).double()
    cos, _ = rope_tables(config)
    torch.testing.assert_close((100 * angles).cos().float(), cos[100, :32], rtol=0, atol=1e-4)
    capsys.readouterr()
    # Of the two architectures of llama.cpp that read biases of q, k and v, only llama reads divisors.
    assert export("qwen.ckpt") == 0
    assert "architecture llama" in capsys.readouterr().out
    assert divisors("qwen.ckpt") is not None


def test_a_checkpoint_from_before(tmp_path):
    model = make_model()
    contents = lightning_file.contents(model.config, model.state_dict())
    assert contents["hyper_parameters"]["config"].pop("rope_scaling") is None
    torch.save(contents, tmp_path / "m.ckpt")
    assert torch.equal(logits(load_model("m.ckpt").model, some_tokens()), logits(model, some_tokens()))


def test_a_checkpoint_with_an_unknown_number(tmp_path):
    model = make_model(**SCALED)
    contents = lightning_file.contents(model.config, model.state_dict())
    contents["hyper_parameters"]["config"]["rope_scaling"]["attention_factor"] = 2.0
    torch.save(contents, tmp_path / "m.ckpt")
    with pytest.raises(DataError, match=r"its configuration cannot be used here: .*attention_factor"):
        load_model("m.ckpt")


@pytest.mark.parametrize("command", ["fit", "fabric"])
def test_training_from_scaled_weights(tmp_path, tokens, monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "argv", ["sbn"])
    start = make_model(linear="dense", n_layers=1, **SCALED)
    save(start, tmp_path / "m.ckpt")
    values = {key: value for key, value in start.config.to_dict().items() if value is not None}
    values |= {"linear": "ternary", "rope_scaling": json.dumps(NUMBERS)}
    recipe = Path(__file__).parents[2] / "recipes/sparse_pretrain.yaml"
    words = [command, "--config", str(recipe), *(f"--model.config.{key}={value}" for key, value in values.items())]
    words += ["--model.init_from=m.ckpt", f"--data.path={tokens}", "--data.batch_size=2", "--data.num_workers=0"]
    words += ["--data.sequence_length=16", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    words += ["--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0", "--trainer.max_steps=1"]
    words += ["--checkpoint.every_n_train_steps=1"]
    assert main([*words, "--model.config.rope_scaling.factor=4"]) == 1
    assert "set model.config to rope_scaling: {'factor': 8.0, 'low_freq_factor': 1.0, " in capsys.readouterr().err
    assert main(words) == 0
    last = sorted(Path("logs").glob("**/last.ckpt"))[-1]
    assert load_model(last).config.rope_scaling == RopeScaling(**NUMBERS)
    assert main([*words, f"--ckpt_path={last}", "--trainer.max_steps=2"]) == 0
