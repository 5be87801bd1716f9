"""Two real runs of a few steps. One of them is killed with its parent, and continues."""

import email
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from research.reproduce.corpus import reproduce_corpus
from sbn_lightning.cli import main
from tests.research.fabricated import GRID

ROOT = Path(__file__).parents[2]
STEPS = 100
SMALL = {
    "model.config.vocab_size": 320,
    "model.config.d_model": 32,
    "model.config.n_layers": 1,
    "model.config.n_heads": 2,
    "model.config.d_ffn": 64,
    "model.compile": "false",
    "model.warmup_steps": 10,
    "data.batch_size": 2,
    "data.sequence_length": 32,
    "data.val_batch_size": 64,
    "trainer.max_steps": STEPS,
    "trainer.val_check_interval": STEPS // 2,
    "trainer.log_every_n_steps": 1,
    "trainer.accelerator": "cpu",
    "checkpoint.every_n_train_steps": 20,
    "sparsity_logger.interval": 50,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    sources = Path(email.__file__).parent
    options = {"vocab_size": 320, "val_fraction": 0.15, "probe_fraction": 0.15, "num_workers": 1}
    reproduce_corpus([str(sources)], str(folder / "data"), **options)
    return folder / "data"


def words(corpus, *only):
    overrides = [f"{key}={value}" for key, value in SMALL.items()]
    return ["reproduce", "--grid", str(GRID), "--data", str(corpus), "--only", *only, "--override", *overrides]


def test_killed_and_continued(corpus):
    first = "patterns/ternary-2of4-*"
    parent = subprocess.Popen([sys.executable, str(ROOT / "cli.py"), *words(corpus, first)])
    until = time.monotonic() + 120
    while not (saved := list(Path("results/runs").glob("*/version_0/checkpoints/last.ckpt"))):
        assert time.monotonic() < until
        assert parent.poll() is None
        time.sleep(0.01)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert not Path("results/results.jsonl").exists()
    assert main([*words(corpus, first, "patterns/bf16-sparse-2of4-*"), "--jobs", "2"]) == 0
    log = (saved[0].parents[2] / "log.txt").read_text()
    assert "SIGTERM: saved step" in log  # nobody stopped the worker: it noticed that its parent was gone
    assert "Restored all states from the checkpoint" in log
    lines = [json.loads(line) for line in Path("results/results.jsonl").read_text().splitlines()]
    assert {line["factors"]["family"] for line in lines} == {"ternary", "bf16-sparse"}
    for line in lines:
        assert (line["steps"], line["tokens"]) == (STEPS, STEPS * 2 * 32)
        assert line["validation"]["loss"] == pytest.approx(math.log(line["validation"]["perplexity"]))
        assert line["validation"]["loss"] < line["training_curve"][0][1] - 0.5
        assert [step for step, _ in line["validation_curve"]] == [STEPS // 2 - 1, STEPS - 1]
        assert line["sparsity"]["mask_density"][-1] == [STEPS, 0.5]
        assert 0 < line["sparsity"]["flip_rate_mask"][-1][1] < 1
        assert line["probe"]["places"] > 50
        assert line["versions"]["lightning"]
    # The log has every step of the continued run, from before or after the kill, except the step that was stopped.
    ternary = next(line for line in lines if line["factors"]["family"] == "ternary")
    assert ternary["continued"]
    steps = [step for step, _ in ternary["training_curve"]]
    assert steps == sorted(set(steps))
    assert len(set(range(STEPS)) - set(steps)) <= 1
    assert not list(Path("results/runs").glob("*/*/checkpoints"))
    stamp = Path("results/results.jsonl").stat().st_mtime_ns
    assert main(words(corpus, first)) == 0
    assert Path("results/results.jsonl").stat().st_mtime_ns == stamp
    assert main(["reproduce-report", "--plots", "false"]) == 0
    assert "2 runs of 0.0M parameters" in Path("results/reproduction.md").read_text()


def test_a_key_that_fit_does_not_know_fails_before_any_run(corpus, capsys):
    assert main([*words(corpus, "patterns/*"), "model.loss=auto"]) == 1
    message = capsys.readouterr().err
    assert "error: run ternary-6of8-lr_0.004-s1: Group 'model' does not accept option 'loss'" in message
    assert not Path("results/runs").exists()


def test_another_corpus_is_refused(corpus, capsys):
    Path("results").mkdir()
    Path("results/results.jsonl").write_text(json.dumps({"id": "a", "data": {"fingerprint": "other"}}) + "\n")
    assert main(words(corpus, "patterns/*")) == 1
    assert "holds runs on another corpus" in capsys.readouterr().err
    assert main(["reproduce", "--grid", str(GRID), "--data", "nowhere"]) == 1
    assert "write it with: python cli.py reproduce-corpus --output nowhere" in capsys.readouterr().err
