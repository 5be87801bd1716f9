"""Do a list of runs as processes, several at a time. The list can be stopped and continued at any moment.

Each run is a process of its own, so a crash of one run does not end the others, and its GPU memory is free when it
ends. Each process has its own session, so Ctrl-C reaches only this process, which tells the others to save and stop. A
worker also stops by itself when this process is gone, because its stdin ends. A run that is started again continues
from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.reproduce.grid import Run
from research.reproduce.results import FILE, append_result, read_results
from sbn_lightning.core.errors import ConfigError, SBNError
from sbn_lightning.core.files import write_text

WORKER = "from research.reproduce.worker import main; main()"
# Seconds from the order to stop until a process is killed.
GRACE = 60.0


@dataclass
class Worker:
    """The process of a run.

    Attributes:
        run: The run.
        process: The process.
        folder: The folder that the process writes to.
        gpu: The GPU of the process, as CUDA_VISIBLE_DEVICES names it; None without a GPU.
        started: The start of the process, in seconds of the monotonic clock.
    """

    run: Run
    process: subprocess.Popen[bytes]
    folder: Path
    gpu: str | None
    started: float


class Runner:
    """Do the runs of a list that are not done yet.

    Args:
        output: The folder of the results.
        probe: The settings of the probe after each run, or None for no probe.
        jobs: The number of runs at a time. They are spread over the GPUs, and each run has one GPU.
        keep_checkpoints: Whether to keep the checkpoints of finished runs.
        gpus: The GPUs to use, as CUDA_VISIBLE_DEVICES names them; None for all that are visible.
    """

    def __init__(
        self,
        output: Path,
        probe: dict[str, Any] | None,
        jobs: int,
        keep_checkpoints: bool = False,
        gpus: Sequence[str] | None = None,
    ) -> None:
        self.output, self.probe, self.jobs, self.keep_checkpoints = output, probe, jobs, keep_checkpoints
        self.gpus = visible_gpus() if gpus is None else list(gpus)
        self.failed: dict[str, str] = {}
        self._workers: list[Worker] = []
        self._recorded: set[str] = set()  # The ids of the runs that have a line.
        self._done = 0

    def __call__(self, runs: Sequence[Run], stop_after: float | None = None) -> int:
        """Do the runs.

        Args:
            runs: All runs that are wanted. Runs that have a line are left out.
            stop_after: The number of seconds after which running ones are told to save and stop, and no other run is
                started.

        Returns:
            The number of runs that are left.

        Raises:
            ConfigError: If another process runs in the same folder.
            SBNError: If runs failed. It is raised at the end, and names them.
            SystemExit: After Ctrl-C or SIGTERM, with everything saved.
        """
        from filelock import FileLock, Timeout

        (self.output / "runs").mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(str(self.output / ".lock"), timeout=0):
                left = self._run_all(list(runs), None if stop_after is None else time.monotonic() + stop_after)
        except Timeout as error:
            raise ConfigError(
                f"another process runs in {self.output}; wait for it, or give another --output"
            ) from error
        if self.failed:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.failed.items())
            raise SBNError(f"{len(self.failed)} of {len(runs)} runs failed, the others went on. {reasons}")
        return left

    def _run_all(self, runs: list[Run], deadline: float | None) -> int:
        self._recorded = {line["id"] for line in read_results(self.output / FILE)}
        for run in runs:  # A crash may have come between the end of a run and its line.
            self._collect(run)
        todo = [run for run in runs if run.id not in self._recorded]
        self._done = len(runs) - len(todo)
        total = len(runs)
        gpus = f" on GPUs {', '.join(self.gpus)}" if self.gpus else ""
        _say(f"runs: {total}, done before: {self._done}, at a time: {self.jobs}{gpus}")
        try:
            with _sigterm_as_interrupt():
                while todo or self._workers:
                    while todo and len(self._workers) < self.jobs:
                        self._workers.append(self._start(todo.pop(0)))
                    time.sleep(0.1)
                    for worker in [one for one in self._workers if one.process.poll() is not None]:
                        self._workers.remove(worker)
                        self._finish(worker, total)
                    if deadline is not None and time.monotonic() > deadline:
                        stopped = len(self._workers) + len(todo)
                        self._stop(total)
                        left = self._left(runs)
                        if stopped:
                            _say(f"time is up, runs left: {left}; the same command continues")
                        return left
        except KeyboardInterrupt:
            _say(f"stopping; {len(self._workers)} running save first (a second Ctrl-C does not wait for them)")
            self._stop(total)
            _say(f"stopped, runs left: {self._left(runs)}; the same command continues")
            raise SystemExit(130) from None
        finally:
            for worker in self._workers:  # Some are left only after a second Ctrl-C, or an error here.
                _signal(worker, signal.SIGKILL)
        return 0

    def _left(self, runs: Sequence[Run]) -> int:
        """Return how many runs have no line in the file, which is newer than the count here after Ctrl-C."""
        recorded = {line["id"] for line in read_results(self.output / FILE)}
        return sum(run.id not in recorded for run in runs)

    def _start(self, run: Run) -> Worker:
        folder = self.output / "runs" / run.id
        folder.mkdir(exist_ok=True)
        recipe = run.recipe | {"trainer": run.recipe["trainer"] | {"logger": _logger(folder)}}
        import yaml

        write_text(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))
        job = {
            "id": run.id,
            "name": run.name,
            "factors": run.factors,
            "varied": run.varied,
            "tokens": run.tokens,
            "probe": self.probe,
        }
        write_text(folder / "job.json", json.dumps(job))
        command = [sys.executable, "-c", WORKER, str(folder)]
        busy = [worker.gpu for worker in self._workers]
        gpu = min(self.gpus, key=busy.count, default=None)
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._environment(gpu),
            )
        return Worker(run, process, folder, gpu, time.monotonic())

    def _environment(self, gpu: str | None) -> dict[str, str]:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = str(max(1, cores // self.jobs))
        defaults = {
            "OMP_NUM_THREADS": share,
            "TORCHINDUCTOR_COMPILE_THREADS": share,
            "TOKENIZERS_PARALLELISM": "false",
        }
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        place = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        return defaults | dict(os.environ) | {"PYTHONPATH": path} | place

    def _finish(self, worker: Worker, total: int) -> None:
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        seconds = time.monotonic() - worker.started
        if worker.process.returncode == 0 and (result := self._collect(worker.run)):
            self._done += 1
            loss = result["validation"]["loss"]
            _say(f"[{self._done}/{total}] {worker.run.name}: validation loss {loss:.4f}, {seconds:.0f} s")
        else:
            reason = f"{_last_line(worker.folder / 'log.txt')} (see {worker.folder / 'log.txt'})"
            self.failed[worker.run.name] = reason
            _say(f"{worker.run.name} failed with status {worker.process.returncode}: {reason}")

    def _collect(self, run: Run) -> dict[str, Any] | None:
        """Move the result of a finished run to the results. Return it, or None if the run has no result."""
        folder = self.output / "runs" / run.id
        if not (folder / "result.json").is_file():
            return None
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if run.id not in self._recorded:
            append_result(self.output / FILE, result)
            self._recorded.add(run.id)
        if not self.keep_checkpoints:
            for checkpoints in folder.glob("version_*/checkpoints"):
                shutil.rmtree(checkpoints)
        return result

    def _stop(self, total: int) -> None:
        """Tell all workers to save and stop, wait for them, and collect the runs that were finished by then."""
        for worker in self._workers:
            _signal(worker, signal.SIGTERM)
        until = time.monotonic() + GRACE
        while self._workers:
            worker = self._workers[0]
            try:
                worker.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal(worker, signal.SIGKILL)
                worker.process.wait()
            self._workers.pop(0)
            if worker.process.returncode == 0:
                self._finish(worker, total)


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",")[: torch.cuda.device_count()]
    return [str(index) for index in range(torch.cuda.device_count())]


def _logger(folder: Path) -> dict[str, Any]:
    return {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(folder.parent), "name": folder.name},
    }


def _signal(worker: Worker, number: signal.Signals) -> None:
    if worker.process.poll() is None:
        worker.process.send_signal(number)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
