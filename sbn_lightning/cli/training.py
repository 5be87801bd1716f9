"""LightningCLI over :class:`SparseBitNet` and :class:`TokenDataModule`.

Each callback of the project is a group of its own in a recipe (``mask_refresh:``, ``ramp:`` and so on), not an entry
of ``trainer.callbacks``. So recipes are flat, a misspelt key is one line of error, and two configuration files merge
key by key. ``trainer.callbacks`` is free for callbacks of other people. The groups are those of
``sbn_lightning.callbacks.RECIPE_GROUPS``.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import ActionConfigFile, Namespace
from jsonargparse.typing import register_type
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sbn_lightning.callbacks import (
    RECIPE_GROUPS,
    DurableCheckpointIO,
    LossProgressBar,
    TernarySparseConversion,
    TrainingReport,
)
from sbn_lightning.callbacks.durable_checkpoint import SIGTERM_STATUS
from sbn_lightning.callbacks.lightning_internals import (
    checkpoint_io_of,
    keep_slurm_checkpoints_with_their_run,
    take_next_version,
)
from sbn_lightning.checkpoints.io import say
from sbn_lightning.checkpoints.lock import RunIsBusy, RunLock
from sbn_lightning.checkpoints.resume import check_can_be_read
from sbn_lightning.cli import recipes, run_place
from sbn_lightning.cli.model_class import model_class
from sbn_lightning.cli.model_shape import take_shape
from sbn_lightning.cli.parsing import OneLineErrors, what_is_wrong
from sbn_lightning.cli.redaction import without_secrets
from sbn_lightning.core.errors import ConfigError, DataError, SBNError
from sbn_lightning.data import TokenDataModule, folders, shards
from sbn_lightning.distributed.strategies import check_checkpoint
from sbn_lightning.fabric.loop import FabricRun, train
from sbn_lightning.fabric.options import fabric_run
from sbn_lightning.sparsity.pattern import NMPattern
from sbn_lightning.training.module import SparseBitNet

register_type(NMPattern, serializer=str, deserializer=NMPattern.parse)

CALLBACK_GROUPS = RECIPE_GROUPS  # their name in version 0.1.0
NEEDS_MASKED_LAYERS = tuple(kind for kind in RECIPE_GROUPS.values() if getattr(kind, "needs_masked_layers", False))


class TrainingParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with errors in one line."""


class RecipeFile(ActionConfigFile):
    """``--config``: a YAML file, or the name of a recipe that comes with the package."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, cfg, recipes.find(values), option_string)


class SBNCLI(LightningCLI):
    """The commands ``fit``, ``validate``, ``test`` and ``predict``."""

    def __init__(
        self, args: list[str] | dict[str, Any] | None, trainer_class: type[Trainer] = Trainer, run: bool = True
    ) -> None:
        self.lock = RunLock()
        self.arguments = sys.argv[1:] if args is None else args
        try:
            super().__init__(
                model_class(self.arguments),
                TokenDataModule,
                args=args,
                trainer_class=trainer_class,
                save_config_callback=SaveConfigWithoutSecrets,
                save_config_kwargs={"overwrite": True},
                trainer_defaults={"callbacks": [TrainingReport()]},
                seed_everything_default=1,
                auto_configure_optimizers=False,
                run=run,
            )
        finally:  # LightningCLI runs the command in its constructor
            self.lock.release()

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [])
        parser = TrainingParser(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=RecipeFile,
            help="a recipe: a YAML file, or the name of a recipe that `sbn recipes` lists; several are merged",
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for group, callback in RECIPE_GROUPS.items():
            parser.add_lightning_class_args(callback, group)

    def _parse_ckpt_path(self) -> None:
        """Does nothing: LightningCLI would let the checkpoint's hyperparameters override the command line."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        training = self._trains()
        lock = self.lock if training and rank_zero_only.rank == 0 else None  # one process of a run takes it
        run_place.expand_paths(config)
        if config.get("ckpt_path") in ("last", "hpc"):  # hpc is Lightning's word for what its Slurm handler saved
            run_place.continue_last(config, training=training, lock=lock)
        elif path := config.get("ckpt_path"):
            check_can_be_read(path, training=training, weights_only=config.get("weights_only"))
        elif training:
            run_place.continue_after_requeue(config, lock)
        take_shape(config, self.arguments if isinstance(self.arguments, list) else [])

    def _trains(self) -> bool:
        return self.subcommand in ("fit", "fabric")

    def _take_run(self, config: dict[str, Any]) -> Path | None:
        """Makes sure that no other process writes to the folder of checkpoints; returns the folder if it is known."""
        dirpath = self.config[self.subcommand].get("checkpoint.dirpath")
        while True:
            folder = run_place.folder_of_checkpoints(config, dirpath)
            if folder is None or not self._trains() or rank_zero_only.rank != 0:
                return folder
            try:
                self.lock.acquire(folder)
                return folder
            except RunIsBusy:
                if dirpath is not None or not run_place.numbers_its_versions(self.config[self.subcommand]):
                    raise
                take_next_version(run_place.first_logger(config))

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            if (told := what_is_wrong(str(error))) != str(error):  # a class's own words, lost among other types
                raise ConfigError(told) from error
            raise

    def _run_subcommand(self, subcommand: str) -> None:
        if self.config[subcommand].get("ckpt_path"):
            self.model.init_from = None  # its weights would be overwritten, and the file may be gone
        if isinstance(self.trainer, Trainer):
            check_checkpoint(self.config[subcommand].get("ckpt_path"), self.trainer.strategy)
        try:
            super()._run_subcommand(subcommand)
        except SBNError:
            raise
        except SystemExit as stopped:
            # Lightning ends the process with status 1 when Ctrl-C meets it outside of a training step.
            if isinstance(stopped.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from stopped
            raise
        except Exception as error:
            explain(error, self.datamodule)
            raise

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Any:
        own = config["callbacks"] or []
        own = own if isinstance(own, list) else [own]
        if self.model.config.linear == "dense" and not any(isinstance(one, TernarySparseConversion) for one in own):
            callbacks = [one for one in callbacks if not getattr(one, "needs_masked_layers", False)]
        plugins = config["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        precision = next((plugin for plugin in plugins if isinstance(plugin, Precision)), None)
        if precision is not None and config["precision"] is not None:
            raise ConfigError(
                f"trainer.precision={config['precision']} and the plugin {type(precision).__name__} both set a "
                "precision: leave one out (on the command line: --trainer.precision null)"
            )
        if not any(isinstance(plugin, CheckpointIO) for plugin in (*plugins, checkpoint_io_of(config["strategy"]))):
            config["plugins"] = [*plugins, DurableCheckpointIO()]
        if config["enable_progress_bar"] is not False and not any(isinstance(bar, ProgressBar) for bar in own):
            # One line, whether or not rich happens to be installed.
            callbacks = [*callbacks, LossProgressBar()]
        folder = self._take_run(config)
        try:
            trainer = super()._instantiate_trainer(config, callbacks)
            if isinstance(trainer, Trainer):
                keep_slurm_checkpoints_with_their_run(trainer, folder)
            return trainer
        except SBNError:
            raise
        except (ImportError, MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"the trainer's options do not work here: {why_refused(error, config)}") from error


def why_refused(error: Exception, config: dict[str, Any]) -> str:
    """Lightning's words on a Trainer, or a Fabric, that it does not make, in one line with a way out.

    Args:
        error: As raised.
        config: The trainer's options.
    """
    words = " ".join(str(error).split()).rstrip("!.") or type(error).__name__
    if config["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        words += "; torch sees no GPU here: --trainer.accelerator cpu trains without"
    return words


def explain(error: Exception, data: TokenDataModule) -> None:
    """Raises the error in words of its own if it is one that a run meets from outside.

    Raises:
        DataError: If a shard is gone, or a disk is full.
        SystemExit: If a SIGTERM to the whole group of processes stopped the data's workers first.
    """
    for source, meta in (data._metas or {}).items():
        if not folders.is_remote(source):
            try:
                shards.verify(Path(source), meta, checksum=False)
            except DataError as gone:
                raise gone from error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise DataError(f"the disk is full: {error}; make room and continue with --ckpt_path last") from error
    chain: list[BaseException] = [error]
    while before := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(before)
    if any("killed by signal: Terminated" in str(link) for link in chain):
        say("SIGTERM: stopped inside a step; --ckpt_path last continues from the last checkpoint")
        raise SystemExit(SIGTERM_STATUS) from error


class SaveConfigWithoutSecrets(SaveConfigCallback):
    """Writes ``config.yaml`` next to the logs, without passwords and tokens."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *args: Any, **kwargs: Any) -> None:
        super().__init__(parser, without_secrets(config), *args, **kwargs)


class RecipeCheck(SBNCLI):
    """Reads a recipe of model, data, trainer and callbacks, and makes nothing of it; its ``parser`` then reads others.

    Raises:
        ConfigError: If ``fit`` would not know an option, or its value is of another type.
    """

    def __init__(self, recipe: dict[str, Any]) -> None:
        with warnings.catch_warnings():  # of arguments that are not the process's own
            warnings.simplefilter("ignore")
            super().__init__(recipe, run=False)

    def _set_seed(self) -> None:
        """Not before training."""

    def before_instantiate_classes(self) -> None:
        """Nothing is made."""

    def instantiate_classes(self) -> None:
        """Nothing is made."""


class FabricTrainer(Trainer):
    """Lends the ``fabric`` command the options of a Trainer; none is ever made."""

    def fabric(self, model: SparseBitNet, datamodule: TokenDataModule, ckpt_path: str | None = None) -> None:
        """Trains in the loop of ``sbn_lightning.fabric.loop``.

        Args:
            model: What to train.
            datamodule: On what.
            ckpt_path: Checkpoint to continue from, of this command or of ``fit``; ``last`` is the newest run's, if any.
        """
        raise NotImplementedError


class FabricCLI(SBNCLI):
    """The command ``fabric``: a recipe's options, and the loop of :mod:`sbn_lightning.fabric.loop` in place of a Trainer."""

    def __init__(self, args: list[str] | None) -> None:
        super().__init__(args, FabricTrainer)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fabric": {"model", "datamodule"}}

    def fabric(self, model: SparseBitNet, datamodule: TokenDataModule, ckpt_path: str | None = None) -> None:
        """Runs the command."""
        run = cast(FabricRun, self.trainer)
        if os.environ.get("LT_CLI_USED", "0") == "0":  # else `fabric run` has launched the processes
            run.fabric.launch()
        train(run, model, datamodule, ckpt_path)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Any:
        self.trainer_class = cast(Any, fabric_run)  # from here on it only makes what is called the trainer
        return super()._instantiate_trainer(config, callbacks)


def run(args: list[str]) -> SBNCLI:
    """Runs a training command; ``args`` starts with the command's name."""
    torch.set_float32_matmul_precision("high")
    # Lightning 2.6 with newer versions of torch; nothing a user can do about it.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    command = FabricCLI if args[0] == "fabric" else SBNCLI
    # LightningCLI warns of arguments given from within Python, also when they are the process's own.
    try:
        return command(None if args == sys.argv[1:] else args)
    except SIGTERMException as error:
        if error.code is None:  # raised by Lightning, which takes it for a success
            say("SIGTERM: stopped, nothing saved; --ckpt_path last continues from the last checkpoint, if there is one")
            error.code = SIGTERM_STATUS
        raise
