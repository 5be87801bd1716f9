"""``--ckpt_path last`` on the command line: the run that the command names, its newest state, and no other."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sbn_lightning.callbacks.base import RunCallback
from sbn_lightning.checkpoints import lock as lock_module
from sbn_lightning.cli import main
from tests.cli.test_cli import RECIPE, error_of, fit, small

NAME = "--trainer.logger.init_args.name="
VERSION = "--trainer.logger.init_args.version="
LAST = "--ckpt_path=last"


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sbn"])


def step(path):
    return torch.load(path, weights_only=True)["global_step"]


@pytest.mark.parametrize("loop", ["fit", "fabric"])
def test_a_named_version_goes_on(tokens, loop):
    words = [loop, "--config", str(RECIPE), *small(tokens, f"{NAME}v", f"{VERSION}job7")]
    assert main(words) == 0
    assert main([*words, LAST, "--trainer.max_steps=3"]) == 0
    (folder,) = Path("logs/v").iterdir()
    assert step(folder / "checkpoints/last.ckpt") == 3
    assert not (folder / "checkpoints/last-v1.ckpt").exists()
    assert not list(Path().rglob("*.lock"))


def test_home_and_variables_mean_the_same_for_events_and_checkpoints(tokens, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WHERE", str(home / "lg"))
    assert fit(tokens, "--trainer.logger.init_args.save_dir=~/lg") == 0
    assert fit(tokens, "--trainer.logger.init_args.save_dir=$WHERE", LAST, "--trainer.max_steps=3") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    (version,) = (home / "lg/sparse_pretrain").iterdir()
    assert step(version / "checkpoints/last.ckpt") == 3
    assert len(list(version.glob("events*"))) == 2
    assert fit(tokens, "--checkpoint.dirpath=$WHERE/fixed", "--trainer.max_steps=1") == 0
    assert fit(tokens, "--checkpoint.dirpath=~/lg/fixed", LAST) == 0
    assert step(home / "lg/fixed/last.ckpt") == 2


SLURM = {"JOB_ID": "1", "NTASKS": "1", "JOB_NAME": "t", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}


def test_another_runs_slurm_checkpoint_is_never_taken(tokens, capsys, monkeypatch):
    assert fit(tokens, f"{NAME}A") == 0
    shutil.copy("logs/A/version_0/checkpoints/last.ckpt", "hpc_ckpt_1.ckpt")  # Lightning does the same at SIGUSR1
    for name, value in (SLURM | {"NODELIST": "localhost"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for more in ([LAST], []):
        capsys.readouterr()
        assert fit(tokens, f"{NAME}B", f"{VERSION}{len(more)}", "--trainer.max_steps=1", *more) == 0
        assert "passed over hpc_ckpt_1.ckpt (of the run that saves to logs/A/ver" in capsys.readouterr().out
        assert step(f"logs/B/version_{len(more)}/checkpoints/last.ckpt") == 1
    assert fit(tokens, f"{NAME}A", "--trainer.max_steps=3") == 0
    assert "--ckpt_path last would continue" in capsys.readouterr().out
    assert step("logs/A/version_1/checkpoints/last.ckpt") == 3
    os.utime("hpc_ckpt_1.ckpt", (4e9, 4e9))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert fit(tokens, f"{NAME}A", "--trainer.max_steps=4") == 0
    assert "Slurm has requeued this job" in capsys.readouterr().out
    assert step("logs/A/version_0/checkpoints/last.ckpt") == 4  # the run that wrote the file


def test_lightnings_slurm_checkpoint_goes_to_the_runs_own_folder(tokens):
    option = "--trainer.callbacks+=tests.checkpoints.test_last.AskedBySlurm"
    assert fit(tokens, option) == 0
    saved = Path("logs/sparse_pretrain/version_0/checkpoints/hpc_ckpt_1.ckpt")
    assert step(saved) == 1
    assert not list(Path().glob("*.ckpt"))


def test_a_run_that_another_process_writes_is_refused(tokens, capsys, monkeypatch):
    assert fit(tokens) == 0
    monkeypatch.setattr(lock_module, "_is_held", lambda descriptor: True)
    assert " is being written by process " in error_of(capsys, fit(tokens, LAST))


def test_two_starts_at_once_get_a_version_each(tokens, monkeypatch):
    held = iter([True, False])
    monkeypatch.setattr(lock_module, "_is_held", lambda descriptor: next(held))
    assert fit(tokens) == 0
    assert [path.name for path in Path("logs/sparse_pretrain").glob("*/checkpoints")] == ["checkpoints"]
    assert Path("logs/sparse_pretrain/version_1/checkpoints/last.ckpt").is_file()


def test_loggers_of_other_kinds(tokens, capsys):
    csv = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.init_args.save_dir=csv"]
    assert fit(tokens, *csv, f"{NAME}c") == 0
    assert fit(tokens, *csv, f"{NAME}c", LAST, "--trainer.max_steps=3") == 0
    assert step("csv/c/version_0/checkpoints/last.ckpt") == 3
    folder = Path("csv/c/version_0")
    before, after = ((folder / name).read_text() for name in ("metrics.1.csv", "metrics.csv"))
    assert before.startswith("epoch,")
    assert before != after
    assert "the metrics so far are kept as csv/c/version_0/metrics.1.csv" in capsys.readouterr().out
    assert fit(tokens, "--trainer.logger=false") == 0
    assert fit(tokens, "--trainer.logger=false", LAST, "--trainer.max_steps=3") == 0
    assert step("checkpoints/last.ckpt") == 3
    Path("no.yaml").write_text(yaml.safe_dump({"trainer": {"logger": True}}))
    words = ["fit", "--config", str(RECIPE), "--config", "no.yaml", *small(tokens)]
    assert main(words) == 0
    assert main([*words, LAST, "--trainer.max_steps=3"]) == 0
    assert step("lightning_logs/version_0/checkpoints/last.ckpt") == 3


class AskedBySlurm(RunCallback):
    """Saves a checkpoint after the first step, in the way of Lightning's Slurm handler."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            trainer.save_checkpoint(trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir))
