"""The processes of one run: one for each GPU, started together and ended together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence


def run_ranks(command: Sequence[str], ranks: int, limit: float, environment: Mapping[str, str]) -> tuple[str, str]:
    """Runs a command in one process for each rank. If one fails, or time is up, all processes are killed.

    Args:
        command: The program and its arguments.
        ranks: The number of processes. With one, the process does not learn that it is a rank.
        limit: The most seconds that the run may take.
        environment: Variables that are added to those of this process.

    Returns:
        What rank 0 printed, and what failed, which is empty if nothing did.
    """
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    with tempfile.TemporaryFile("w+") as output:
        processes = []
        for rank in range(ranks):
            # Lightning takes a process with these variables for one that somebody else has started.
            own = {**place, "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            stdout = output if rank == 0 else subprocess.DEVNULL
            processes.append(
                subprocess.Popen(
                    command, stdout=stdout, env={**inherited, **environment, **own}, start_new_session=True
                )
            )
        failure = _wait(processes, limit)
        output.seek(0)
        return output.read(), failure


def _wait(processes: Sequence[subprocess.Popen[bytes]], limit: float) -> str:
    end = time.monotonic() + limit
    failure = ""
    while not failure and any(one.poll() is None for one in processes):
        time.sleep(0.1)
        if time.monotonic() > end:
            failure = f"killed after {limit:.0f} seconds"
        failure = next((f"exit status {one.returncode}" for one in processes if one.poll()), failure)
    for one in processes:
        if one.poll() is None:
            os.killpg(one.pid, signal.SIGKILL)  # The process leads a session, so its children end with it.
            one.wait()
    return failure or next((f"exit status {one.returncode}" for one in processes if one.returncode), "")
