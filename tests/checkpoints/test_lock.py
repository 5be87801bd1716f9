"""Only one process writes a run, however the process before it ended."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sbn_lightning.checkpoints import lock as module
from sbn_lightning.checkpoints.lock import RunIsBusy, RunLock
from sbn_lightning.core.errors import DataError

FOLDER = Path("logs/v/version_0/checkpoints")
FILE = FOLDER.with_name("checkpoints.lock")
HOLDER = """
import sys, time
from pathlib import Path
from sbn_lightning.checkpoints.lock import RunLock
lock = RunLock()
lock.acquire(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def holder():
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, f"{root}/kernels"])}
    command = [sys.executable, "-c", HOLDER, str(FOLDER)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_with_the_first_ones_process_and_host(holder):
    words = f"{FOLDER} is being written by process {holder.pid} on {socket.gethostname()} since "
    with pytest.raises(RunIsBusy, match=words):
        RunLock().acquire(FOLDER)
    assert json.loads(FILE.read_text())["pid"] == holder.pid


def test_what_a_killed_process_left_is_taken_over(holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert FILE.exists()
    lock = RunLock()
    lock.acquire(FOLDER)
    assert json.loads(FILE.read_text())["pid"] == os.getpid()
    lock.release()
    assert not FILE.exists()


@pytest.mark.parametrize("left", [b"", b'{"pid"', b"[]"])
def test_a_lock_that_says_nothing_is_taken_over(left):
    FILE.parent.mkdir(parents=True)
    FILE.write_bytes(left)
    lock = RunLock()
    lock.acquire(FOLDER)
    lock.acquire(FOLDER)  # a second call: this process holds the lock already
    lock.release()
    lock.release()


def test_where_files_cannot_be_locked_the_process_id_tells(holder, monkeypatch):
    monkeypatch.setattr(module, "_is_held", lambda descriptor: None)
    with pytest.raises(RunIsBusy, match=f"process {holder.pid} "):
        RunLock().acquire(FOLDER)
    FILE.write_text(json.dumps({"pid": holder.pid, "host": "another"}))
    with pytest.raises(RunIsBusy, match="on another since"):
        RunLock().acquire(FOLDER)
    holder.kill()
    holder.wait()
    FILE.write_text(json.dumps({"pid": holder.pid, "host": socket.gethostname()}))
    lock = RunLock()
    lock.acquire(FOLDER)
    lock.release()


def test_a_folder_that_cannot_be_written_is_one_line():
    Path("logs").write_text("a file")
    with pytest.raises(DataError, match=r"cannot write to logs/v/version_0: .*; give another folder"):
        RunLock().acquire(FOLDER)
