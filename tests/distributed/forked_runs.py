"""The fixture ``forked_runs``, which runs the jobs of all tests that need several ranks in one process tree."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def forked_runs(request: pytest.FixtureRequest, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with one folder for each test module, in which its jobs ran.

    A module names its jobs in ``jobs_of_ranks(folder, tokens)``, as :mod:`tests.distributed.forked` takes them. The
    jobs of all collected modules run once, one after the other, in a process that has imported everything before. If
    tests run in several processes, the first one that asks runs the jobs, and the others wait for it.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        root = tmp_path_factory.mktemp("ranks")
        _run_jobs(request.session, root, tokens)
        return root
    root = tmp_path_factory.getbasetemp().parent / "ranks"  # The processes share the parent folder.
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "ran").exists():
            _run_jobs(request.session, root, tokens)
            (root / "ran").touch()
    return root


def _run_jobs(session: pytest.Session, root: Path, tokens: Path) -> None:
    modules = dict.fromkeys(item.module for item in session.items if hasattr(item.module, "jobs_of_ranks"))
    jobs: list[dict[str, Any]] = []
    for module in modules:
        jobs += module.jobs_of_ranks(root / module.__name__.rpartition(".")[2], tokens)
    file = root / "jobs.json"
    file.write_text(json.dumps([job | {"folder": str(job["folder"])} for job in jobs]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    environment["TRITON_INTERPRET"] = "1"  # Kernels of the precision plugin run on the CPU.
    command = [sys.executable, "-m", "tests.distributed.forked", str(file)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=300 * (1 + len(jobs)))


def statuses(folder: Path) -> list[int]:
    """The exit statuses of the ranks of a job."""
    found: list[int] = json.loads((folder / "done.json").read_text())["statuses"]
    return found


def jobs_on_two_ranks(folder: Path, functions: Iterable[str]) -> list[dict[str, Any]]:
    """One job on two ranks for each function, in a folder of its name."""
    return [{"ranks": 2, "function": name, "folder": folder / name} for name in functions]


def assert_two_ended(folder: Path) -> None:
    """Both ranks of a job ended well; otherwise the failure shows their logs."""
    assert statuses(folder) == [0, 0], [(folder / f"rank{rank}.log").read_text() for rank in (0, 1)]
