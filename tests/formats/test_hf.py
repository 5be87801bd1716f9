"""Import of Qwen2 and Llama from Hugging Face, and export back; transformers itself writes and reads the other side."""

import json
import shutil

import pytest
import safetensors.torch as safetensors
import torch

from sbn_lightning import SparseBitNet
from sbn_lightning.checkpoints.tokenizers import beside
from sbn_lightning.cli import main
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.data.tokenizer import byte_tokenizer
from sbn_lightning.formats import load_model
from sbn_lightning.formats.huggingface.config import from_hf
from tests.formats.models import logits, make_model, save, some_tokens
from tests.helpers import quiet_trainer, token_loader

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS = {"qwen2": ("Qwen2Config", "Qwen2ForCausalLM"), "llama": ("LlamaConfig", "LlamaForCausalLM")}


def make_hf(kind="qwen2", **changes):
    """A small random model in which norms and biases do not have their initial values."""
    config_class, model_class = (getattr(transformers, name) for name in KINDS[kind])
    torch.manual_seed(0)
    model = model_class(config_class(**(SHAPE | {"rope_theta": 1e6, "rms_norm_eps": 1e-5} | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(5)
    return model.eval()


def save_hf(model, folder, **options):
    model.save_pretrained(folder, **options)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def import_hf(*args):
    return main(["import-hf", *map(str, args)])


@pytest.mark.parametrize(
    ("kind", "changes", "options"),
    [
        ("qwen2", {"tie_word_embeddings": True}, {}),
        ("qwen2", {"num_key_value_heads": 4, "rope_theta": 12345.0}, {"max_shard_size": "20KB"}),
        ("llama", {}, {"max_shard_size": "20KB"}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 8, "rms_norm_eps": 1e-3}, {}),
    ],
)
def test_in_and_back_out(tmp_path, kind, changes, options):
    theirs = make_hf(kind, **changes)
    folder = save_hf(theirs, tmp_path / "in", **options)
    assert len(list(folder.glob("*.safetensors"))) > 1 if options else (folder / "model.safetensors").is_file()
    assert import_hf("--input", folder, "--output", "m.ckpt") == 0
    loaded = load_model("m.ckpt")
    tokens = some_tokens()
    expected = logits(theirs, tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(loaded.model, tokens), expected, rtol=1e-4, atol=1e-4)
    assert loaded.config.rope_theta == changes.get("rope_theta", 1e6)
    assert loaded.tokenizer_path == loaded.path  # the checkpoint carries its tokenizer
    assert beside(loaded.path).is_file()  # this file is for `prepare`
    assert torch.equal(logits(load_model(folder).model, tokens), logits(loaded.model, tokens))
    assert main(["export", "--checkpoint", "m.ckpt", "--output", "back", "--format", "hf"]) == 0
    back, report = getattr(transformers, KINDS[kind][1]).from_pretrained("back", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(back, tokens), expected)
    assert transformers.AutoTokenizer.from_pretrained("back")("abc")["input_ids"] == [97, 98, 99]
    # The config of Llama names its end token; where a config does not, the tokenizer names it.
    assert back.config.eos_token_id == {"qwen2": 256, "llama": 2}[kind]


def test_rotary_base_where_transformers_4_puts_it(tmp_path):
    folder = save_hf(make_hf(rope_theta=54321.0), tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    assert from_hf(config, "config.json").rope_theta == 54321.0  # transformers 5 writes rope_parameters
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    assert from_hf(config, "config.json").rope_theta == 54321.0
    del config["rope_theta"]
    assert from_hf(config, "config.json").rope_theta == 10000.0  # the default of transformers


def test_bfloat16_stays_as_it_is(tmp_path):
    folder = save_hf(make_hf("llama").bfloat16(), tmp_path / "in")
    import_hf("--input", folder, "--output", "m.ckpt")
    assert load_model("m.ckpt").model.embed.weight.dtype == torch.bfloat16
    assert main(["export", "--checkpoint", "m.ckpt", "--output", "back", "--format", "hf"]) == 0
    assert transformers.LlamaForCausalLM.from_pretrained("back").dtype == torch.bfloat16
    whole = load_model("m.ckpt", dtype=torch.float32).model
    expected = logits(transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), some_tokens())
    torch.testing.assert_close(logits(whole, some_tokens()), expected, rtol=1e-4, atol=1e-4)


def test_masked_model_goes_out_with_its_zeros(tmp_path):
    model = make_model(linear="masked", pattern="2:4", qkv_bias=True)
    save(model, tmp_path / "m.ckpt")
    assert main(["export", "--checkpoint", "m.ckpt", "--output", "out", "--format", "hf"]) == 0
    back = transformers.AutoModelForCausalLM.from_pretrained("out")
    torch.testing.assert_close(logits(back, some_tokens()), logits(model, some_tokens()), rtol=1e-4, atol=1e-5)
    assert (back.model.layers[0].self_attn.k_proj.weight == 0).float().mean() == 0.5


def test_a_ternary_model_does_not_go_out_as_plain_weights(tmp_path, capsys):
    save(make_model(), tmp_path / "m.ckpt")
    assert main(["export", "--checkpoint", "m.ckpt", "--output", "out", "--format", "hf"]) == 1
    assert "--format hf-bitnet" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": -1, "max_window_layers": 1}, "sliding_window=-1"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "has sliding_attention, and use_sliding"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "the type chunked_attention"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "which this model_type does not have"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "contradicts its sliding_window"),
        ("llama", {"head_dim": 15}, "head_dim=15 must be an even number"),
        ("bitnet", {"head_dim": 16}, "head_dim=16 times num_attention_heads=4"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"num_experts": 8}, "mixture of experts"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "awq"),
        ("gemma", {}, "model_type 'gemma'"),
        ("qwen2", {"hidden_size": None}, "lacks hidden_size"),
        ("llama", {"model_type": ["llama"]}, "model_type .'llama'. is not one of"),
        ("llama", {"rope_theta": -5.0}, "rope_theta=-5.0 must be above 0"),
        ("llama", {"rms_norm_eps": float("nan")}, "norm_eps=nan must be above 0"),
    ],
)
def test_what_the_model_cannot_be_is_refused_by_name(kind, changes, message):
    with pytest.raises(ConfigError, match=message):
        from_hf(SHAPE | {"model_type": kind} | changes, "config.json")


def test_values_of_the_wrong_kind_are_refused():
    for changes in ({"hidden_size": "wide"}, {"num_attention_heads": 0}, {"layer_types": 5}):
        with pytest.raises(ConfigError, match=r"config\.json holds a value of the wrong kind"):
            from_hf(SHAPE | {"model_type": "qwen2"} | changes, "config.json")


def test_the_older_name_of_scaled_positions_comes_first_as_in_transformers():
    both = {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    scaling = from_hf(SHAPE | {"model_type": "qwen2"} | both, "config.json").rope_scaling
    assert (scaling.rope_type, scaling.original_max_position_embeddings) == ("yarn", 64)


def test_sliding_window_that_is_not_used_is_no_obstacle():
    values = SHAPE | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32768}
    assert from_hf(values, "config.json").qkv_bias


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder, shard: shard.unlink(), "{shard} is missing"),
        (lambda folder, shard: shard.write_bytes(shard.read_bytes()[:-10]), "{shard} is damaged"),
        (lambda folder, shard: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder, shard: (folder / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
        (
            lambda folder, shard: [shard.unlink(), (folder / "model.safetensors.index.json").unlink()],
            "part 1 is missing",
        ),
        (lambda folder, shard: shutil.copy(sorted(folder.glob("*.safetensors"))[-1], shard), "lacks the tensor"),
    ],
)
def test_damaged_folders_are_named(tmp_path, capsys, damage, message):
    folder = save_hf(make_hf(), tmp_path / "in", max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[0]
    damage(folder, shard)
    assert import_hf("--input", folder, "--output", "m.ckpt") == 1
    assert message.format(shard=shard.name) in capsys.readouterr().err
    assert not (tmp_path / "m.ckpt").exists()


def test_tensors_that_have_no_place_are_refused(tmp_path, capsys):
    folder = save_hf(make_hf("llama", attention_bias=True), tmp_path / "in")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    assert import_hf("--input", folder, "--output", "m.ckpt") == 1
    assert "no part of the model takes, such as model.layers.0.self_attn.k_proj.bias" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.layers.0.self_attn.k_proj.weight", lambda t: t[:-1], "has the shape [15, 32], its config.json says 16"),
        ("model.layers.0.mlp.up_proj.weight", lambda t: t[:, 1:], "do not go together: [64, 32], [64, 31]"),
        ("model.layers.0.mlp.up_proj.weight", lambda t: torch.tensor(1.0), "has the shape []"),
        ("model.layers.1.mlp.down_proj.weight", lambda t: t.to(torch.float8_e4m3fn), "is of torch.float8_e4m3fn"),
        ("model.layers.1.mlp.down_proj.weight", lambda t: t.to(torch.int8), "is of torch.int8"),
        ("lm_head.weight", lambda t: torch.ones(320, 32), "and lm_head.weight is another tensor"),
        ("lm_head.weight", None, ""),  # some tools write a tied head as a second copy of the embeddings
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, capsys, name, change, message):
    folder = save_hf(make_hf(tie_word_embeddings=True), tmp_path / "in")
    tensors = safetensors.load_file(folder / "model.safetensors")
    found = tensors.get(name, tensors["model.embed_tokens.weight"]).clone()
    tensors[name] = found if change is None else change(found).clone()
    safetensors.save_file(tensors, folder / "model.safetensors")
    capsys.readouterr()
    assert import_hf("--input", folder, "--output", "m.ckpt") == (1 if message else 0)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == bool(message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "nowhere", "--output", "m.ckpt"], "nowhere does not exist"),
        (["--input", "in", "--output", "."], "is a folder; name a file in it"),
        (["--input", "in", "--output", "taken.ckpt"], "taken.ckpt is there already"),
        (["--input", "pickled", "--output", "m.ckpt"], "may run code when read"),
        (["--input", "in", "--output", "taken.ckpt/m.ckpt"], "cannot write taken.ckpt/m.ckpt"),
    ],
)
def test_import_errors_are_one_line(tmp_path, capsys, args, message):
    save_hf(make_hf(), tmp_path / "in")
    shutil.copytree(tmp_path / "in", tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
    (tmp_path / "taken.ckpt").write_text("something")
    capsys.readouterr()
    assert import_hf(*args) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_each_checkpoint_has_the_tokenizer_of_its_model(tmp_path):
    """Names may have dots, and a checkpoint may be replaced."""
    with_tokenizer = save_hf(make_hf(), tmp_path / "in")
    without = tmp_path / "without"
    shutil.copytree(with_tokenizer, without)
    (without / "tokenizer.json").unlink()
    for name in ("qwen-0.5b", "qwen-0.6b.ckpt"):
        assert import_hf("--input", with_tokenizer, "--output", tmp_path / name) == 0
    assert beside(tmp_path / "qwen-0.5b") == tmp_path / "qwen-0.5b.tokenizer.json"
    for name in ("qwen-0.5b", "qwen-0.6b.ckpt"):
        beside(tmp_path / name).unlink()
        assert load_model(name).need_tokenizer().get_vocab_size() == 257
    assert import_hf("--input", without, "--output", "qwen-0.5b", "--overwrite=true") == 0
    assert load_model("qwen-0.5b").tokenizer is None


def test_a_name_is_looked_up_on_the_hub(tmp_path, monkeypatch, capsys):
    folder = save_hf(make_hf(), tmp_path / "cache")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, tuple(allow_patterns)))
        if name == "Qwen/none":
            raise RuntimeError("404 Client Error\nmore lines")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert import_hf("--input", "Qwen/Qwen2.5-0.5B", "--output", "m.ckpt") == 0
    assert load_model("m.ckpt").config.vocab_size == 320
    assert asked[0][0] == "Qwen/Qwen2.5-0.5B"
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked[0][1])
    assert import_hf("--input", "Qwen/none", "--output", "n.ckpt") == 1
    assert "Qwen/none is no folder here, and the hub gives: 404 Client Error\n" in capsys.readouterr().err


def test_other_things_are_told_apart(tmp_path):
    for name, text in (("a.ckpt", "text"), ("m.gguf", "GGUF")):
        (tmp_path / name).write_text(text)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    saved = save(make_model(), tmp_path / "cut.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(saved[:-1000])
    middle = len(saved) // 2
    (tmp_path / "flip.ckpt").write_bytes(saved[:middle] + bytes([saved[middle] ^ 1]) + saved[middle + 1 :])
    torch.save({"state_dict": {}, "where": tmp_path}, tmp_path / "code.ckpt")
    (tmp_path / "run/checkpoints/last.ckpt").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last.ckpt/.metadata").write_text("")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("a.ckpt", r"a\.ckpt is no checkpoint; give a \.ckpt, the folder of a run, a packed or a Hugging Face folder"),
        ("cut.ckpt", r"cut\.ckpt is damaged: its end is missing$"),
        ("flip.ckpt", r"flip\.ckpt is damaged \(in .*data/\d+\)$"),
        (
            "code.ckpt",
            r"code\.ckpt was changed, or is not this project's: it holds other than tensors",
        ),
        ("other.ckpt", "not a checkpoint of SparseBitNet"),
        ("m.gguf", r"m\.gguf is damaged, or is not GGUF"),
        ("run", r"sbn consolidate --checkpoint .*run/checkpoints/last.ckpt --output .*last.whole.ckpt"),
        ("empty", "holds no model"),
        ("gone", "does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            load_model(tmp_path / name)


def test_no_tokenizer_is_an_error_only_where_one_is_needed(tmp_path):
    loaded = load_model(save(make_model(), tmp_path / "m.ckpt", tokenizer=False))
    assert loaded.tokenizer is None
    with pytest.raises(DataError, match="pass --tokenizer"):
        loaded.need_tokenizer()
    byte_tokenizer().save("tokenizer.json")
    assert load_model("m.ckpt", tokenizer="tokenizer.json").need_tokenizer().get_vocab_size() == 257


def test_lightning_reads_an_imported_checkpoint(tmp_path):
    """Lightning reads the checkpoint with ``load_from_checkpoint``, and in ``validate``."""
    theirs = make_hf(tie_word_embeddings=True)
    import_hf("--input", save_hf(theirs, tmp_path / "in"), "--output", "m.ckpt")
    module = SparseBitNet.load_from_checkpoint("m.ckpt").eval()
    torch.testing.assert_close(logits(module, some_tokens()), logits(theirs, some_tokens()), rtol=1e-4, atol=1e-4)
    trainer = quiet_trainer(limit_val_batches=2)
    fresh = SparseBitNet(module.config)
    measured = trainer.validate(fresh, token_loader(), ckpt_path="m.ckpt", verbose=False, weights_only=True)
    assert torch.equal(logits(fresh, some_tokens()), logits(module, some_tokens()))
    assert measured[0]["val/perplexity"] > 1
