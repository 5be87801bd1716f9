"""The command line as a user meets it: commands that work, and errors in one line."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sbn_lightning.callbacks.base import RunCallback
from sbn_lightning.cli.app import TOOLS, TRAINING, main
from tests.helpers import imported_by_help

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/sparse_pretrain.yaml"


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sbn"])


def small(tokens, *more):
    options = {
        "data.path": tokens,
        "data.batch_size": 2,
        "data.sequence_length": 16,
        "data.num_workers": 0,
        "model.config.vocab_size": 320,
        "model.config.d_model": 32,
        "model.config.n_layers": 1,
        "model.config.d_ffn": 64,
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 1,
        "trainer.limit_val_batches": 1,
        "trainer.limit_test_batches": 1,
        "trainer.limit_predict_batches": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.num_sanity_val_steps": 0,
        "checkpoint.every_n_train_steps": 1,
    }
    return [f"--{key}={value}" for key, value in options.items()] + list(more)


def fit(tokens, *more):
    return main(["fit", "--config", str(RECIPE), *small(tokens, *more)])


def error_of(capsys, status):
    assert status == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {command} " in printed for command in (*TRAINING, *TOOLS))


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"sbn_lightning \d+\.\d+\S*\n", capsys.readouterr().out)


def test_unknown_command(capsys):
    assert "there are fit, validate" in error_of(capsys, main(["train"]))


def test_preparing_imports_neither_torch_nor_lightning():
    heavy, output = imported_by_help("prepare", ["torch", "lightning", "litdata"])
    assert heavy == []
    assert "--tokenizer" in output


def test_fit_reports_and_validate_and_test_read_its_checkpoint(tokens, capsys):
    assert fit(tokens) == 0
    printed = capsys.readouterr().out
    for expected in ("val/perplexity", "gate_up", "zeros natural", "tensorboard --logdir logs"):
        assert expected in printed
    checkpoint = Path("logs/sparse_pretrain/version_0/checkpoints/last.ckpt")
    assert checkpoint.is_file()
    for command in ("validate", "test", "predict"):
        options = [option for option in small(tokens) if "checkpoint" not in option]
        assert main([command, "--config", str(RECIPE), *options, "--ckpt_path", str(checkpoint)]) == 0


def test_command_line_wins_over_the_checkpoint(tokens):
    assert fit(tokens) == 0
    path = "logs/sparse_pretrain/version_0/checkpoints/last.ckpt"
    more = ["--model.warmup_steps=7", "--trainer.max_steps=3", "--ckpt_path", path]
    assert fit(tokens, *more) == 0
    used = yaml.safe_load(Path("logs/sparse_pretrain/version_1/config.yaml").read_text())
    assert used["model"]["warmup_steps"] == 7
    saved = torch.load("logs/sparse_pretrain/version_1/checkpoints/last.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["warmup_steps"] == 7
    assert saved["global_step"] == 3


def test_last_continues_the_newest_run_in_its_folder(tokens, capsys):
    assert fit(tokens) == 0
    assert fit(tokens, "--trainer.max_steps=4", "--ckpt_path=last") == 0
    folder = Path("logs/sparse_pretrain")
    assert [path.name for path in folder.iterdir()] == ["version_0"]
    saved = torch.load(folder / "version_0/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 4


def test_last_without_a_run_starts_anew_and_says_so(tokens, capsys):
    assert fit(tokens, "--ckpt_path=last") == 0
    printed = capsys.readouterr().out
    assert "no checkpoint in logs/sparse_pretrain/*/checkpoints yet, training starts anew" in printed
    saved = torch.load("logs/sparse_pretrain/version_0/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 2


def test_last_without_a_run_is_an_error_where_nothing_is_trained(tokens, capsys):
    options = [option for option in small(tokens, "--ckpt_path=last") if "checkpoint." not in option]
    error = error_of(capsys, main(["validate", "--config", str(RECIPE), *options]))
    assert "no checkpoint in logs/sparse_pretrain" in error


def test_last_as_a_sharded_checkpoint(tokens, capsys):
    """Half a folder is put aside. One process refuses a whole folder, and names the command that makes a file of it."""
    assert fit(tokens) == 0
    last = Path("logs/sparse_pretrain/version_0/checkpoints/last.ckpt")
    for attempt, kept in ((3, "last.ckpt.damaged"), (4, "last.ckpt.damaged-2")):
        last.unlink()
        last.mkdir()
        (last / ".metadata").write_bytes(b"shards")
        capsys.readouterr()
        assert fit(tokens, f"--trainer.max_steps={attempt}", "--ckpt_path=last") == 0
        printed = capsys.readouterr().out
        assert f"{last} is not complete (it has no meta.pt) (kept as {kept}); continuing from" in printed
        assert last.with_name(kept).is_dir()
        assert torch.load(last, weights_only=True)["global_step"] == attempt
    last.unlink()
    last.with_name("last.ckpt.damaged").replace(last)
    torch.save({}, last / "meta.pt")
    for command in ("fit", "fabric"):
        words = [command, "--config", str(RECIPE), *small(tokens), "--ckpt_path=last"]
        told = error_of(capsys, main(words))
        assert f"sbn consolidate --checkpoint {last} --output " in told
        assert "continue it with a Trainer whose strategy is sbn_fsdp2" in told


def test_a_dense_model_needs_no_mask_callbacks(tokens):
    assert fit(tokens, "--model.config.linear=dense") == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--mask_refresh.intervall=3", "did you mean mask_refresh.interval?"),
        ("--model.config.d_modell=3", "did you mean model.config.d_model?"),
        ("--trainer.max_step=3", "unrecognized arguments: --trainer.max_step=3; did you mean trainer.max_steps?"),
        ("--mask_refresh.interva=3", "did you mean mask_refresh.interval?"),
        ("--mask_refresh.interval=often", 'key "mask_refresh.interval"'),
        ("--mask_refresh.interval=0", "MaskRefresh: interval=0"),
        ("--model.config.pattern=5:9", "in_features=32 is not a multiple of M=9"),
        ("--model.config.pattern=9:8", 'pattern "9:8": N:M needs 1 <= N <= M <= 32'),
        ("--model.config.pattern=dense", "not of the form"),
        ("--model.config.linear=sparse", "Expected a typing.Literal['ternary', 'masked', 'dense']"),
        ("--model.config.vocab_size=100", "257 tokens, the model's vocab_size is 100"),
        ("--data.sequence_length=512", "longer than model.config.max_sequence_length=256"),
        ("--data.path=nowhere", "nowhere does not exist"),
        ("--model.optimizer.init_args.learning_rate=1", "Option 'learning_rate' is not accepted"),
    ],
)
def test_errors_are_one_clear_line(tokens, capsys, option, message):
    assert message in error_of(capsys, fit(tokens, option))


@pytest.mark.parametrize("command", [*TRAINING, *TOOLS])
def test_no_command_takes_a_name_that_is_cut_short(capsys, command):
    """A name that is cut short is a misspelt one: it would stop working as soon as another option begins like it."""
    assert "unrecognized arguments: --hel" in error_of(capsys, main([command, "--hel"]))


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize("command", ["fit", "fabric"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        pytest.param("--trainer.accelerator=gpu", "torch sees no GPU here: --trainer.accelerator cpu", marks=no_gpu),
        pytest.param("--trainer.accelerator=cuda", "torch sees no GPU here: --trainer.accelerator cpu", marks=no_gpu),
        ("--trainer.accelerator=nope", "invalid accelerator name: `accelerator='nope'`"),
        ("--trainer.devices=0", "(devices='0')` value is not a valid input"),
        ("--trainer.strategy=nope", "trainer.strategy=nope does not exist; ours are sbn_ddp and sbn_fsdp2"),
        ("--trainer.strategy=sbn_fsdp", "sbn_fsdp does not exist; did you mean sbn_fsdp2? Ours are sbn_ddp and"),
        ("--trainer.strategy=sbn_ddp2", "sbn_ddp2 does not exist; did you mean sbn_ddp? Ours are"),
        ("--ckpt_path=nope.ckpt", "--ckpt_path nope.ckpt does not exist"),
        (f"--ckpt_path={RECIPE}", "sparse_pretrain.yaml is no checkpoint; give"),
    ],
)
def test_a_trainer_that_cannot_be_made_is_one_clear_line(tokens, capsys, command, option, message):
    line = error_of(capsys, main([command, "--config", str(RECIPE), *small(tokens, option)]))
    assert message in line
    assert "nope" not in option or "nope" in line


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_checkpoint_that_is_not_there_is_one_clear_line(tokens, capsys, command):
    options = [option for option in small(tokens, "--ckpt_path=nope.ckpt") if "checkpoint." not in option]
    line = error_of(capsys, main([command, "--config", str(RECIPE), *options]))
    assert line.endswith("nope.ckpt does not exist; give the path of a checkpoint, or last for that of the newest run")


@pytest.mark.parametrize("command", ["fit", "fabric", "validate"])
def test_a_checkpoint_that_cannot_be_read_is_one_clear_line(tokens, capsys, tmp_path, command):
    assert fit(tokens, "--trainer.max_steps=1") == 0
    saved = next(Path("logs").rglob("*.ckpt")).read_bytes()
    Path("cut.ckpt").write_bytes(saved[: len(saved) // 2])
    Path("empty.ckpt").touch()
    torch.save({"a": 1}, "other.ckpt")
    weights = torch.load(io.BytesIO(saved), weights_only=True)
    del weights["optimizer_states"]
    torch.save(weights, "weights.ckpt")
    reasons = {
        "cut": "is damaged (File is not a zip file)",
        "empty": "is empty",
        "other": "is no checkpoint of Lightning",
        "weights": "holds weights and no training to continue (model.init_from starts from weights)",
    }
    for name, reason in reasons.items():
        options = small(tokens, f"--ckpt_path={name}.ckpt")
        if command == "validate":
            options = [option for option in options if "checkpoint." not in option]
        status = main([command, "--config", str(RECIPE), *options])
        if (command, name) == ("validate", "weights"):
            assert status == 0
        else:
            assert f"--ckpt_path {name}.ckpt {reason}; give the path" in error_of(capsys, status)


class Breaks(RunCallback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        raise RuntimeError("from inside")


@pytest.mark.parametrize("command", ["fit", "fabric"])
def test_an_error_inside_training_keeps_its_traceback(tokens, command):
    words = [command, "--config", str(RECIPE), *small(tokens, "--trainer.callbacks+=tests.cli.test_cli.Breaks")]
    with pytest.raises(RuntimeError, match="from inside"):
        main(words)


PLUGIN = "sbn_lightning.SparseTernaryPrecision"


@pytest.mark.parametrize("command", ["fit", "fabric"])
@pytest.mark.parametrize("as_list", [False, True])
def test_the_precision_plugin_from_yaml(tokens, caplog, command, as_list):
    plugin = {"class_path": PLUGIN, "init_args": {"backend": "auto", "dtype": "fp32"}}
    Path("plugin.yaml").write_text(yaml.safe_dump({"trainer": {"plugins": [plugin] if as_list else plugin}}))
    words = [command, "--config", str(RECIPE), "--config", "plugin.yaml", *small(tokens)]
    with caplog.at_level("INFO"):
        assert main(words) == 0
    assert "SparseTernaryPrecision(backend='auto', gradients='bf16', dtype='fp32')" in caplog.text
    (saved,) = Path("logs").glob("**/config.yaml")
    values = yaml.safe_load(saved.read_text())["trainer"]["plugins"]
    values = values[0] if as_list else values
    assert values["class_path"] == PLUGIN
    assert values["init_args"].items() >= plugin["init_args"].items()
    assert main([command, "--config", str(saved)]) == 0


def test_the_precision_plugin_from_options(tokens):
    assert fit(tokens, f"--trainer.plugins={PLUGIN}", "--trainer.plugins.backend=reference") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bakend": "auto"}, "Option 'bakend' is not accepted; did you mean backend?"),
        ({"backend": "fast"}, "Literal['auto', 'reference', 'int8', 'sparse']. Got value: fast"),
        ({"backend": "reference", "gradients": "int8"}, 'gradients="int8" needs integer tensor cores'),
        ({"tokens": 0}, "tokens=0 must be at least 1"),
    ],
)
@pytest.mark.parametrize("as_list", [False, True])
def test_errors_in_the_plugins_options_are_one_clear_line(tokens, capsys, options, message, as_list):
    plugin = {"class_path": PLUGIN, "init_args": options}
    line = error_of(capsys, fit(tokens, f"--trainer.plugins={json.dumps([plugin] if as_list else plugin)}"))
    assert message in line
    assert len(line) < 200


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--trainer.strategy=sbn_ddp", "--trainer.strategy.reduce_dtype=bfloat16"], "Replicated"),
        (["--trainer.strategy=sbn_fsdp2", "--trainer.strategy.gather=latent"], "Sharded"),
    ],
)
def test_options_of_a_strategys_short_name_name_its_class(tokens, capsys, given, message):
    line = error_of(capsys, fit(tokens, *given))
    assert line.endswith(f"give a class first, sbn_lightning.distributed.strategies.{message}Strategy")


def test_a_strategys_short_name_as_class_path_names_its_class(tokens, capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "trainer: {strategy: {class_path: sbn_ddp, init_args: {reduce_dtype: bfloat16}}}\n", encoding="utf-8"
    )
    line = error_of(capsys, fit(tokens, "--config", str(recipe)))
    assert line.endswith("give a class first, sbn_lightning.distributed.strategies.ReplicatedStrategy")


def test_a_strategys_option_before_its_class_says_to_give_the_class_first(tokens, capsys):
    line = error_of(capsys, fit(tokens, "--trainer.strategy.reduce_dtype=bfloat16"))
    assert "give a class first, sbn_lightning.distributed.strategies.ReplicatedStrategy or " in line


def test_a_misspelt_plugin_and_a_second_precision_are_one_clear_line(tokens, capsys):
    line = error_of(capsys, fit(tokens, f"--trainer.plugins={PLUGIN[:-1]}"))
    assert "has no attribute 'SparseTernaryPrecisio'" in line
    for command in ("fit", "fabric"):
        words = [command, "--config", str(RECIPE), *small(tokens, f"--trainer.plugins={PLUGIN}")]
        assert "--trainer.precision null" in error_of(capsys, main([*words, "--trainer.precision=bf16-mixed"]))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"6:8"', "6:8", 'quote it, pattern: "6:8"'),
        ("mask_refresh:", "mask_refrehs:", "mask_refrehs.interval"),
        ("d_model:", "d_modell:", "model.config.d_modell"),
        ("max_steps:", "max_stepz:", "trainer.max_stepz"),
    ],
)
def test_errors_in_a_recipe_are_one_clear_line(tokens, capsys, before, after, message):
    text = RECIPE.read_text()
    assert before in text
    Path("recipe.yaml").write_text(text.replace(before, after))
    assert message in error_of(capsys, main(["fit", "--config", "recipe.yaml"]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shard: shard.unlink(), "missing"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-100]), "bytes"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-1] + b"\xff"), "damaged"),
    ],
)
def test_missing_or_damaged_shards_are_named(tokens, capsys, tmp_path, damage, message):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(tokens, folder)
    shard = next((folder / "train").glob("*.bin"))
    damage(shard)
    error = error_of(capsys, fit(folder))
    assert shard.name in error
    assert message in error
    assert not Path("logs").exists()


@pytest.mark.parametrize("command", ["fit", "fabric", "validate"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.config.vocab_size=256", "has 257 tokens, the model's vocab_size is 256"),
        ("--data.sequence_length=200000", "a block needs 200001"),
        ("--data.path=unfinished", "unfinished"),
    ],
)
def test_a_refused_start_leaves_no_folder(tokens, capsys, command, option, message):
    Path("unfinished/.work").mkdir(parents=True)
    words = [command, "--config", str(RECIPE), *small(tokens, option, "--trainer.devices=1")]
    assert message in error_of(capsys, main(words))
    assert not Path("logs").exists()


def test_a_refused_start_keeps_the_runs_of_before(tokens, capsys):
    assert fit(tokens) == 0
    before = sorted(Path("logs").rglob("*"))
    error_of(capsys, fit(tokens, "--model.config.vocab_size=256"))
    error_of(capsys, fit(tokens, "--model.config.vocab_size=256", "--ckpt_path=last"))
    assert sorted(Path("logs").rglob("*")) == before


def test_debug_shows_the_traceback(tokens, monkeypatch):
    monkeypatch.setenv("SBN_DEBUG", "1")
    with pytest.raises(ValueError, match="interval=0"):
        fit(tokens, "--mask_refresh.interval=0")


@pytest.mark.parametrize("debug", ["", "1"])
def test_no_error_prints_a_password(tmp_path, debug):
    """Neither the one line nor a traceback shows it. A separate process shows what is printed when a process dies."""
    words = ["prepare", "--input", "https://somebody:hunter22@host.invalid/texts", "--output", str(tmp_path / "out")]
    environment = os.environ | {"SBN_DEBUG": debug, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, ROOT / "cli.py", *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == bool(debug)
    assert "https://***@host.invalid/texts" in done.stderr
    assert "hunter22" not in done.stdout + done.stderr


def test_what_the_terminal_cannot_encode_is_escaped():
    code = (
        "from sbn_lightning.cli.app import escape_what_cannot_be_printed as escape; escape(); "
        "import json, sys; text = 'tea: \\u00e9 \\U0001f375 \\ud83d'; print(json.dumps(text, ensure_ascii=False))"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    for encoding in ("ascii", "latin-1", "utf-8"):
        environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": paths}
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True).stdout
        assert json.loads(printed.decode(encoding)) == "tea: \u00e9 \U0001f375 \ud83d"


@pytest.mark.parametrize("command", ["fit", "fabric"])
def test_a_folder_of_logs_that_cannot_be_made_is_one_clear_line(tokens, capsys, command):
    Path("logs").touch()
    line = error_of(capsys, main([command, "--config", str(RECIPE), *small(tokens)]))
    assert "cannot write to logs/sparse_pretrain/version_0: " in line
    assert "--trainer.logger.init_args.save_dir FOLDER" in line


def test_prepare_and_fit(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / f"text/{i}.txt").write_text(f"The quick brown fox number {i} jumps over the lazy dog. " * 40)
    (tmp_path / "more.txt").write_text("One more file. " * 100)
    inputs = ["--input", str(tmp_path / "text"), str(tmp_path / "more.txt")]
    assert main(["prepare", *inputs, "--output", "out", "--tokenizer", "byte", "--num_workers", "1"]) == 0
    assert sum(split["documents"] for split in json.loads(Path("out/meta.json").read_text())["splits"].values()) == 21
    assert fit("out") == 0


def test_both_entries_are_the_same():
    script = subprocess.run(
        [sys.executable, ROOT / "cli.py", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    command = subprocess.run(
        [Path(sys.executable).parent / "sbn", "--help"], capture_output=True, text=True, check=True
    )
    assert script.stdout == command.stdout
