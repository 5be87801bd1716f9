"""LightningCLI over :class:`SparseBitNet` and :class:`TokenDataModule`.

Each of the project's callbacks is a group of its own in a recipe (``mask_refresh:``, ``ramp:`` and so on), not an entry
of ``trainer.callbacks``: recipes read flat, a misspelt key is one line of error, and two configuration files merge key
by key. ``trainer.callbacks`` is free for anybody else's.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import Namespace
from jsonargparse.typing import register_type
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy as FabricDDPStrategy
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn

from sbn_lightning.callbacks import (
    DenseToSparseRamp,
    MaskRefresh,
    SparsityPatternLogger,
    TokenThroughput,
    TrainingReport,
    WeightDecaySchedule,
)
from sbn_lightning.data import TokenDataModule
from sbn_lightning.errors import ConfigError
from sbn_lightning.fabric import FabricRun, train
from sbn_lightning.module import SparseBitNet
from sbn_lightning.parsing import OneLineErrors
from sbn_lightning.pattern import NMPattern

register_type(NMPattern, serializer=str, deserializer=NMPattern.parse)

CALLBACK_GROUPS: dict[str, type[Callback]] = {
    "mask_refresh": MaskRefresh,
    "ramp": DenseToSparseRamp,
    "weight_decay": WeightDecaySchedule,
    "sparsity_logger": SparsityPatternLogger,
    "throughput": TokenThroughput,
    "checkpoint": ModelCheckpoint,
}
NEEDS_MASKED_LAYERS = (MaskRefresh, DenseToSparseRamp, SparsityPatternLogger)


class TrainingParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with errors in one line."""


class SBNCLI(LightningCLI):
    """The commands ``fit``, ``validate``, ``test`` and ``predict``."""

    def __init__(self, args: list[str] | None, trainer_class: type[Trainer] = Trainer) -> None:
        super().__init__(
            SparseBitNet,
            TokenDataModule,
            args=args,
            trainer_class=trainer_class,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [TrainingReport()]},
            seed_everything_default=1,
            auto_configure_optimizers=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [])
        parser = TrainingParser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="a recipe: a YAML file; more of them are merged")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for group, callback in CALLBACK_GROUPS.items():
            parser.add_lightning_class_args(callback, group)

    def _parse_ckpt_path(self) -> None:
        """Does nothing: LightningCLI would let the checkpoint's hyperparameters override the command line."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.get("ckpt_path") == "last":
            resume_last_run(config)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Any:
        if self.model.config.linear == "dense":
            callbacks = [callback for callback in callbacks if not isinstance(callback, NEEDS_MASKED_LAYERS)]
        own = config["callbacks"] or []
        own = own if isinstance(own, list) else [own]
        if config["enable_progress_bar"] is not False and not any(isinstance(bar, ProgressBar) for bar in own):
            # TQDM's bar is one line, whether or not rich happens to be installed.
            callbacks = [*callbacks, TQDMProgressBar(refresh_rate=10)]
        return super()._instantiate_trainer(config, callbacks)


def resume_last_run(config: Namespace) -> None:
    """Makes ``--ckpt_path last`` continue the newest run of the same name, in its own folder.

    By itself Lightning would open a new version folder, find no checkpoint there, and start anew with a warning.

    Raises:
        ConfigError: If no run of that name has a last checkpoint.
    """
    logger = config.trainer.get("logger")
    if not isinstance(logger, Namespace) or "save_dir" not in logger.get("init_args", {}):
        raise ConfigError("--ckpt_path last needs a trainer.logger with a save_dir; give the checkpoint's path instead")
    folder = Path(logger.init_args.save_dir) / (logger.init_args.get("name") or "")
    found = sorted(folder.glob("version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(
            f"--ckpt_path last: no checkpoints/last.ckpt in {folder}/version_*; leave it out to start anew"
        )
    config.ckpt_path = str(found[-1])
    logger.init_args.version = found[-1].parent.parent.name


class FabricTrainer(Trainer):
    """Lends the ``fabric`` command the options of a Trainer; none is ever made."""

    def fabric(self, model: SparseBitNet, datamodule: TokenDataModule, ckpt_path: str | None = None) -> None:
        """Trains in the loop of ``sbn_lightning.fabric``.

        Args:
            model: What to train.
            datamodule: On what.
            ckpt_path: Checkpoint to continue from, of this command or of ``fit``; ``last`` is the newest run's.
        """
        raise NotImplementedError


# Keys of a recipe's ``trainer:`` by what the Fabric loop makes of them. Any other may only have its default value.
FABRIC_TAKES = ("accelerator", "strategy", "devices", "num_nodes", "precision", "plugins")
LOOP_TAKES = (
    "max_steps",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "limit_train_batches",
    "limit_val_batches",
    "check_val_every_n_epoch",
    "enable_autolog_hparams",
)
LOOP_TAKES_UNLESS_NONE = (
    "max_epochs",
    "gradient_clip_algorithm",
    "val_check_interval",
    "num_sanity_val_steps",
    "log_every_n_steps",
    "enable_progress_bar",
    "default_root_dir",
)
HERE = ("logger", "callbacks", "enable_checkpointing", "deterministic", "benchmark", "detect_anomaly")
# These do nothing in a ``fit`` either: they belong to other commands, or to data that is not streamed.
NOT_OF_TRAINING = ("limit_test_batches", "limit_predict_batches", "inference_mode", "use_distributed_sampler")
ONLY_SHOWN = ("enable_model_summary", "model_registry")


class FabricCLI(SBNCLI):
    """The command ``fabric``: a recipe's options, and the loop of :mod:`sbn_lightning.fabric` in place of a Trainer."""

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


def fabric_run(**config: Any) -> FabricRun:
    """Makes a :class:`FabricRun` from a Trainer's options.

    Raises:
        ConfigError: If an option that changes training cannot be honoured.
    """
    check_fabric_options(config)
    torch.autograd.set_detect_anomaly(config["detect_anomaly"])
    if config["deterministic"]:
        torch.use_deterministic_algorithms(True, warn_only=config["deterministic"] == "warn")
    if config["benchmark"] is not None:
        torch.backends.cudnn.benchmark = config["benchmark"]
    root, loggers = config["default_root_dir"] or ".", config["logger"]
    if loggers is None or loggers is True:
        loggers = TensorBoardLogger(root)
    callbacks = [callback for callback in config["callbacks"] if not isinstance(callback, ProgressBar)]
    if config["enable_checkpointing"] is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
    try:
        fabric = Fabric(callbacks=callbacks, loggers=loggers or [], **{key: config[key] for key in FABRIC_TAKES})
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"Fabric refuses an option of the trainer: {error}") from error
    options = {key: config[key] for key in LOOP_TAKES}
    options |= {key: config[key] for key in LOOP_TAKES_UNLESS_NONE if config[key] is not None}
    return FabricRun(fabric, **options)


def check_fabric_options(config: dict[str, Any]) -> None:
    """Warns of options that the ``fabric`` command does without, and brings a DDP strategy over to Fabric.

    Raises:
        ConfigError: If an option that changes training cannot be honoured.
    """
    known = {*FABRIC_TAKES, *LOOP_TAKES, *LOOP_TAKES_UNLESS_NONE, *HERE, *NOT_OF_TRAINING}
    for name, parameter in inspect.signature(Trainer.__init__).parameters.items():
        value = config.get(name, parameter.default)
        if name in known or value == parameter.default or value is False:
            continue
        if name not in ONLY_SHOWN:
            raise ConfigError(f"the Fabric loop cannot honour trainer.{name}={value!r}; leave it out, or use `fit`")
        rank_zero_warn(f"the Fabric loop does without trainer.{name}={value!r}")
    if not isinstance(config["val_check_interval"], (int, float, type(None))):
        raise ConfigError(
            f"the Fabric loop cannot honour trainer.val_check_interval={config['val_check_interval']!r}; give a number "
            "of batches, or a share of an epoch"
        )
    if config["max_steps"] < 0 and config["max_epochs"] is None:
        raise ConfigError("training would not end: set trainer.max_steps or trainer.max_epochs")
    strategy = config["strategy"]
    if isinstance(strategy, DDPStrategy):
        backend, timeout, start = strategy.process_group_backend, strategy._timeout, strategy._start_method
        options = {"process_group_backend": backend, "timeout": timeout, "start_method": start, **strategy._ddp_kwargs}
        config["strategy"] = FabricDDPStrategy(**options)
    elif strategy not in ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"):
        name = type(strategy).__name__ if isinstance(strategy, Strategy) else strategy
        raise ConfigError(f"the Fabric loop cannot honour trainer.strategy={name}, only ddp; use `fit`")
    plugins = config["plugins"] or []
    for plugin in plugins if isinstance(plugins, list) else [plugins]:
        if isinstance(plugin, Precision):
            raise ConfigError(
                f"{type(plugin).__name__} in trainer.plugins works in a Trainer only: give its counterpart for "
                "Fabric, or trainer.precision"
            )


def run(args: list[str]) -> SBNCLI:
    """Runs a training command; ``args`` starts with the command's name."""
    torch.set_float32_matmul_precision("high")
    # Lightning 2.6 with newer versions of torch; nothing a user can do about it.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    command = FabricCLI if args[0] == "fabric" else SBNCLI
    # LightningCLI warns of arguments given from within Python, also when they are the process's own.
    return command(None if args == sys.argv[1:] else args)
