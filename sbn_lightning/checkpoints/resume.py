"""``--ckpt_path``: whether it is there; ``last`` is the newest run of the same name, and of it what can be read."""

from __future__ import annotations

from contextlib import suppress
from itertools import count
from pathlib import Path

import torch
from jsonargparse import Namespace

from sbn_lightning.checkpoints import lightning_file, sharded
from sbn_lightning.checkpoints.io import say
from sbn_lightning.core.errors import ConfigError, DataError


def resume_last_run(config: Namespace, training: bool = True) -> None:
    """Makes ``--ckpt_path last`` continue the newest run of the same name, in its own folder.

    By itself Lightning would open a new version folder, find no checkpoint there, and start anew with a warning.
    Without any checkpoint, training starts anew and says so: a job that is stopped before its first checkpoint is
    started again by the same command. A ``last.ckpt`` that cannot be read is put aside, and the newest checkpoint of
    the run that can be read takes its place.

    Raises:
        ConfigError: If the place of the checkpoints is not known, or there is none and the command does not train.
        DataError: If there are checkpoints and none of them can be read.
    """
    logger = config.trainer.get("logger")
    if not isinstance(logger, Namespace) or "save_dir" not in logger.get("init_args", {}):
        raise ConfigError("--ckpt_path last needs a trainer.logger with a save_dir; give the checkpoint's path instead")
    folder = Path(logger.init_args.save_dir) / (logger.init_args.get("name") or "")
    # `validate` and the like have no checkpoint group.
    fixed = config.get("checkpoint.dirpath")
    pattern = f"{fixed}/*.ckpt" if fixed else f"{folder}/version_*/checkpoints/*.ckpt"
    found = sorted(Path(fixed).glob("*.ckpt") if fixed else folder.glob("version_*/checkpoints/*.ckpt"), key=_age)
    if not found:
        if not training:
            raise ConfigError(f"--ckpt_path last: no checkpoint in {pattern}")
        config.ckpt_path = None
        say(f"--ckpt_path last: no checkpoint in {pattern} yet, training starts anew")
        return
    run = found[-1].parent
    # What was meant to be last comes first; then the newest.
    candidates = sorted(
        (path for path in found if path.parent == run), key=lambda p: (lightning_file.is_last(p), _age(p))
    )[::-1]
    damage: dict[Path, str] = {}
    for path in candidates:
        if reason := why_unreadable(path):
            damage[path] = reason
            continue
        break
    else:
        reasons = "; ".join(f"{path} {reason}" for path, reason in damage.items())
        raise DataError(f"--ckpt_path last: no checkpoint of the run can be read: {reasons}; delete them to start anew")
    for bad, reason in damage.items():
        kept = bad
        if training:
            # Out of the way of the next save, which would avoid its name.
            kept = bad.with_name(f"{bad.name}.damaged")
            if kept.is_dir():  # of before; a folder cannot take its place
                kept = next(free for i in count(2) if not (free := Path(f"{kept}-{i}")).exists())
            with suppress(FileNotFoundError):  # another process of the run may be faster
                bad.replace(kept)
        say(f"--ckpt_path last: {bad} {reason} (kept as {kept.name}); continuing from {path}")
    config.ckpt_path = str(path)
    if not fixed:
        logger.init_args.version = run.parent.name


def check_can_be_read(path: str, *, training: bool, weights_only: bool | None = None) -> None:
    """Finds out before anything is made whether there is a checkpoint to read.

    Args:
        path: As given for ``--ckpt_path``. What Lightning looks up elsewhere passes: a URL, ``registry:...``, ``hpc``.
        training: Whether training is to continue from it.
        weights_only: As given for ``--weights_only``; a file that may hold any objects (False) is not opened.

    Raises:
        DataError: If there is no such file or folder, or it is no checkpoint, or damaged.
    """
    elsewhere = "://" in path or path.startswith("registry") or path == "hpc"
    if elsewhere:
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


def _age(path: Path) -> float:
    rest = path / sharded.REST  # a folder's own time does not tell when its files were written
    try:
        return (rest if rest.is_file() else path).stat().st_mtime
    except FileNotFoundError:  # put aside by another process of the same run
        return 0.0


def why_unreadable(path: Path, training: bool = False) -> str:
    """What is wrong with a checkpoint, also for going on with ``training``; empty if nothing is.

    Checksums are compared up to ``CHECKSUM_LIMIT`` bytes; above, what a file cut short shows.
    """
    try:
        if path.is_dir():
            if (path / "config.json").is_file():
                return "is a model to run and no training to continue (model.init_from starts from a .ckpt)"
            if found := [file for file in path.glob("**/last*.ckpt") if lightning_file.is_last(file)]:
                return f"is a folder of checkpoints, such as {found[0]}"
            if missing := sharded.what_is_missing(path):
                return f"is not complete (it has no {missing})"
            torch.load(path / sharded.REST, map_location="cpu", weights_only=True)  # written last
            return ""
        if not path.stat().st_size:
            return "is empty"
        if record := lightning_file.damaged_record(path):
            return f"is damaged (in {record})"
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can make torch raise anything
        return f"is damaged ({(str(error) or type(error).__name__).splitlines()[0].rstrip('.')})"
    if not isinstance(saved, dict) or not {"state_dict", "pytorch-lightning_version"} <= set(saved):
        return "is no checkpoint of Lightning"
    if training and "optimizer_states" not in saved:
        return "holds weights and no training to continue (model.init_from starts from weights)"
    return ""
