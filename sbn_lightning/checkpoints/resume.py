"""``--ckpt_path``: choose the checkpoint that training continues from, or say why a checkpoint cannot be read.

``last`` means the newest state of the run that the command names; :mod:`sbn_lightning.checkpoints.search` finds it.
This module decides what follows from the search: to continue, to start anew and say so, or to refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from sbn_lightning.checkpoints import lightning_file
from sbn_lightning.checkpoints.lock import RunLock
from sbn_lightning.checkpoints.search import Place, is_half_written, newest_first, newest_run, why_unreadable
from sbn_lightning.core.errors import ConfigError, DataError

__all__ = ["Newest", "check_can_be_read", "newest_state", "why_unreadable"]


@dataclass(frozen=True)
class Newest:
    """The newest state of a run.

    Attributes:
        folder: The folder that the run saves to.
        path: The checkpoint: a file, or the folder of a sharded one.
    """

    folder: Path
    path: Path


def newest_state(
    place: Place, tell: Callable[[str], None], *, training: bool = True, lock: RunLock | None = None
) -> Newest | None:
    """The newest state of a command's run that can be read.

    Without any checkpoint, training starts anew and a line says so. A folder of shards that was never complete is no
    checkpoint. A job that was stopped before its first checkpoint can then be started again with the same command. A
    checkpoint that cannot be read is put aside, and the next older one takes its place.

    Args:
        place: Where the command's runs keep their checkpoints.
        tell: A function that prints a line.
        training: Whether training is to continue. Otherwise nothing is put aside.
        lock: The lock to take for this process before the run's folder is searched. None takes no lock.

    Returns:
        The newest state; None if there is none and training starts anew.

    Raises:
        ConfigError: If there is no checkpoint and the command does not train, or if another process writes the run.
        DataError: If there are checkpoints and none of them can be read.
    """
    runs = place.runs()
    if not runs:
        passed = "".join(f"; passed over {one}" for one in place.passed_over())
        if not training:
            raise ConfigError(f"--ckpt_path last: no checkpoint in {place}{passed}")
        tell(f"--ckpt_path last: no checkpoint in {place} yet, training starts anew{passed}")
        return None
    folder = newest_run(runs)
    if lock is not None:
        lock.acquire(folder)
    damage: dict[Path, str] = {}
    for path in newest_first(place.runs().get(folder, [])):
        if reason := why_unreadable(path):
            damage[path] = reason
            continue
        break
    else:
        if training and all(map(is_half_written, damage)):
            passed = "".join(f"; passed over {path} (only half written)" for path in damage)
            tell(f"--ckpt_path last: no checkpoint in {place} is complete yet, training starts anew{passed}")
            return None
        reasons = "; ".join(f"{path} {reason}" for path, reason in damage.items())
        raise DataError(f"--ckpt_path last: no checkpoint of the run can be read: {reasons}; delete them to start anew")
    for bad, reason in damage.items():
        name = _put_aside(bad).name if training else bad.name
        tell(f"--ckpt_path last: {bad} {reason} (kept as {name}); continuing from {path}")
    return Newest(folder, path)


def _put_aside(damaged: Path) -> Path:
    """Give a damaged checkpoint another name, so that the next save does not have to avoid the name it had."""
    aside = damaged.with_name(f"{damaged.name}.damaged")
    if aside.is_dir():  # A damaged folder was put aside before, and a rename cannot replace a folder with files.
        aside = next(free for i in count(2) if not (free := Path(f"{aside}-{i}")).exists())
    with suppress(FileNotFoundError):  # Another process of the same run may be faster.
        damaged.replace(aside)
    return aside


def check_can_be_read(path: str, *, training: bool, weights_only: bool | None = None) -> None:
    """Find out before anything is made whether there is a checkpoint to read.

    Args:
        path: The value of ``--ckpt_path``. What Lightning looks up elsewhere passes: a URL, ``registry:...``.
        training: Whether training is to continue from the checkpoint.
        weights_only: The value of ``--weights_only``. A file that may hold any objects (False) is not opened.

    Raises:
        DataError: If there is no such file or folder, or it is no checkpoint, or damaged.
    """
    if "://" in path or path.startswith("registry"):
        return
    given = Path(path)
    if not given.exists():
        reason = "does not exist"
    elif given.is_file() and given.stat().st_size and not lightning_file.is_one(given):
        reason = "is no checkpoint"
    else:
        reason = "" if weights_only is False else why_unreadable(given, training)
    if reason:
        raise DataError(
            f"--ckpt_path {path} {reason}; give the path of a checkpoint, or last for that of the newest run"
        )
