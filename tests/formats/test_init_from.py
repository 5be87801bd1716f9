"""A run that starts from imported weights."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from sbn_lightning import SparseBitNet
from sbn_lightning.checkpoints.tokenizers import beside, difference
from sbn_lightning.cli import main
from sbn_lightning.cli.model_shape import take_shape
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.data.tokenizer import train_bpe
from sbn_lightning.formats import load_model
from sbn_lightning.sparsity.pattern import NMPattern, top_n_mask
from tests.formats.models import logits, make_model, save, some_tokens
from tests.helpers import quiet_trainer, small_config, token_loader

RECIPE = Path(__file__).parents[2] / "recipes/sparse_pretrain.yaml"


def module(path, **changes):
    torch.manual_seed(5)
    return SparseBitNet(small_config(**changes), warmup_steps=2, init_from=str(path))


def test_a_sparse_run_starts_from_dense_weights(tmp_path):
    dense = make_model(linear="dense")
    started = module(save(dense, tmp_path / "m.ckpt"), pattern="2:4")
    seen = []

    def look(batch, index, step=started.training_step):
        if not seen:
            layer = started.model.blocks[0].mlp.down
            seen.append((layer.weight.detach().clone(), layer.mask.clone(), started.trainer.global_step))
        return step(batch, index)

    started.training_step = look
    quiet_trainer(max_steps=2).fit(started, token_loader())
    weight, mask, step = seen[0]
    assert torch.equal(weight, dense.blocks[0].mlp.down.weight)
    assert torch.equal(mask, top_n_mask(weight, NMPattern(2, 4)))
    assert step == 0
    assert started.trainer.global_step == 2
    assert not torch.equal(started.model.blocks[0].mlp.down.weight, weight)


def test_norms_can_be_inserted_and_start_with_the_weight_one(tmp_path):
    dense = make_model(linear="dense")
    started = module(save(dense, tmp_path / "m.ckpt"), sub_norms=True)
    started.configure_model()
    block = started.model.blocks[0]
    assert torch.equal(block.mlp.down.weight, dense.blocks[0].mlp.down.weight)
    assert bool((block.attention.sub_norm.weight == 1).all())
    assert bool((block.mlp.sub_norm.weight == 1).all())
    with_norms = save(make_model(linear="dense", sub_norms=True), tmp_path / "normed.ckpt")
    with pytest.raises(ConfigError, match=r"set model\.config to sub_norms: True"):
        module(with_norms).configure_model()


def test_a_recipe_inserts_norms_into_weights_that_have_none(tmp_path):
    path = save(make_model(linear="dense"), tmp_path / "m.ckpt")
    shape = small_config(sub_norms=True, n_layers=7).to_dict()
    config = Namespace(model=Namespace(init_from=str(path), config=Namespace(shape)))
    take_shape(config, [])
    taken = config["model.config"]
    assert (taken["sub_norms"], taken["n_layers"]) == (True, load_model(path).config.n_layers)


def test_a_run_that_continues_keeps_what_it_learnt(tmp_path):
    path = save(make_model(linear="dense"), tmp_path / "m.ckpt")
    first = quiet_trainer(max_steps=2)
    first.fit(module(path), token_loader())
    first.save_checkpoint("run.ckpt")
    resumed = module(path)
    quiet_trainer(max_steps=2).fit(resumed, token_loader(), ckpt_path="run.ckpt", weights_only=True)
    trained = first.lightning_module.model.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in resumed.model.state_dict().items())
    again = SparseBitNet.load_from_checkpoint("run.ckpt", weights_only=True)
    assert again.init_from is None


@pytest.mark.parametrize("command", ["fit", "fabric"])
def test_the_command_continues_without_the_imported_file(tmp_path, tokens, monkeypatch, command):
    monkeypatch.setattr(sys, "argv", ["sbn"])
    model = make_model(linear="dense", n_layers=1, max_sequence_length=256)
    path = save(model, tmp_path / "m.ckpt")
    values = {**model.config.to_dict(), "linear": "ternary", "pattern": "2:4"}
    options = [f"--model.config.{key}={value}" for key, value in values.items() if value is not None]
    options += ["--model.warmup_steps=1", f"--model.init_from={path}", f"--data.path={tokens}"]
    options += ["--data.batch_size=2", "--data.sequence_length=16", "--data.num_workers=0", "--trainer.accelerator=cpu"]
    options += ["--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0"]
    options += ["--trainer.limit_val_batches=1", "--checkpoint.every_n_train_steps=1", "--checkpoint.save_last=true"]
    run = [command, "--config", str(RECIPE), *options]
    assert main([*run, "--trainer.max_steps=1"]) == 0
    path.unlink()
    assert main([*run, "--trainer.max_steps=2", "--ckpt_path=last"]) == 0
    saved = torch.load("logs/sparse_pretrain/version_0/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    loaded = load_model("logs/sparse_pretrain")
    assert torch.equal(loaded.model.embed.weight, saved["state_dict"]["model.embed.weight"])
    assert loaded.tokenizer_path == loaded.path  # the checkpoint holds the tokenizer of the data
    assert main([*run, "--trainer.max_steps=2"]) == 1  # a new run does need the file


def test_validating_without_a_checkpoint_measures_what_was_imported(tmp_path):
    dense = make_model(linear="dense")
    started = module(save(dense, tmp_path / "m.ckpt"), linear="dense")
    quiet_trainer(limit_val_batches=1).validate(started, token_loader(), verbose=False)
    assert torch.equal(logits(started.model, some_tokens()), logits(dense, some_tokens()))


def test_weights_of_a_sparse_run_get_masks_of_the_new_pattern(tmp_path):
    sparse = make_model(pattern="6:8")
    started = module(save(sparse, tmp_path / "m.ckpt"), pattern="2:4")
    quiet_trainer(limit_val_batches=1).validate(started, token_loader(), verbose=False)
    assert torch.equal(logits(started.model, some_tokens()), logits(make_model(pattern="2:4"), some_tokens()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_ffn": 128, "rope_theta": 5.0}, "set model.config to d_ffn: 64, rope_theta: 10000.0"),
        ({"qkv_bias": True}, "qkv_bias: False"),
    ],
)
def test_another_shape_is_refused_with_the_way_out(tmp_path, changes, message):
    path = save(make_model(linear="dense"), tmp_path / "m.ckpt")
    with pytest.raises(ConfigError, match=message):
        quiet_trainer().validate(module(path, **changes), token_loader(), verbose=False)


def run_fit(capsys, *options):
    status = main(["fit", "--config", str(RECIPE), *options])
    return status, [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def small_run(path, folder):
    model = load_model(path).config.to_dict() | {"linear": "ternary", "pattern": "2:4"}
    options = [f"--model.config.{key}={value}" for key, value in model.items() if value is not None]
    options += [f"--model.init_from={path}", f"--data.path={folder}", "--data.batch_size=2", "--data.num_workers=0"]
    options += ["--data.sequence_length=16", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    return [*options, "--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0", "--trainer.max_steps=1"]


def test_data_of_another_tokenizer_are_refused_with_the_way_out(tmp_path, tokens, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sbn"])
    path = save(make_model(linear="dense", n_layers=1), tmp_path / "m.ckpt", tokenizer=False)
    options = small_run(path, tokens)
    assert run_fit(capsys, *options)[0] == 0  # without a tokenizer there is nothing to compare
    train_bpe(["some text " * 50], 270).save(str(beside(path)))
    status, errors = run_fit(capsys, *options)
    assert status == 1
    (line,) = errors
    assert str(path) in line
    assert f"data.path {tokens}" in line
    assert f"sbn prepare --tokenizer {beside(path)} " in line
    # The same vocabulary, in a file that is written differently.
    contents = json.loads((tokens / "tokenizer.json").read_text())
    contents["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    contents["padding"] |= {"pad_type_id": 0, "pad_token": "x"}
    beside(path).write_text(json.dumps(contents, indent=7))
    assert run_fit(capsys, *options)[0] == 0


def tokenizer_of(vocabulary, added=()):
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    for token, special in added:
        tokenizer.add_tokens([AddedToken(token, special=special)])
    return tokenizer


END, PAD, TOOL = ("<end>", True), ("<pad>", True), ("<tool>", False)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (tokenizer_of("abc", [END, PAD, TOOL]), None),
        (tokenizer_of("abc", [END]), None),
        (tokenizer_of("abc", [END, PAD, TOOL, ("<more>", False)]), None),
        # No data contain this token, so its name does not matter.
        (tokenizer_of("abc", [END, ("<reserved>", True), TOOL]), None),
        (tokenizer_of("acb", [END, PAD, TOOL]), 1),
        (tokenizer_of("abcd", [END, PAD, TOOL]), 3),
        (tokenizer_of("ab", [END, PAD, TOOL]), 2),
        (tokenizer_of("abc", [PAD, END, TOOL]), 4),
        (tokenizer_of("abc", [END, PAD, ("<call>", False)]), 5),
    ],
)
def test_which_tokenizers_differ(data, found):
    weights = tokenizer_of("abc", [END, PAD, TOOL])
    told = difference(weights, data, data.token_to_id("<end>"))
    assert told is None if found is None else told.startswith(f"token {found} is ")


def test_an_end_of_documents_that_the_weights_do_not_know():
    weights = tokenizer_of("abc")
    assert difference(weights, tokenizer_of("abc", [END]), 3) == "token 3 is None in the first, '<end>' in the second"
    assert difference(weights, tokenizer_of("abc", [PAD]), 0) is None


def split_by(normalizer=None, words=True, trim=True, merges=("a b", "b c"), **options):
    """A tokenizer whose file holds the given ``merges`` unchanged."""
    tokenizer = tokenizer_of(["a", "b", "c", "ab", "bc"])
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(use_regex=words, trim_offsets=trim)]
    )
    contents = json.loads(tokenizer.to_str())
    contents["model"] |= {"merges": list(merges), **options}
    return Tokenizer.from_str(json.dumps(contents))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (split_by(merges=(["a", "b"], ["b", "c"])), None),
        (split_by(trim=False), None),
        (split_by(merges=("b c", "a b")), "the list of merges differs"),
        (split_by(merges=("a b",)), "the list of merges differs"),
        (split_by(normalizers.NFC()), "the normalizer differs"),
        (split_by(words=False), "the pre_tokenizer differs"),
        (split_by(ignore_merges=True), "the model's ignore_merges differs"),
        (split_by(byte_fallback=True), "the model's byte_fallback differs"),
    ],
)
def test_the_same_vocabulary_that_splits_texts_otherwise(data, found):
    assert difference(split_by(), data, 0) == found


def plain_run(path, folder, *more):
    """A run of the recipe whose command does not set the shape of the model."""
    options = [f"--model.init_from={path}", f"--data.path={folder}", "--data.batch_size=2", "--data.num_workers=0"]
    options += ["--data.sequence_length=16", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    options += ["--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0", "--checkpoint.save_last=true"]
    return [*options, "--checkpoint.every_n_train_steps=1", *more]


def test_the_shape_comes_from_the_weights_and_a_moved_run_finds_its_tokenizer(tmp_path, tokens, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sbn"])
    path = save(make_model(linear="dense", n_layers=1, qkv_bias=True, rope_theta=5e5), tmp_path / "m.ckpt")
    options = plain_run(path, tokens)
    assert main(["fit", "--config", str(RECIPE), *options, "--trainer.max_steps=1"]) == 0
    assert f"model.config takes from {path}: vocab_size 320, d_model 32, n_layers 1" in capsys.readouterr().out
    run = Path("logs/sparse_pretrain/version_0")
    saved = load_model(run).config
    assert (saved.d_model, saved.rope_theta, saved.qkv_bias, saved.linear) == (32, 5e5, True, "ternary")
    # The imported file may be gone when the run continues, and the data may be gone when the checkpoint is used.
    path.unlink()
    assert main(["fit", "--config", str(RECIPE), *options, "--trainer.max_steps=2", "--ckpt_path=last"]) == 0
    assert "model.config takes from logs" in capsys.readouterr().out
    run.rename(tmp_path / "moved")
    moved = load_model(tmp_path / "moved")
    assert moved.need_tokenizer().encode("a").ids == [97]
    assert moved.text.stop_ids == [256]


def test_a_run_that_is_named_as_a_folder_is_searched_once(tmp_path, tokens, monkeypatch, capsys):
    """The shape, the tokenizer and the weights come from the same file, and a damaged one is named once."""
    monkeypatch.setattr(sys, "argv", ["sbn"])
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    path = save(make_model(linear="dense", n_layers=1), tmp_path / "run/checkpoints/step=3.ckpt")
    (tmp_path / "run/checkpoints/last.ckpt").write_text("cut short")
    options = [*plain_run(tmp_path / "run", tokens), "--trainer.max_steps=1"]
    options += [f"--model.distillation.teacher={tmp_path / 'run'}", "--model.distillation.hidden=0"]
    assert main(["fit", "--config", str(RECIPE), *options]) == 0
    told = capsys.readouterr()
    assert told.err.count("looking for an older state") == 2  # once for each option
    assert f"model.config takes from {path}: " in told.out
    path.unlink()
    assert main(["fit", "--config", str(RECIPE), *options, "--model.distillation=null", "--ckpt_path=last"]) == 0


def test_a_value_of_the_command_line_is_not_replaced(tmp_path, tokens, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sbn"])
    path = save(make_model(linear="dense", n_layers=1), tmp_path / "m.ckpt")
    options = plain_run(path, tokens, "--trainer.max_steps=1", "--model.config.d_ffn", "128")
    status, errors = run_fit(capsys, *options)
    assert status == 1
    assert "does not fit the model; set model.config to d_ffn: 64" in errors[0]


@pytest.mark.parametrize("format", ["run", "hf", "packed", "hf-bitnet", "gguf"])
def test_weights_of_any_format_start_a_run(tmp_path, format):
    width = {"d_model": 256, "d_ffn": 256, "n_layers": 1} if format == "gguf" else {}
    model = make_model(linear="dense" if format == "hf" else "ternary", pattern="2:4", **width)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    path = save(model, tmp_path / "run/checkpoints/last.ckpt")
    if format == "run":
        path = tmp_path / "run"
    else:
        assert main(["export", "--checkpoint", str(path), "--output", "out", "--format", format]) == 0
        path = Path("out")
    started = module(path, pattern="2:4", **width)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(limit_val_batches=1).validate(started, token_loader(), verbose=False)
    told = any("training starts from gamma * codes" in str(warning.message) for warning in caught)
    assert told == (format in ("packed", "hf-bitnet"))
    layer, before = started.model.blocks[0].mlp.down, model.blocks[0].mlp.down
    if format in ("run", "hf"):
        assert torch.equal(layer.weight, before.weight)
    else:
        torch.testing.assert_close(layer.weight, before.effective_weight(), rtol=1e-3, atol=0)
        assert torch.equal(layer.ternary()[0], before.ternary()[0])
    assert started.text_files.tokenizer.encode("a").ids == [97]


def test_a_missing_or_other_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="sbn import-hf --input MODEL --output"):
        quiet_trainer().validate(module(tmp_path / "gone.ckpt"), token_loader(), verbose=False)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(DataError, match="not a checkpoint of SparseBitNet"):
        quiet_trainer().validate(module(tmp_path / "other.ckpt"), token_loader(), verbose=False)
