"""LightningCLI over :class:`SparseBitNet` and :class:`TokenDataModule`.

Each of the project's callbacks is a group of its own in a recipe (``mask_refresh:``, ``ramp:`` and so on), not an entry
of ``trainer.callbacks``: recipes read flat, a misspelt key is one line of error, and two configuration files merge key
by key. ``trainer.callbacks`` is free for anybody else's.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from jsonargparse.typing import register_type
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

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

    def __init__(self, args: list[str] | None) -> None:
        super().__init__(
            SparseBitNet,
            TokenDataModule,
            args=args,
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


def run(args: list[str]) -> SBNCLI:
    """Runs a training command; ``args`` starts with the command's name."""
    torch.set_float32_matmul_precision("high")
    # Lightning 2.6 with newer versions of torch; nothing a user can do about it.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    # LightningCLI warns of arguments given from within Python, also when they are the process's own.
    return SBNCLI(None if args == sys.argv[1:] else args)
