"""The fixture ``forked_runs``, which runs the jobs of all tests that need several ranks in one process tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def forked_runs(request: pytest.FixtureRequest, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with one folder for each test module, in which its jobs ran.

    A module names its jobs in ``jobs_of_ranks(folder, tokens)``, as :mod:`tests.distributed.forked` takes them. The
    jobs of all collected modules run once, one after the other, in a process that has imported everything before.
    """
    root = tmp_path_factory.mktemp("ranks")
    modules = dict.fromkeys(item.module for item in request.session.items if hasattr(item.module, "jobs_of_ranks"))
    jobs: list[dict[str, Any]] = []
    for module in modules:
        jobs += module.jobs_of_ranks(root / module.__name__.rpartition(".")[2], tokens)
    file = root / "jobs.json"
    file.write_text(json.dumps([job | {"folder": str(job["folder"])} for job in jobs]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "tests.distributed.forked", str(file)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=300 * (1 + len(jobs)))
    return root


def statuses(folder: Path) -> list[int]:
    """The exit statuses of the ranks of a job."""
    found: list[int] = json.loads((folder / "done.json").read_text())["statuses"]
    return found
