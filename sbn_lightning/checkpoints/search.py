"""Find the checkpoints of a run, and the newest state among them. One search serves every command.

A run keeps its checkpoints in one folder: ``SAVE_DIR/NAME/VERSION/checkpoints``, as Lightning's loggers name it, or the
folder that ``checkpoint.dirpath`` gives. Files may lie in sub-folders of that folder, because a metric such as
``val/loss`` in a file name has a slash. :class:`Place` says where the runs of one command are, and :func:`locate`
turns the path that a user gave (``logs``, ``logs/NAME``, one version, one folder, one file) into one checkpoint.

Lightning's Slurm handler saves ``hpc_ckpt_N.ckpt`` in the current folder, outside of the run's folder. Several runs may
save there. The state of ``ModelCheckpoint`` in such a file names the folder of the run that wrote the file. So the file
counts as a state of this run only.

The newest state is the file that was written last. Copying a folder can shuffle the times of its files. So a
``last.ckpt`` with more training steps than the youngest file counts as newer than that file.

This module imports torch, and not Lightning: commands that only read a model use it too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sbn_lightning.checkpoints import lightning_file, sharded
from sbn_lightning.core.errors import DataError

FOLDER = "checkpoints"  # Lightning's name for the folder of a run's checkpoints
SLURM = "hpc_ckpt_*.ckpt"  # Lightning's name for what its Slurm handler saves


@dataclass(frozen=True)
class Place:
    """Where the runs of one command keep their checkpoints.

    Attributes:
        root: The folder that holds one folder for each version of the run; None where checkpoints go to ``fixed``.
        version: The name of the version's folder that the command gives; None means the newest version.
        fixed: The folder that ``checkpoint.dirpath`` gives, or None.
        slurm: The folder in which Lightning's Slurm handler saves.
        formerly: A folder that an earlier release wrote to for the same options, or None.
    """

    root: Path | None
    version: str | None = None
    fixed: Path | None = None
    slurm: Path = Path()
    formerly: Path | None = None

    def __str__(self) -> str:
        return str(self.fixed or f"{self.root}/{self.version or '*'}/{FOLDER}")

    def runs(self) -> dict[Path, list[Path]]:
        """The checkpoints of each run of the command, by the folder that the run saves to. No list is empty."""
        if self.fixed is not None:
            folders = [self.fixed]
        elif self.root is None:
            folders = []
        elif self.version is not None:
            folders = [self.root / self.version / FOLDER]
        else:
            folders = sorted(self.root.glob(f"*/{FOLDER}"))
        found = {folder: checkpoints_in(folder) for folder in folders}
        for file in self.slurm.glob(SLURM):
            if (folder := self._own(file)) is not None:
                found.setdefault(folder, []).append(file)
        return {folder: files for folder, files in found.items() if files}

    def _own(self, file: Path) -> Path | None:
        """The folder of the run that wrote a Slurm checkpoint, if that is a run of this command."""
        for folder in folders_of_the_writer(file):
            if self.fixed is not None and _same(folder, self.fixed):
                return self.fixed
            version = folder.parent.name
            if self.fixed is None and self.root is not None and _same(folder, self.root / version / FOLDER):
                return self.root / version / FOLDER if self.version in (None, version) else None
        return None

    def passed_over(self) -> list[str]:
        """Files and folders that look like a state of the run and are not used, each with the reason."""
        told = []
        for folder in (self.root, self.formerly):
            if folder is not None:
                others = Place(folder).runs()
                told += [f"{other} (another folder than {self})" for other in others if other not in self.runs()]
        for folder in self._folders():
            told += [f"{file} (put aside as damaged)" for file in sorted(folder.rglob("*.damaged*"))]
            told += [f"{file} (only half written)" for file in sorted(folder.rglob("*.ckpt.*tmp"))]
        for file in sorted(self.slurm.glob(SLURM)):
            if self._own(file) is None:
                writers = ", ".join(map(str, folders_of_the_writer(file)))
                told.append(f"{file} (of {f'the run that saves to {writers}' if writers else 'an unknown run'})")
        return told

    def _folders(self) -> list[Path]:
        if self.fixed is not None:
            return [self.fixed]
        return sorted(self.root.glob(f"{self.version or '*'}/{FOLDER}")) if self.root is not None else []


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in one run's folder and its sub-folders; a sharded one is a folder of its own."""
    return [
        path
        for path in folder.rglob("*.ckpt")
        if path.exists() and not any(parent.suffix == ".ckpt" for parent in path.relative_to(folder).parents)
    ]


def newest_run(runs: dict[Path, list[Path]]) -> Path:
    """The folder of the run that wrote a checkpoint last."""
    return max(runs, key=lambda folder: max(map(written, runs[folder])))


def newest_first(checkpoints: Iterable[Path]) -> list[Path]:
    """The checkpoints of one run, the newest state first."""
    order = sorted(checkpoints, key=lambda path: (written(path), is_meant_to_continue(path), str(path)), reverse=True)
    meant = next((path for path in order if is_meant_to_continue(path)), None)
    if meant is not None and meant != order[0]:
        youngest, last = steps_done(order[0]), steps_done(meant)
        if youngest is None or last is None or youngest <= last:
            order.remove(meant)
            order.insert(0, meant)
    return order


def is_meant_to_continue(path: Path) -> bool:
    """Whether a checkpoint has a name that Lightning gives to what a run continues from."""
    return lightning_file.is_last(path) or path.match(SLURM)


def written(path: Path) -> float:
    """When a checkpoint was written, in seconds since 1970; 0 if another process of the run has put it aside."""
    rest = path / sharded.REST  # A folder's own time does not tell when its files were written.
    try:
        return (rest if rest.is_file() else path).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def steps_done(path: Path) -> int | None:
    """The number of optimiser steps in a checkpoint; None if it cannot be read."""
    steps = _contents(path).get("global_step")
    return steps if isinstance(steps, int) else None


def folders_of_the_writer(path: Path) -> list[Path]:
    """The folders that the ``ModelCheckpoint`` callbacks of the run that wrote ``path`` save to."""
    states = _contents(path).get("callbacks")
    folders = [state.get("dirpath") for state in states.values() if isinstance(state, dict)] if states else []
    return [Path(folder) for folder in folders if isinstance(folder, str)]


def _contents(path: Path) -> dict[str, Any]:
    try:
        file = path / sharded.REST if path.is_dir() else path
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # A damaged file can make torch raise anything. The reader of the file reports the error.
        return {}
    return saved if isinstance(saved, dict) else {}


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def why_unreadable(path: Path, training: bool = False) -> str:
    """What is wrong with a checkpoint; empty if nothing is.

    Checksums are compared in files of up to ``CHECKSUM_LIMIT`` bytes. A larger file is only found to be damaged if its
    end is missing.

    Args:
        path: The checkpoint.
        training: Whether training is to continue from the checkpoint, which needs more than weights.
    """
    try:
        if path.is_dir():
            if other := _other_folder(path):
                return other
            if missing := sharded.what_is_missing(path):
                return f"is not complete (it has no {missing})"
            torch.load(path / sharded.REST, map_location="cpu", weights_only=True)  # This file is written last.
            return ""
        if not path.stat().st_size:
            return "is empty"
        if record := lightning_file.damaged_record(path):
            return f"is damaged (in {record})"
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # A damaged file can make torch raise anything.
        return f"is damaged ({(str(error) or type(error).__name__).splitlines()[0].rstrip('.')})"
    if not isinstance(saved, dict) or not {"state_dict", "pytorch-lightning_version"} <= set(saved):
        return "is no checkpoint of Lightning"
    if training and "optimizer_states" not in saved:
        return "holds weights and no training to continue (model.init_from starts from weights)"
    return ""


def is_half_written(path: Path) -> bool:
    """Whether a checkpoint is a folder of shards that was never complete: its last file is not there."""
    return path.is_dir() and not _other_folder(path) and sharded.what_is_missing(path) != ""


def _other_folder(path: Path) -> str:
    """What a folder is that is no sharded checkpoint; empty if it may be one."""
    if (path / "config.json").is_file():
        return "is a model to run and no training to continue (model.init_from starts from a .ckpt)"
    if found := newest_first(checkpoints_in(path)):
        return f"is a folder of checkpoints, such as {found[0]}"
    return ""


def _on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def locate(path: str | Path, tell: Callable[[str], None] = _on_stderr) -> Path:
    """Return the checkpoint that a user means by a path.

    Args:
        path: A file or a folder. A file is taken as it is. A folder may be a sharded checkpoint, a folder of
            checkpoints, the folder of one version of a run, the folder of all versions, or the ``save_dir`` above them.
            In a folder, the newest state of the newest run is taken, unless it cannot be read.
        tell: A function that prints a line. It gets a line for each damaged checkpoint that is passed over.

    Returns:
        A file, or the folder of a sharded checkpoint. If every checkpoint is damaged, one of them is returned, and its
        reader says what is wrong.

    Raises:
        DataError: If the folder holds no checkpoint, or runs of several names.
    """
    given = Path(path)
    if not given.is_dir() or any((given / name).is_file() for name in (sharded.SHARDS, sharded.REST)):
        return given
    if (found := newest_below(given, tell)) is None:
        raise DataError(f"{given} holds no checkpoint; give {lightning_file.ACCEPTED}")
    return found


def newest_below(folder: Path, tell: Callable[[str], None] = _on_stderr) -> Path | None:
    """Return the newest state of the newest run in a folder; None if the folder holds no checkpoint.

    Args:
        folder: A folder that is no sharded checkpoint itself; see :func:`locate`.
        tell: A function that prints a line. It gets a line for each damaged checkpoint that is passed over.

    Raises:
        DataError: If the folder holds runs of several names.
    """
    if not (found := _runs_below(folder)):
        return None
    order = newest_first(found[newest_run(found)])
    for file in order:
        reason = why_unreadable(file)
        if not reason:
            return file
        tell(f"{file} {reason}; looking for an older state of the run")
    return order[0]


def _runs_below(folder: Path) -> dict[Path, list[Path]]:
    """Checkpoints by the run's folder, at the first level below ``folder`` that has any."""
    if folder.name == FOLDER or any(folder.glob("*.ckpt")):
        return Place(None, fixed=folder).runs()
    if (folder / FOLDER).is_dir():
        return Place(folder.parent, version=folder.name).runs()
    if runs := Place(folder).runs():
        return runs
    runs = {}
    for name in sorted(path for path in folder.glob("*") if path.is_dir()):
        runs |= Place(name).runs()
    if len(names := sorted({str(run.parent.parent) for run in runs})) > 1:
        raise DataError(f"{folder} holds several runs: give one of {', '.join(names)}")
    if runs:
        return runs
    inside = checkpoints_in(folder)  # This is one run, and all its checkpoints are in sub-folders.
    return {folder: inside} if inside else {}
