"""Faults while training: nothing saved is lost, and the message says what happened."""

import errno
import io
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sbn_lightning.callbacks import DurableCheckpoint, DurableCheckpointIO
from sbn_lightning.callbacks.base import RunCallback
from sbn_lightning.cli import main
from sbn_lightning.cli.redaction import without_secrets
from sbn_lightning.core.errors import DataError
from tests.cli.test_cli import RECIPE, error_of, fit, small
from tests.faults import kill
from tests.faults.recorder import read
from tests.helpers import ForeignModule, quiet_trainer, regression_loader

FOLDER = Path("logs/sparse_pretrain/version_0/checkpoints")
RECORD = ["--trainer.callbacks+=tests.faults.recorder.Recorder", "--trainer.callbacks.path=record.txt"]


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sbn"])


@pytest.fixture(autouse=True)
def _signal_handlers_are_given_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        now = signal.getsignal(number)
        signal.signal(number, handler)
        assert now == handler


def cli(loop, tokens, *more):
    return main([loop, "--config", str(RECIPE), *small(tokens, *more)])


# Writing.


class FullDisk(io.FileIO):
    """A disk that takes ``room`` bytes and is then full."""

    room = 1000

    def write(self, data):
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    plugin, path = DurableCheckpointIO(), tmp_path / "new/last.ckpt"
    plugin.save_checkpoint({"state_dict": {"w": torch.arange(1000.0)}}, path)
    before = path.read_bytes()
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r": FullDisk(self, "w") if "w" in mode else opened(self, mode))
    with pytest.raises(DataError, match=r"last\.ckpt: No space left on device; the one before it is intact"):
        plugin.save_checkpoint({"state_dict": {"w": torch.zeros(1000)}}, path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_what_is_not_the_disks_fault_keeps_its_own_error(tmp_path):
    with pytest.raises(AttributeError, match="local"):
        DurableCheckpointIO().save_checkpoint({"f": lambda: None}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_write_is_aside_and_synced_before_it_has_its_name(tmp_path, monkeypatch):
    seen = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (seen.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), sync(fd))
    )
    monkeypatch.setattr(Path, "replace", lambda self, to: (seen.append(f"{self.name} -> {to.name}"), replace(self, to)))
    DurableCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "last.ckpt")
    aside = f"last.ckpt.{os.getpid()}.tmp"
    assert seen == [aside, f"{aside} -> last.ckpt", tmp_path.name]


def test_what_a_killed_write_left_goes_with_the_next(tmp_path):
    for name in ("last.ckpt.tmp", "last.ckpt.12345.tmp", "last-v1.ckpt.12345.tmp"):
        (tmp_path / name).write_bytes(b"left over")
    DurableCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "last.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last-v1.ckpt.12345.tmp", "last.ckpt"]


@pytest.mark.parametrize("loop", ["fit", "fabric"])
def test_a_full_disk_stops_training_in_one_line(tokens, capsys, loop):
    assert cli(loop, tokens) == 0
    last = FOLDER / "last.ckpt"
    before = last.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (last.stat().st_size // 2, limits[1]))
    try:
        status = cli(loop, tokens, "--trainer.max_steps=4", "--ckpt_path=last")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    error = error_of(capsys, status)
    assert "cannot write the checkpoint" in error
    assert "File too large; the one before it is intact" in error
    assert last.read_bytes() == before
    assert not list(FOLDER.glob("*.tmp"))
    assert cli(loop, tokens, "--trainer.max_steps=4", "--ckpt_path=last") == 0


# Reading.


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """Change bytes inside a tensor. torch would load them without an error."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8] = bytes(255 - byte for byte in data[middle : middle + 8])
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("loop", "damage", "reason"),
    [
        ("fit", cut, "is damaged"),
        ("fabric", flip, "is damaged (in "),
        ("fit", lambda path: path.write_bytes(b"garbage" * 1000), "is damaged (File is not a zip file)"),
        ("fabric", lambda path: path.write_bytes(b""), "is empty"),
    ],
)
def test_last_falls_back_to_a_checkpoint_that_can_be_read(tokens, capsys, loop, damage, reason):
    more = ["--checkpoint.save_top_k=-1", *RECORD]
    assert cli(loop, tokens, *more) == 0
    expected = read("record.txt")
    damage(FOLDER / "last.ckpt")
    (FOLDER / "last.ckpt.tmp").write_bytes(b"left over")
    # The checkpoint of step 2 is damaged too, so the run continues from step 1.
    cut(FOLDER / "epoch=0-step=2.ckpt")
    capsys.readouterr()
    assert cli(loop, tokens, *more, "--ckpt_path=last") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "last.ckpt " in line and "continuing" in line]
    assert f"{FOLDER}/last.ckpt {reason}" in line
    assert line.endswith(f"continuing from {FOLDER}/epoch=0-step=1.ckpt")
    assert read("record.txt") == expected
    assert len(Path("record.txt").read_text().splitlines()) == 3  # steps 1, 2, and 2 again
    assert torch.load(FOLDER / "last.ckpt", weights_only=True)["global_step"] == 2
    assert (FOLDER / "last.ckpt.damaged").exists()


def test_last_with_nothing_to_read_is_one_clear_error(tokens, capsys):
    assert fit(tokens) == 0
    for path in FOLDER.glob("*.ckpt"):
        path.write_bytes(b"")
    error = error_of(capsys, fit(tokens, "--ckpt_path=last"))
    assert "no checkpoint of the run can be read" in error
    assert all(f"{name} is empty" in error for name in ("last.ckpt", "step=2.ckpt"))
    assert sorted(path.name for path in FOLDER.glob("*")) == ["epoch=0-step=2.ckpt", "last.ckpt"]


def test_everything_written_loads_without_executing_anything(tokens):
    for loop in ("fit", "fabric"):
        assert cli(loop, tokens, "--checkpoint.save_top_k=-1") == 0
    written = sorted(Path("logs").rglob("*.ckpt"))
    assert len(written) == 6
    for path in written:
        assert torch.load(path, weights_only=True)["callbacks"]


# Signals.


def test_kill_9(tokens, tmp_path):
    hits = kill.run(tmp_path, tokens, kills=3, steps=25, longest=0.1, begin=kill.fork)
    assert hits >= 2


@pytest.mark.parametrize(("loop", "window"), [("fit", 3), ("fabric", 2)])
def test_sigterm_saves_after_the_step_and_the_next_start_continues(tokens, capsys, loop, window):
    more = [f"--trainer.accumulate_grad_batches={window}", "--checkpoint.every_n_train_steps=100", *RECORD]
    # A validation falls inside the accumulation window that gets the signal. Nothing can be saved inside a window.
    more += ["--trainer.max_steps=6", f"--trainer.val_check_interval={2 * window + 1}"]
    assert cli(loop, tokens, *more, "--trainer.logger.init_args.name=calm") == 0
    expected = read("record.txt")
    os.remove("record.txt")
    first = ["--trainer.callbacks+=tests.faults.test_faults.Terminator", "--trainer.callbacks.at=2"]
    with pytest.raises(SystemExit) as stopped:
        cli(loop, tokens, *more, *first)
    assert stopped.value.code == 143
    last = FOLDER / "last.ckpt"
    assert f"SIGTERM: saved step 3 to {last}; --ckpt_path last continues from there" in capsys.readouterr().out
    assert torch.load(last, weights_only=True)["global_step"] == 3
    assert cli(loop, tokens, *more, "--ckpt_path=last") == 0
    assert len(Path("record.txt").read_text().splitlines()) == len(expected) == 6 * window
    assert read("record.txt") == expected


@pytest.mark.parametrize(("loop", "batch"), [("fit", 1), ("fit", 2), ("fabric", 2)])
def test_sigterm_in_a_validation_does_not_wait_for_its_end(tokens, capsys, loop, batch):
    more = [*RECORD, "--trainer.max_steps=6", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=3"]
    calm = ["--trainer.logger.init_args.name=calm", "--checkpoint.every_n_train_steps=4"]
    assert cli(loop, tokens, *more, *calm) == 0
    more.append("--checkpoint.every_n_train_steps=100")
    expected = read("record.txt")
    os.remove("record.txt")
    first = ["--trainer.callbacks+=tests.faults.test_faults.Terminator", "--trainer.callbacks.validation=2"]
    first += [f"--trainer.callbacks.batch={batch}"]
    with pytest.raises(SystemExit) as stopped:
        cli(loop, tokens, *more, *first)
    assert stopped.value.code == 143
    assert "SIGTERM: saved step 4" in capsys.readouterr().out
    # The checkpoint is that of the step before the validation, not of half a validation.
    saved = torch.load(FOLDER / "last.ckpt", weights_only=True)["loops"]["fit_loop"]
    usual = torch.load("logs/calm/version_0/checkpoints/last.ckpt", weights_only=True)["loops"]["fit_loop"]
    for key in ("epoch_loop.state_dict", "epoch_loop.batch_progress", "epoch_progress", "state_dict"):
        assert kill.same(saved[key], usual[key]), key
    assert cli(loop, tokens, *more, "--ckpt_path=last") == 0
    assert len(Path("record.txt").read_text().splitlines()) == len(expected) == 6
    assert read("record.txt") == expected


@pytest.mark.parametrize("loop", ["fit", "fabric"])
def test_ctrl_c_saves_after_the_step_and_the_next_start_continues(tokens, capfd, loop):
    more = ["--trainer.accumulate_grad_batches=2", "--checkpoint.every_n_train_steps=100", "--trainer.max_steps=6"]
    first = ["--trainer.callbacks+=tests.faults.test_faults.Terminator", "--trainer.callbacks.at=2"]
    with pytest.raises(SystemExit) as stopped:
        cli(loop, tokens, *more, *first, "--trainer.callbacks.number=2")
    assert stopped.value.code == 130
    printed = capfd.readouterr()
    assert "Ctrl-C: saving when the step is done; once more stops at once" in printed.err
    last = FOLDER / "last.ckpt"
    line = f"Ctrl-C: saved step 3 to {last}; --ckpt_path last continues from there (the signal came during step 3)"
    assert line in printed.out
    assert cli(loop, tokens, *more, "--ckpt_path=last") == 0
    assert torch.load(last, weights_only=True)["global_step"] == 6


@pytest.mark.parametrize("loop", ["fit", "fabric"])
def test_ctrl_c_twice_stops_at_once(tokens, capsys, loop):
    first = ["--trainer.callbacks+=tests.faults.test_faults.Terminator", "--trainer.callbacks.at=1"]
    status = cli(loop, tokens, *first, "--trainer.callbacks.number=2", "--trainer.callbacks.twice=true")
    assert status == 130
    assert "interrupted; --ckpt_path last continues from the last checkpoint" in capsys.readouterr().err
    assert torch.load(FOLDER / "last.ckpt", weights_only=True)["global_step"] == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Terminator(RunCallback):
    """Sends a signal to its own process: after step ``at``, or in the ``batch``-th batch of a validation."""

    def __init__(self, at: int = -1, validation: int = -1, batch: int = 1, number: int = 15, twice: bool = False):
        self.at, self.validation, self.batch, self.sent, self.evaluations = at, validation, batch, False, 0
        self.number, self.twice = number, twice

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at and not self.sent:
            self._send()

    def on_validation_start(self, trainer, pl_module):
        self.evaluations += 1
        if self.evaluations == self.validation:
            # Send the signal inside the forward of a batch, where the Fabric loop has no hook.
            pl_module.model.blocks[0].register_forward_pre_hook(lambda *_: self._in_batch())

    def _in_batch(self):
        self.batch -= 1
        if self.batch == 0:
            self._send()

    def _send(self):
        if not self.sent:
            self.sent = True
            for _ in range(1 + self.twice):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("workers", "begin"), [(0, kill.fork), (2, kill.start)])
def test_sigterm_as_a_process_meets_it(tokens, tmp_path, workers, begin):
    """A real process gives status and message. The signal comes from outside, and reaches loader workers too."""
    options = ("--checkpoint.every_n_train_steps=1000", f"--data.num_workers={workers}")
    words = kill.command(tokens, 2000, "fit", *options)
    process = begin(words, tmp_path)
    assert kill.wait_for(process, lambda: kill.size(tmp_path / "record.txt") > 0)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143
    step = kill.last_checkpoint(tmp_path)["global_step"]
    log = (tmp_path / "log.txt").read_text()
    assert f"SIGTERM: saved step {step} to " in log
    assert "Traceback" not in log
    assert max(read(tmp_path / "record.txt"))[0] == step


LEFT_BEHIND = """
import subprocess, sys
from multiprocessing import active_children, set_start_method
from sbn_lightning.data import TokenDataModule
left = []
for start in ("fork", "forkserver"):  # the defaults of Python up to 3.13, and of later versions
    set_start_method(start, force=True)
    data = TokenDataModule(sys.argv[1], batch_size=1, sequence_length=64, num_workers=1)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    first = next(batches)
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in active_children())], check=True)
    print(sum(1 for _ in zip(range(20), batches)), len(active_children()))
    left.append(batches)
"""


def test_a_loader_process_ends_with_its_parent_and_with_nobody_else(tokens):
    """A signal from outside does not end the loader process, and a script that leaves an iterator behind still ends."""
    command = [sys.executable, "-c", LEFT_BEHIND, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.split() == ["20", "1", "20", "2"]


def test_a_thread_that_cannot_listen_trains_all_the_same(tmp_path):
    trainer = quiet_trainer([DurableCheckpoint(tmp_path, every_n_train_steps=3)], enable_checkpointing=True)
    thread = threading.Thread(target=trainer.fit, args=(ForeignModule(), regression_loader()))
    thread.start()
    thread.join()
    assert trainer.global_step == 6


def test_durable_checkpoint_reads_and_writes_the_state_of_modelcheckpoint():
    assert DurableCheckpoint(every_n_train_steps=5).state_key == ModelCheckpoint(every_n_train_steps=5).state_key


# Data.


@pytest.mark.parametrize(("loop", "workers"), [("fit", 0), ("fabric", 2)])
def test_a_shard_that_vanishes_while_training_is_named(tmp_path, capsys, loop, workers):
    from sbn_lightning.data import prepare

    folder = tmp_path / "many"
    options = {"tokenizer": "byte", "max_bytes": 60_000, "num_workers": 1, "chunk_bytes": "4KB"}
    prepare(input="stdlib", output=str(folder), **options)
    more = [f"--data.num_workers={workers}", "--trainer.max_steps=2000", "--trainer.limit_val_batches=0"]
    more += ["--trainer.callbacks+=tests.faults.test_faults.Vandal", f"--trainer.callbacks.folder={folder}/train"]
    error = error_of(capsys, cli(loop, folder, *more, "--checkpoint.every_n_train_steps=1000"))
    assert "is missing" in error
    assert f"shard {folder}/train/chunk-" in error


class Vandal(RunCallback):
    """Deletes all shards after the first step."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for shard in self.folder.glob("*.bin"):
            shard.unlink()


# Secrets.


def test_nothing_written_holds_a_secret(tokens, monkeypatch):
    monkeypatch.setenv("BUCKET_TOKEN", "hunter2hunter2")
    url = "s3://AKIAKEY:Sesam0effneDich@bucket/x?X-Amz-Signature=abc123def&part=7/hunter2hunter2"
    more = [*RECORD, f"--trainer.callbacks.note={url}", "--trainer.max_steps=1"]
    for loop in ("fit", "fabric"):
        assert cli(loop, tokens, *more) == 0
    files = [path for path in Path("logs").rglob("*") if path.is_file()]
    assert any(path.suffix == ".ckpt" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not any(secret in content for secret in (b"Sesam0effneDich", b"hunter2", b"abc123def")), path
    config = (FOLDER.parent / "config.yaml").read_text()
    assert "note: s3://***@bucket/x?X-Amz-Signature=***&part=7/***" in config
    assert f"path: {tokens}" in config


def test_only_secrets_are_hidden(monkeypatch):
    monkeypatch.setenv("SHORT_KEY", "a")
    plain = {"tokenizer": "byte", "eos_token_id": 3, "path": "s3://bucket/a?b=c", "note": "a@b.de", "keys": ["a", None]}
    assert without_secrets(plain) == plain
    secrets = {"api_key": "x", "hub_token": "y", "paths": {"gs://u:p@b/c": 1.0}, "db": ["postgres://u@h/d"]}
    hidden = {"api_key": "***", "hub_token": "***", "paths": {"gs://***@b/c": 1.0}, "db": ["postgres://***@h/d"]}
    assert without_secrets(secrets) == hidden
