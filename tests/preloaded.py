"""Processes in which everything is imported already: they are forked from one that did nothing else.

A process that trains imports for ten seconds, and many tests need one that then trains for two. A fresh interpreter
remains for what tests imports, or the end of an interpreter: a forked process ends without Python's clean-up.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import litdata  # noqa: F401
import pytest
from torch.utils import tensorboard  # noqa: F401

import sbn_lightning.cli.training
import sbn_lightning.data
import sbn_lightning.fabric  # noqa: F401

ROOT = Path(__file__).parents[1]


@cache
def _context() -> ForkServerContext:
    """Start the process to fork from. It ends with the tests."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


class Preloaded:
    """A running call of a function, in a process and a process group of its own. It has the methods of ``Popen``.

    Args:
        function: A function that can be imported. What it returns is the exit status, as for ``sys.exit``.
        arguments: The function's arguments.
        folder: The folder to run in.
        output: The file to which the process appends what it prints.
        environment: Variables of the environment to set, besides those that are set here.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        folder: Path,
        output: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        variables = {**os.environ, **(environment or {})}
        self._process = _context().Process(target=_run, args=(function, arguments, folder, output, variables))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        atexit.register(self.kill)  # multiprocessing would wait for a process that a failed test has left behind.

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        status = self._process.exitcode
        assert status is not None, f"the process still runs after {timeout} seconds"
        return status

    def kill(self) -> None:
        if self.poll() is None:
            self._process.kill()


def _run(
    function: Callable[..., Any], arguments: Sequence[Any], folder: Path, output: Path, environment: dict[str, str]
) -> None:
    os.setsid()  # so that a signal to the group reaches all its processes
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    raise SystemExit(function(*arguments))
