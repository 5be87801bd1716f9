"""The processes of one run: one for each GPU, started together and ended together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

TURN = "SBN_BENCHMARK_TURN"  # The variable that names the file a process waits for before it uses a GPU.


class Ranks:
    """A command in one process for each rank. The processes start at once, and wait for their turn on the GPUs.

    Args:
        command: The program and its arguments. The program imports its modules and calls :func:`wait_for_turn`.
        ranks: The number of processes. With one, the process does not learn that it is a rank.
        environment: Variables that are added to those of this process.
    """

    def __init__(self, command: Sequence[str], ranks: int, environment: Mapping[str, str]) -> None:
        inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self._folder = tempfile.TemporaryDirectory()
        self._turn = Path(self._folder.name, "turn")
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (the processes write to it until `finish` closes it)
        self._processes = []
        for rank in range(ranks):
            # Lightning takes a process with these variables for one that somebody else has started.
            own = {**place, "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            variables = {**inherited, **environment, **own, TURN: str(self._turn)}
            process = subprocess.Popen(command, stdout=self._output, env=variables, start_new_session=True)
            self._processes.append(process)

    def finish(self, limit: float, take: Callable[[str], None] | None = None) -> tuple[str, str]:
        """Give the processes their turn, and wait for them. If one fails, or time is up, all are killed.

        Args:
            limit: The most seconds that this may take.
            take: A function that gets each line as soon as it is printed.

        Returns:
            What all ranks printed, and what failed, which is empty if nothing did.
        """
        self._turn.touch()
        end, failure, taken = time.monotonic() + limit, "", 0
        try:
            while not failure and any(one.poll() is None for one in self._processes):
                time.sleep(0.1)
                if time.monotonic() > end:
                    failure = f"killed after {limit:.0f} seconds"
                failure = next((f"exit status {one.returncode}" for one in self._processes if one.poll()), failure)
                taken = self._take(take, taken)
        finally:  # Also if this process is interrupted.
            _kill(self._processes)
        failure = failure or next((f"exit status {one.returncode}" for one in self._processes if one.returncode), "")
        self._take(take, taken)
        printed = self._printed()
        self.kill()
        return printed, failure

    def _printed(self) -> str:
        # The processes share the position in the file, so it must not be moved.
        return os.pread(self._output.fileno(), os.fstat(self._output.fileno()).st_size, 0).decode()

    def _take(self, take: Callable[[str], None] | None, taken: int) -> int:
        """Hand over the whole lines after the first ``taken``. Return how many there are."""
        if take is None:
            return 0
        lines = self._printed().split("\n")[:-1]
        for line in lines[taken:]:
            take(line)
        return len(lines)

    def kill(self) -> None:
        """End the processes, if they have not ended."""
        _kill(self._processes)
        self._output.close()
        self._folder.cleanup()


def wait_for_turn() -> None:
    """Wait until the process that has started this one says that the GPUs are free. Exit if that process is gone."""
    path, parent = os.environ.get(TURN), os.getppid()
    while path is not None and not os.path.exists(path):
        if os.getppid() != parent or not os.path.isdir(os.path.dirname(path)):
            sys.exit("the process that has started this one has ended")
        time.sleep(0.05)


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for one in processes:
        if one.poll() is None:
            os.killpg(one.pid, signal.SIGKILL)  # The process leads a session, so its children end with it.
            one.wait()
