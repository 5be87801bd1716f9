"""Which trial a process does next, and for how long: trials are done one after the other until the time is up."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from research.pretrained.train import FILE, Setting, Training
from research.pretrained.trials import Trial, long, short, untrained
from research.queue import claim, read_rows
from research.training import STATE
from sbn_lightning.core.files import write_text

LENGTHS = [million * 1_000_000 for million in (200, 100, 50, 40, 30, 25, 20, 15, 12, 10, 8, 6, 5, 4, 3, 2)]
# Seconds that a trial takes besides its steps: loading, compiling, measuring.
OVERHEAD = 15.0
# Seconds that the first process waits for the short trials of the others.
PATIENCE = 60.0


def work(
    setting: Setting,
    seconds: float,
    workers: int,
    short_tokens: int,
    tokens: int | None,
    trials: Sequence[Trial] | None = None,
    later: float = 0.0,
) -> None:
    """Do one trial after the other until the time is up.

    Args:
        setting: What all trials share.
        seconds: The number of seconds until running trials are saved.
        workers: The number of processes that work in the folder.
        short_tokens: The number of tokens of the short trials.
        tokens: The number of tokens of the long trials; None takes what the measured speeds allow.
        trials: The trials to do in place of the short and long ones.
        later: How many seconds a later call on this machine will have for trials that are not at their end.
    """
    deadline = time.monotonic() + seconds
    if trials is not None:
        for trial in trials:
            _try(trial, setting, deadline, later)
        return
    first = short(short_tokens)
    for trial in [*first, *untrained()]:
        _try(trial, setting, deadline)
    for trial in _plan(setting, [trial.name for trial in first], deadline, workers, tokens):
        _try(trial, setting, deadline)


def _plan(setting: Setting, first: Sequence[str], deadline: float, workers: int, tokens: int | None) -> list[Trial]:
    """Return the long trials. The first process decides, when the short trials are over; the others read its plan."""
    from filelock import FileLock

    file = setting.output / "plan.json"
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            until = min(time.monotonic() + PATIENCE, deadline)
            while time.monotonic() < until:
                ends = [row for row in read_rows(setting.output / FILE) if row["finished"]]
                if set(first) <= {row["trial"]["name"] for row in ends}:
                    break
                time.sleep(1.0)
            ends = [row for row in read_rows(setting.output / FILE) if row["finished"]]
            speeds = _speeds(ends)
            if tokens is None:
                # Few processes do the most valuable trials at a length that says something.
                wanted = long(1, ends)[: max(6, 2 * workers)]
                tokens = longest(speeds, deadline - time.monotonic(), wanted, workers, setting.expected_speed)
            print(f"long trials have {tokens:,} tokens; tokens a second: {speeds}", flush=True)
            write_text(file, json.dumps([asdict(trial) for trial in long(tokens, ends)]))
        return [Trial(**values) for values in json.loads(file.read_text(encoding="utf-8"))]


def longest(
    speeds: dict[str, float], seconds: float, trials: Sequence[Trial], workers: int, expected_speed: float
) -> int:
    """Return the largest of :data:`LENGTHS` with which all trials fit; the smallest if none does.

    Args:
        speeds: The tokens a second of a process, for trials with and without a teacher.
        seconds: The number of seconds that each process has.
        trials: The trials, in their order. Each process takes the next one when it is free.
        workers: The number of processes.
        expected_speed: The tokens a second of a trial whose kind is not in ``speeds``.
    """
    for tokens in LENGTHS:
        busy = [0.0] * workers
        for trial in trials:
            busy[busy.index(min(busy))] += OVERHEAD + tokens / _speed_of(trial, speeds, expected_speed)
        if max(busy) <= seconds:
            return tokens
    return LENGTHS[-1]


def _speeds(rows: Sequence[dict[str, object]]) -> dict[str, float]:
    """Return the middle of the measured tokens a second, by whether a trial has a teacher."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["tokens_per_second"]:
            kind = "plain" if row["trial"]["distillation"] is None else "distilled"  # type: ignore[index]
            found.setdefault(kind, []).append(float(row["tokens_per_second"]))  # type: ignore[arg-type]
    return {kind: sorted(values)[len(values) // 2] for kind, values in found.items()}


def _speed_of(trial: Trial, speeds: dict[str, float], expected: float) -> float:
    return speeds.get("plain" if trial.distillation is None else "distilled", expected)


def _try(trial: Trial, setting: Setting, deadline: float, later: float | None = None) -> None:
    """Do a trial unless it is done, somebody else does it, or it fits no more. A failure does not end the others.

    Args:
        trial: What to train.
        setting: What all trials share.
        deadline: The moment of the monotonic clock at which a trial is saved.
        later: The seconds of a later call. None means that half of a trial is worth its start.
    """
    rows = read_rows(setting.output / FILE)
    if _is_done(trial, rows):
        return
    started = (setting.output / trial.folder / STATE).is_file()
    left = deadline - time.monotonic()
    speed = _speed_of(trial, _speeds(rows), setting.expected_speed)
    needed = OVERHEAD + trial.tokens / speed
    enough = 0.5 * needed if later is None else needed - later
    if left < 2 * OVERHEAD or (not started and left < enough):
        print(
            f"left out: {trial.name} needs about {needed:.0f} s at {speed:,.0f} tokens a second, and {left:.0f} s are "
            "left",
            flush=True,
        )
        return
    with claim(setting.output / "claims" / trial.folder) as mine:
        # Another process may have ended the trial just now.
        if not mine or _is_done(trial, read_rows(setting.output / FILE)):
            return
        print(f"{time.strftime('%H:%M:%S')} {trial.name}", flush=True)
        try:
            Training(trial, setting).run(deadline)
        except Exception:  # The other trials are worth having.
            traceback.print_exc()
            if setting.together:  # The other processes wait for this one.
                raise
        if setting.device.type == "cuda":
            gc.collect()
            torch.compiler.reset()
            torch.cuda.empty_cache()


def _is_done(trial: Trial, rows: Sequence[dict[str, Any]]) -> bool:
    return any(row["finished"] and row["trial"]["name"] == trial.name for row in rows)
