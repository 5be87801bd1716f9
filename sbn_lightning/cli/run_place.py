"""Find the place where a training command keeps its run, from the options of the command.

``~`` and ``$VARIABLE`` in a recipe's paths are expanded here, once, before anything is made. Lightning expands them for
event files and not for checkpoints, which would then lie in a folder named ``~``.
"""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from pydoc import locate
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from sbn_lightning.checkpoints.io import say
from sbn_lightning.checkpoints.lock import RunLock
from sbn_lightning.checkpoints.resume import newest_state
from sbn_lightning.checkpoints.search import FOLDER, Place
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.core.files import expanded

# The options whose values are paths, first those of the command and then those of a logger.
PATHS = (
    "ckpt_path",
    "checkpoint.dirpath",
    "data.path",
    "data.cache_dir",
    "model.init_from",
    "model.source",
    "trainer.default_root_dir",
)
LOGGER_PATHS = ("save_dir", "name", "version", "sub_dir")
LOGGER = "lightning.pytorch.loggers.TensorBoardLogger"  # A Trainer without a logger makes this one.


def expand_paths(config: Namespace) -> None:
    """Replace ``~`` and ``$VARIABLE`` in the paths of a command's options."""
    for option in PATHS:
        if isinstance(value := config.get(option), str):
            config[option] = expanded(value)
    if isinstance(mixture := config.get("data.paths"), dict):
        config["data.paths"] = {expanded(path): weight for path, weight in mixture.items()}
    for logger in _loggers(config):
        for option in LOGGER_PATHS:
            if isinstance(value := logger.init_args.get(option), str):
                logger.init_args[option] = expanded(value)


def resume_last_run(config: Namespace, training: bool = True) -> None:
    """The name of :func:`continue_last` in version 0.1.0, which took no lock."""
    expand_paths(config)
    continue_last(config, training=training, lock=None)


def continue_last(config: Namespace, *, training: bool, lock: RunLock | None) -> None:
    """Make ``--ckpt_path last`` continue the newest state of the run that the command names, in the run's own folder.

    By itself Lightning would open a new version folder, find no checkpoint there, and start anew with a warning.

    Args:
        config: The options of the command, with paths expanded; changed in place.
        training: Whether the command trains.
        lock: The lock to take for this process. None takes no lock: another process of the same run takes it.

    Raises:
        ConfigError: If the place of the checkpoints is not known, if there is no checkpoint and the command does not
            train, or if another process writes the run.
        DataError: If there are checkpoints and none of them can be read.
    """
    found = newest_state(place_of(config), say, training=training, lock=lock)
    config.ckpt_path = None if found is None else str(found.path)
    if found is not None and not config.get("checkpoint.dirpath"):
        _continue_in(config, found.folder)


def continue_after_requeue(config: Namespace, lock: RunLock | None) -> None:
    """Continue a job that Slurm has requeued, but only from a checkpoint of the job's own run.

    Without ``--ckpt_path`` Lightning takes the ``hpc_ckpt_N.ckpt`` with the highest number in the current folder,
    whichever run wrote it.
    """
    if not SLURMEnvironment.detect():
        return
    place = place_of(config)
    if not any(path.match("hpc_ckpt_*.ckpt") for files in place.runs().values() for path in files):
        for one in place.passed_over():
            if "hpc_ckpt_" in one:
                say(f"Slurm: training starts anew; passed over {one}")
    elif int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        say("Slurm has requeued this job: it goes on from the newest state of its run, as with --ckpt_path last")
        continue_last(config, training=True, lock=lock)
    else:
        say(f"Slurm: training starts anew; --ckpt_path last would continue the run in {place}")


def place_of(config: Namespace) -> Place:
    """Where the runs of a command keep their checkpoints.

    Raises:
        ConfigError: If the place does not follow from the options.
    """
    root = Path(config.trainer.get("default_root_dir") or ".")
    fixed = config.get("checkpoint.dirpath")
    if fixed:
        return Place(_root_of(config), fixed=Path(_local(fixed)), slurm=root)
    if config.trainer.get("logger") is False:
        return Place(None, fixed=root / FOLDER, slurm=root)
    folder = _root_of(config)
    if folder is None:
        raise ConfigError(
            "--ckpt_path last does not know where this logger keeps its runs: give the checkpoint's path instead, or "
            "set checkpoint.dirpath"
        )
    loggers = _loggers(config)
    version = loggers[0].init_args.get("version") if loggers else None
    if version is not None and not isinstance(version, str):
        version = f"version_{version}"  # Lightning names the folder like this.
    return Place(folder, version, slurm=root, formerly=_unexpanded(config))


def _root_of(config: Namespace) -> Path | None:
    """The folder of all versions of the run, ``save_dir/name``; None if the logger is not one that is known here."""
    root = config.trainer.get("default_root_dir") or "."
    if config.trainer.get("logger") in (None, True):
        return Path(root, "lightning_logs")
    loggers = _loggers(config)
    kind = locate(loggers[0].class_path) if loggers else None
    if not isinstance(kind, type) or not issubclass(kind, (TensorBoardLogger, CSVLogger)):
        return None
    name = loggers[0].init_args.get("name")
    return Path(_local(str(loggers[0].init_args.save_dir)), "" if name is None else str(name))


def _unexpanded(config: Namespace) -> Path | None:
    """Return the folder in which version 0.1.0 kept checkpoints, which did not expand a ``~`` in ``save_dir``."""
    folder = _root_of(config)
    home = Path.home()
    if folder is None or not folder.is_relative_to(home):
        return None
    return Path("~") / folder.relative_to(home)


def _local(path: str) -> str:
    if "://" in path:
        raise ConfigError(f"--ckpt_path last looks only in local folders, not in {path}: give the checkpoint's path")
    return path


def _loggers(config: Namespace) -> list[Namespace]:
    given = config.trainer.get("logger")
    given = given if isinstance(given, list) else [given]
    return [logger for logger in given if isinstance(logger, Namespace) and "init_args" in logger]


def _continue_in(config: Namespace, folder: Path) -> None:
    """Make the logger write to the folder of the run that is continued."""
    version = folder.parent.name
    loggers = _loggers(config)
    if not loggers and config.trainer.get("logger") in (None, True):
        # The path must be the one that the Trainer took, because ModelCheckpoint forgets its files if the path changes.
        init_args = Namespace(save_dir=config.trainer.get("default_root_dir") or os.getcwd(), name="lightning_logs")
        config.trainer.logger = Namespace(class_path=LOGGER, init_args=init_args)
        loggers = [config.trainer.logger]
    for logger in loggers:
        if "version" in logger.init_args or logger is loggers[0]:
            logger.init_args.version = version
            _keep_metrics(logger)


@rank_zero_only
def _keep_metrics(logger: Namespace) -> None:
    """Give the ``metrics.csv`` of the run so far another name, because a new ``CSVLogger`` would delete the file."""
    kind = locate(logger.class_path)
    if not isinstance(kind, type) or not issubclass(kind, CSVLogger):
        return
    options = logger.init_args
    file = Path(str(options.save_dir), str(options.get("name") or ""), options.version, "metrics.csv")
    if file.is_file():
        kept = next(free for i in count(1) if not (free := file.with_name(f"metrics.{i}.csv")).exists())
        file.rename(kept)
        say(f"the metrics so far are kept as {kept}; the run goes on in a new {file.name}")


def folder_of_checkpoints(trainer_options: dict[str, Any], dirpath: str | None) -> Path | None:
    """Return the folder that a run saves to; None if the folder is not known yet or not on this machine.

    Args:
        trainer_options: The options of the Trainer, with instantiated loggers.
        dirpath: The folder that the checkpoint callback was given, or None.
    """
    if dirpath is not None:
        return None if "://" in dirpath else Path(dirpath)
    logger = first_logger(trainer_options)
    if logger is None or "://" in str(logger.save_dir):
        return None
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(str(logger.save_dir), logger.name, version, FOLDER)


def first_logger(trainer_options: dict[str, Any]) -> TensorBoardLogger | CSVLogger | None:
    """The logger whose folder the checkpoints go to; None if that is not a folder on this machine."""
    given = trainer_options.get("logger")
    first = given[0] if isinstance(given, list) and given else given
    return first if isinstance(first, (TensorBoardLogger, CSVLogger)) else None


def numbers_its_versions(config: Namespace) -> bool:
    """Whether the logger chooses the next free version by itself."""
    loggers = _loggers(config)
    return not loggers or loggers[0].init_args.get("version") is None
