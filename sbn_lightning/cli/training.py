"""The commands that train: a LightningCLI over :class:`SparseBitNet` and :class:`TokenDataModule`.

Each callback of the project is a group of its own in a recipe (``mask_refresh:``, ``ramp:`` and so on), not an entry
of ``trainer.callbacks``. So recipes are flat, a misspelt key gives a one-line error, and two recipes merge key by key.
``trainer.callbacks`` is free for other people's callbacks. ``sbn_lightning.callbacks.RECIPE_GROUPS`` lists the groups.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]
from jsonargparse.typing import register_type
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import StrategyRegistry
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
from sbn_lightning.callbacks.rank_watch import RankWatch, because_of, cause_elsewhere
from sbn_lightning.checkpoints.io import say
from sbn_lightning.checkpoints.lock import RunIsBusy, RunLock
from sbn_lightning.checkpoints.resume import check_can_be_read
from sbn_lightning.cli import recipes, run_place
from sbn_lightning.cli.model_class import model_class
from sbn_lightning.cli.model_shape import find_states, take_shape
from sbn_lightning.cli.parsing import OneLineErrors, close_to, what_is_wrong
from sbn_lightning.cli.redaction import without_secrets
from sbn_lightning.core.errors import ConfigError, DataError, SBNError
from sbn_lightning.data import TokenDataModule, folders, shards
from sbn_lightning.distributed.meeting import meet_afresh
from sbn_lightning.distributed.strategies import check_checkpoint
from sbn_lightning.fabric.loop import FabricRun, train
from sbn_lightning.fabric.options import fabric_run
from sbn_lightning.sparsity.pattern import NMPattern
from sbn_lightning.training.module import SparseBitNet

register_type(NMPattern, serializer=str, deserializer=NMPattern.parse)

CALLBACK_GROUPS = RECIPE_GROUPS  # Version 0.1.0 exported the groups under this name.
NEEDS_MASKED_LAYERS = tuple(kind for kind in RECIPE_GROUPS.values() if getattr(kind, "needs_masked_layers", False))


def is_first_process() -> bool:
    """Whether this process has rank 0, also before a Trainer exists."""
    return getattr(rank_zero_only, "rank", 0) == 0


class TrainingParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser, which reports an error in one line."""


class RecipeFile(ActionConfigFile):
    """The option ``--config``. Its value is a YAML file, or the name of a recipe that comes with the package."""

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

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # It does not depend on an object there.
        """The command that is asked for. LightningCLI would make parsers for all four, which takes seconds."""
        known = LightningCLI.subcommands()
        asked = self.arguments[0] if isinstance(self.arguments, list) and self.arguments else None
        return {asked: known[asked]} if asked in known else known

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
        """Do nothing. LightningCLI's method would let the checkpoint's hyperparameters override the command line."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        training = self._trains()
        lock = self.lock if training and is_first_process() else None  # One process locks a run.
        run_place.expand_paths(config)
        if config.get("ckpt_path") in ("last", "hpc"):  # Lightning calls its Slurm checkpoint "hpc".
            run_place.continue_last(config, training=training, lock=lock)
        elif path := config.get("ckpt_path"):
            check_can_be_read(path, training=training, weights_only=config.get("weights_only"))
        elif training:
            run_place.continue_after_requeue(config, lock)
        if training:
            find_states(config)
        take_shape(config, self.arguments if isinstance(self.arguments, list) else [])

    def _trains(self) -> bool:
        return self.subcommand in ("fit", "fabric")

    def _take_run(self, config: dict[str, Any]) -> Path | None:
        """Lock the folder of checkpoints against other processes. Return the folder, or None if it is not known."""
        dirpath = self.config[self.subcommand].get("checkpoint.dirpath")
        while True:
            folder = run_place.folder_of_checkpoints(config, dirpath)
            if folder is None or not self._trains() or not is_first_process():
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
            if (told := what_is_wrong(str(error))) != str(error):  # Errors about other types were dropped.
                raise ConfigError(told) from error
            raise

    def _run_subcommand(self, subcommand: str) -> None:
        if self.config[subcommand].get("ckpt_path"):
            # The checkpoint's weights replace those of init_from, and the file of init_from may be gone.
            self.model.init_from = None
        if isinstance(self.trainer, Trainer):
            check_checkpoint(self.config[subcommand].get("ckpt_path"), self.trainer.strategy)
        meet_afresh()
        try:
            if isinstance(self.trainer, Trainer) and self.trainer.world_size == 1:
                self._check_data(subcommand)
            super()._run_subcommand(subcommand)
        except SBNError:
            raise
        except SystemExit as stopped:
            # Lightning ends the process with status 1 when Ctrl-C meets it outside of a training step.
            if isinstance(stopped.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from stopped
            raise
        except Exception as error:
            if (cause := cause_elsewhere(self.trainer.callbacks)) is not None:  # type: ignore[attr-defined]
                raise SBNError(because_of(cause)) from error
            explain(error, self.datamodule)
            raise

    def _check_data(self, stage: str) -> None:
        """Check the data before the Trainer starts, which opens its loggers first: a refused run leaves no folder.

        Several processes check the data when they have met. If one of them fails then, the others learn why.
        """
        self.datamodule.trainer = self.trainer
        self.datamodule.prepare_data()
        self.datamodule.setup(stage)
        self.model.check_data(self.datamodule, stage)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Any:
        check_strategy_name(config["strategy"])
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
            # Lightning's own choice of a bar depends on whether rich is installed. This bar is always one line.
            callbacks = [*callbacks, LossProgressBar()]
        recipe = without_secrets(self.config[self.subcommand])
        for watch in callbacks:
            if isinstance(watch, RankWatch):
                watch.recipe = {name: str(value) for name, value in recipe.items() if name != "config"}
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


def check_strategy_name(strategy: Any) -> None:
    """Refuse a name that no strategy has. Lightning's own message names none of this project's strategies.

    Args:
        strategy: The option ``trainer.strategy``: a name, or a strategy, which passes.

    Raises:
        ConfigError: If there is no strategy of this name.
    """
    known = ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(strategy, str) and strategy.lower() not in known:
        suggestion = close_to(strategy.lower(), known)
        ours = f"{' Ours' if suggestion else '; ours'} are {' and '.join(n for n in known if n.startswith('sbn_'))}"
        raise ConfigError(f"trainer.strategy={strategy} does not exist{suggestion}{ours}")


def why_refused(error: Exception, config: dict[str, Any]) -> str:
    """Say in one line why Lightning could not make a Trainer or a Fabric, and give a way out.

    Args:
        error: The exception that Lightning raised.
        config: The trainer's options.
    """
    words = " ".join(str(error).split()).rstrip("!.") or type(error).__name__
    if config["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        words += "; torch sees no GPU here: --trainer.accelerator cpu trains without"
    return words


def explain(error: Exception, data: TokenDataModule) -> None:
    """Raise a clearer error if the cause lies outside of the program: lost data, a full disk, or a SIGTERM.

    Any other error is left to the caller.

    Args:
        error: The exception that ended the run.
        data: The data of the run, whose shards are looked for.

    Raises:
        DataError: If a shard is gone, or a disk is full.
        SystemExit: If a SIGTERM to the whole process group stopped the data loader's workers first.
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
    """Write ``config.yaml`` next to the logs, without passwords and tokens."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *args: Any, **kwargs: Any) -> None:
        super().__init__(parser, without_secrets(config), *args, **kwargs)


class RecipeCheck(SBNCLI):
    """Check a recipe as ``fit`` does, without making the model, the data or the trainer.

    Other recipes can be read with the ``parser`` of the object afterwards.

    Args:
        recipe: The recipe, a mapping with the groups ``model``, ``data``, ``trainer`` and one for each callback.

    Raises:
        ConfigError: If ``fit`` does not have an option of the recipe, or a value has the wrong type.
    """

    def __init__(self, recipe: dict[str, Any]) -> None:
        with warnings.catch_warnings():  # LightningCLI warns when arguments come from Python.
            warnings.simplefilter("ignore")
            super().__init__(recipe, run=False)

    def _set_seed(self) -> None:
        """Do nothing: a check must not touch the random state."""

    def before_instantiate_classes(self) -> None:
        """Do nothing: no object is made."""

    def instantiate_classes(self) -> None:
        """Do nothing: no object is made."""


class FabricTrainer(Trainer):
    """Give the ``fabric`` command the options of a Trainer. No object of this class is ever made."""

    def fabric(self, model: SparseBitNet, datamodule: TokenDataModule, ckpt_path: str | None = None) -> None:
        """Train with the loop of ``sbn_lightning.fabric.loop``.

        Args:
            model: The module to train.
            datamodule: The data to train on.
            ckpt_path: The checkpoint to continue from. ``fabric`` and ``fit`` continue each other's checkpoints. The
                value ``last`` takes the newest checkpoint of the newest run, and starts a new run if there is none.
        """
        raise NotImplementedError


class FabricCLI(SBNCLI):
    """The command ``fabric``, which trains a recipe with the loop of :mod:`sbn_lightning.fabric.loop`."""

    def __init__(self, args: list[str] | None) -> None:
        super().__init__(args, FabricTrainer)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return {"fabric": {"model", "datamodule"}}

    def fabric(self, model: SparseBitNet, datamodule: TokenDataModule, ckpt_path: str | None = None) -> None:
        """Train ``model`` on ``datamodule``; see :meth:`FabricTrainer.fabric` for the arguments."""
        run = cast(FabricRun, self.trainer)
        if os.environ.get("LT_CLI_USED", "0") == "0":  # Otherwise `fabric run` has launched the processes.
            run.fabric.launch()
        train(run, model, datamodule, ckpt_path)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Any:
        self.trainer_class = cast(Any, fabric_run)  # LightningCLI calls it as the class.
        return super()._instantiate_trainer(config, callbacks)


def run(args: list[str]) -> SBNCLI:
    """Run a training command.

    Args:
        args: The words of the command line, starting with the command's name.

    Returns:
        The command line object, after the command has run.

    Raises:
        SBNError: If an option, a file or the data cannot be used.
        SIGTERMException: If a SIGTERM stopped the training. Its code becomes the exit status.
    """
    torch.set_float32_matmul_precision("high")
    # Lightning 2.6 calls a deprecated class of newer torch versions. A user cannot change that.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    command = FabricCLI if args[0] == "fabric" else SBNCLI
    # LightningCLI warns when it is given arguments. With None it reads the same arguments from sys.argv.
    try:
        return command(None if args == sys.argv[1:] else args)
    except SIGTERMException as error:
        if error.code is None:  # Lightning raised it without a status, and the process would end with status 0.
            say("SIGTERM: stopped, nothing saved; --ckpt_path last continues from the last checkpoint, if there is one")
            error.code = SIGTERM_STATUS
        raise
