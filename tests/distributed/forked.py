"""Run jobs on several ranks that one process forks: ``python -m tests.distributed.forked JOBS``.

Importing torch and Lightning takes longer than a small job. So one process imports them, and forks the ranks of each
job. JOBS is a JSON file: a list of ``{"ranks", "function", "folder", "options"}``. Each rank calls the function of
:mod:`tests.distributed.jobs`, :mod:`tests.distributed.trainer_jobs`, :mod:`tests.distributed.graph_jobs`,
:mod:`tests.distributed.own_module_jobs` or :mod:`tests.distributed.benchmark_jobs` with the folder and the options. Its
output goes to ``FOLDER/rankN.log``. The exit statuses of the ranks and the seconds that the job took go to
``FOLDER/done.json``.

The ranks talk over gloo. torch gives each group of ranks two threads, and each thread writes the name of its last
collective to the same C++ string, without a lock. The name ``ALLGATHER_COALESCED`` is too long to be stored within the
string, so two threads may give the same memory back. A rank then ends by a segmentation fault, about once in a hundred
thousand calls of ``DTensor.full_tensor``. So groups of the ranks have one thread here.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import distributed_c10d

from tests.distributed import benchmark_jobs, graph_jobs, jobs, own_module_jobs, trainer_jobs

# The most seconds that a job may take. On a busy machine a job takes many times as long as on an idle one.
LIMIT = 500.0


class OneThread(distributed_c10d.ProcessGroupGloo):  # type: ignore[misc]
    """A group of gloo that works on one collective after the other."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, **_: Any) -> None:
        options = self._Options()
        options._devices, options._timeout, options._threads = [self.create_default_device()], timeout, 1
        super().__init__(store, rank, size, options)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


def run_rank(rank: int, ranks: int, port: int, job: dict[str, Any]) -> None:
    """Run a job in a process that was forked for it. Does not return."""
    folder = Path(job["folder"])
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    distributed_c10d.ProcessGroupGloo = OneThread  # type: ignore[misc]
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    status = 0
    try:
        name = job["function"]
        module = next(
            one for one in (jobs, trainer_jobs, graph_jobs, own_module_jobs, benchmark_jobs) if hasattr(one, name)
        )
        getattr(module, name)(folder, **job.get("options", {}))
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(job: dict[str, Any]) -> None:
    """Run the ranks of a job, and wait for all of them."""
    Path(job["folder"]).mkdir(parents=True, exist_ok=True)
    start, port, ranks = time.monotonic(), free_port(), job["ranks"]
    waiting = {}
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            run_rank(rank, ranks, port, job)
        waiting[child] = rank
    statuses: dict[int, int] = {}
    while waiting and time.monotonic() - start < LIMIT:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            time.sleep(0.05)
        else:
            statuses[waiting.pop(child)] = os.waitstatus_to_exitcode(status)
    for child, rank in waiting.items():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        statuses[rank] = 999  # The rank did not end.
    done = {"statuses": [statuses[rank] for rank in range(ranks)], "seconds": time.monotonic() - start}
    Path(job["folder"], "done.json").write_text(json.dumps(done))


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
