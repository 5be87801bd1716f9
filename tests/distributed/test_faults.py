"""One rank of two fails. Every rank ends soon, with the cause that the failing rank had, and no checkpoint is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sbn_lightning.checkpoints.resume import why_unreadable

ROOT = Path(__file__).parents[2]
# What fails, the rank, what each rank says, and the last step that is saved.
FAULTS = {
    "killed": (1, ("rank 1: gone without a word for 4 seconds; was it killed?", ""), 2),
    "memory": (1, ("rank 1: OutOfMemoryError: CUDA out of memory", "OutOfMemoryError: CUDA out of memory"), 2),
    "disk": (0, ("No space left on device", "rank 0: DataError: cannot write the checkpoint"), 1),
    "recipe": (1, ("rank 1 has another recipe than rank 0: trainer.max_steps=6, not 5",) * 2, 0),
}


def run_forked(folder: Path, jobs: list[dict[str, object]], timeout: float) -> None:
    """Run jobs of :mod:`tests.distributed.forked`, one after the other."""
    file = folder / "jobs.json"
    file.write_text(json.dumps([job | {"folder": str(job["folder"])} for job in jobs]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "tests.distributed.forked", str(file)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=timeout)


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """The folder in which the runs failed."""
    folder = tmp_path_factory.mktemp("failed")
    jobs = [
        {"ranks": 2, "function": "fail", "folder": folder / kind, "options": {"kind": kind, "rank": rank}}
        for kind, (rank, _, _) in FAULTS.items()
    ]
    run_forked(folder, jobs, 240)
    return folder


@pytest.mark.parametrize("kind", FAULTS)
def test_all_ranks_end_with_the_cause_of_the_one_that_failed(kind, failed):
    rank, told, saved = FAULTS[kind]
    done = json.loads((failed / kind / "done.json").read_text())
    logs = [(failed / kind / f"rank{i}.log").read_text() for i in range(2)]
    assert done["seconds"] < 60
    assert done["statuses"] == [-9 if kind == "killed" and i == rank else 1 for i in range(2)], logs
    for text, log in zip(told, logs, strict=True):
        assert text in log
    steps = sorted(failed.glob(f"{kind}/step=*.ckpt"))
    assert [file.stem for file in steps] == [f"step={step}" for step in range(1, saved + 1)]
    assert all(why_unreadable(file) == "" for file in steps)
