"""Runs are skipped, retried and stopped. A small script takes the place of the process that trains."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from research.reproduce import runner
from research.reproduce.grid import Run
from research.reproduce.results import append_result, read_results
from sbn_lightning.core.errors import ConfigError, DataError, SBNError

# Trains nothing. A "slow" one waits to be told to stop, the first time; a "bad" one fails.
STAND_IN = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
with (folder / "starts").open("a") as file: file.write("x")
def stop(*_):
    (folder / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
if "bad" in job["name"]: sys.exit("error: the loss is not finite")
(folder / "gpu").write_text(str(os.environ.get("CUDA_VISIBLE_DEVICES")))
(folder / "waiting").touch()
while "slow" in job["name"] and not (folder / "saved").exists(): time.sleep(0.01)
(folder / "result.json").write_text(json.dumps({"id": job["id"], "validation": {"loss": 3.0}}))
"""


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    monkeypatch.setattr(runner, "WORKER", STAND_IN)


def make(name):
    recipe = {"name": name, "trainer": {"max_steps": 1}, "data": {"batch_size": 1, "sequence_length": 1}}
    return Run(name, recipe, {}, {})


def starts(output, run):
    return len((output / "runs" / run.id / "starts").read_text())


def ids(output):
    return [line["id"] for line in read_results(output / "results.jsonl")]


def test_done_runs_are_skipped_and_a_failed_one_stops_nobody(tmp_path, capfd):
    bad, *good = runs = [make(name) for name in ("bad", "a", "b", "c")]
    with pytest.raises(SBNError, match=r"1 of 4 runs failed, the others went on. bad: error: the loss is not finite"):
        runner.Runner(tmp_path, None, jobs=2)(runs)
    assert sorted(ids(tmp_path)) == sorted(run.id for run in good)
    assert runner.Runner(tmp_path, None, jobs=2)(good) == 0
    assert [starts(tmp_path, run) for run in good] == [1, 1, 1]
    with pytest.raises(SBNError, match="1 of 1 runs failed"):
        runner.Runner(tmp_path, None, jobs=1)([bad])
    assert starts(tmp_path, bad) == 2
    assert "runs: 3, done before: 3, at a time: 2" in capfd.readouterr().err


def test_runs_are_spread_over_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "time", clock_that_jumps(tmp_path, waiting=4))
    runs = [make(f"slow{number}") for number in range(4)]
    runner.Runner(tmp_path, None, jobs=4, gpus=["3", "GPU-5e"])(runs, stop_after=1800)
    assert [(tmp_path / "runs" / run.id / "gpu").read_text() for run in runs] == ["3", "GPU-5e"] * 2


def test_a_result_without_its_line_is_not_run_again(tmp_path):
    """One crash came between the end of a run and its line. Another cut a line short."""
    first, second = make("a"), make("b")
    runner.Runner(tmp_path, None, jobs=1)([first, second])
    lines = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(lines[:-10])
    assert ids(tmp_path) == [first.id]
    runner.Runner(tmp_path, None, jobs=1)([first, second])
    assert ids(tmp_path) == [first.id, second.id]
    assert starts(tmp_path, second) == 1


def clock_that_jumps(folder, waiting=1):
    """A clock on which an hour passes as soon as so many runs wait."""

    def monotonic():
        return time.monotonic() + 3600 * (len(list(folder.glob("runs/*/waiting"))) >= waiting)

    return SimpleNamespace(monotonic=monotonic, sleep=time.sleep)


@pytest.fixture
def late_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "time", clock_that_jumps(tmp_path))


def test_time_is_up(tmp_path, late_clock, capfd):
    slow, late = make("slow"), make("late")
    assert runner.Runner(tmp_path, None, jobs=1)([slow, late], stop_after=1800) == 2
    assert (tmp_path / "runs" / slow.id / "saved").exists()
    assert "time is up, runs left: 2;" in capfd.readouterr().err
    assert runner.Runner(tmp_path, None, jobs=1)([slow, late]) == 0
    assert ids(tmp_path) == [slow.id, late.id]


def test_one_that_does_not_stop_is_killed(tmp_path, late_clock, monkeypatch):
    deaf = STAND_IN.replace('(folder / "saved").touch()\n    sys.exit(143)', "pass")
    assert deaf != STAND_IN
    monkeypatch.setattr(runner, "WORKER", deaf)
    monkeypatch.setattr(runner, "GRACE", 0.2)
    assert runner.Runner(tmp_path, None, jobs=1)([make("slow")], stop_after=1800) == 1


PARENT = """
import sys
from pathlib import Path
from research.reproduce import runner
from tests.research.test_runner import STAND_IN, make
runner.WORKER = STAND_IN
runner.Runner(Path(sys.argv[1]), None, jobs=2)([make("slow"), make("b"), make("c")])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_same_command_continues(tmp_path, number):
    slow, *others = runs = [make(name) for name in ("slow", "b", "c")]
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": root},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # shells ignore SIGINT in background jobs
    )
    until = time.monotonic() + 60
    while (
        len(ids(tmp_path)) < 2 or not (tmp_path / "runs" / slow.id / "waiting").exists()
    ) and time.monotonic() < until:
        time.sleep(0.02)
    with pytest.raises(ConfigError, match="another process runs in"):
        runner.Runner(tmp_path, None, jobs=2)(runs)
    parent.send_signal(number)
    _, printed = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert "stopped, runs left: 1; the same command continues" in printed
    assert "Traceback" not in printed
    assert (tmp_path / "runs" / slow.id / "saved").exists()
    runner.Runner(tmp_path, None, jobs=2)(runs)
    assert sorted(ids(tmp_path)) == sorted(run.id for run in runs)
    assert [starts(tmp_path, run) for run in others] == [1, 1]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    append_result(path, {"id": "a"})
    path.write_text(path.read_text() + "{half\n" + json.dumps({"id": "b"}) + "\n")
    with pytest.raises(DataError, match="line 2 is damaged"):
        read_results(path)
