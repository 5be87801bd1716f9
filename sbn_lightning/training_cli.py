"""LightningCLI over :class:`SparseBitNet` and :class:`TokenDataModule`.

Each of the project's callbacks is a group of its own in a recipe (``mask_refresh:``, ``ramp:`` and so on), not an entry
of ``trainer.callbacks``: recipes read flat, a misspelt key is one line of error, and two configuration files merge key
by key. ``trainer.callbacks`` is free for anybody else's.
"""

from __future__ import annotations

import errno
import inspect
import os
import re
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import Namespace
from jsonargparse.typing import register_type
from lightning.fabric import Fabric
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.strategies.ddp import DDPStrategy as FabricDDPStrategy
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sbn_lightning.callbacks import (
    DenseToSparseRamp,
    DurableCheckpoint,
    DurableCheckpointIO,
    MaskRefresh,
    NonFiniteGuard,
    SparsityPatternLogger,
    TokenThroughput,
    TrainingReport,
    WeightDecaySchedule,
)
from sbn_lightning.callbacks.checkpoint import SIGTERM_STATUS
from sbn_lightning.data import TokenDataModule, folders, shards
from sbn_lightning.errors import ConfigError, DataError, SBNError
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
    "non_finite_guard": NonFiniteGuard,
    "checkpoint": DurableCheckpoint,
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
            save_config_callback=SaveConfigWithoutSecrets,
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
            resume_last_run(config, training=self.subcommand in ("fit", "fabric"))

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SBNError:
            raise
        except Exception as error:
            explain(error, self.datamodule)
            raise

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Any:
        if self.model.config.linear == "dense":
            callbacks = [callback for callback in callbacks if not isinstance(callback, NEEDS_MASKED_LAYERS)]
        own = config["callbacks"] or []
        own = own if isinstance(own, list) else [own]
        plugins = config["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in (*plugins, _own_checkpoint_io(config["strategy"]))):
            config["plugins"] = [*plugins, DurableCheckpointIO()]
        if config["enable_progress_bar"] is not False and not any(isinstance(bar, ProgressBar) for bar in own):
            # TQDM's bar is one line, whether or not rich happens to be installed.
            callbacks = [*callbacks, TQDMProgressBar(refresh_rate=10)]
        return super()._instantiate_trainer(config, callbacks)


def _own_checkpoint_io(strategy: Any) -> Any:
    return getattr(strategy, "_checkpoint_io", None)


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
    candidates = sorted((path for path in found if path.parent == run), key=lambda p: (_is_last(p), _age(p)))[::-1]
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
            if bad.exists():
                bad.replace(kept)
        say(f"--ckpt_path last: {bad} {reason} (kept as {kept.name}); continuing from {path}")
    config.ckpt_path = str(path)
    if not fixed:
        logger.init_args.version = run.parent.name


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # put aside by another process of the same run
        return 0.0


def _is_last(path: Path) -> bool:
    return re.fullmatch(r"last(-v\d+)?", path.stem) is not None


def why_unreadable(path: Path) -> str:
    """What is wrong with a checkpoint; empty if nothing is.

    Checksums are compared up to ``shards.CHECKSUM_LIMIT`` bytes; above, what a file cut short shows.
    """
    if path.is_dir():  # sharded; its metadata are written last
        return "" if (path / ".metadata").is_file() else "is not complete"
    try:
        if not path.stat().st_size:
            return "is empty"
        with zipfile.ZipFile(path) as file:
            if path.stat().st_size <= shards.CHECKSUM_LIMIT and (record := file.testzip()):
                return f"is damaged (in {record})"
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can make torch raise anything
        return f"is damaged ({(str(error) or type(error).__name__).splitlines()[0].rstrip('.')})"
    return "" if isinstance(saved, dict) and "state_dict" in saved else "is no checkpoint"


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


@rank_zero_only
def say(text: str) -> None:
    """Prints a line, once."""
    print(text, flush=True)


SECRET_KEY = re.compile(r"(^|_)(api_?key|access_?key|private_?key|token|password|passwd|secret|credentials?)$", re.I)
SECRET_VARIABLE = re.compile(r"KEY|TOKEN|PASSW|SECRET|CREDENTIAL", re.I)
URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
URL_SECRET = re.compile(r"(?<=[?&])([^=&\s]*(?:key|token|passw|secret|sig|signature|credential)[^=&\s]*)=[^&\s]+", re.I)
HIDDEN = "***"


def without_secrets(value: Any, key: str = "", known: frozenset[str] | None = None) -> Any:
    """A copy of a configuration with ``***`` in the place of what must not be written down.

    That is: a user and password in a URL, what a URL's query calls a key, token or signature, every value whose key
    ends in ``token``, ``password``, ``api_key`` or the like, and the value of an environment variable of such a name.
    """
    if known is None:
        known = frozenset(v for k, v in os.environ.items() if SECRET_VARIABLE.search(k) and len(v) >= 8)
    if isinstance(value, Namespace):
        return Namespace(**{k: without_secrets(v, k, known) for k, v in vars(value).items()})
    if isinstance(value, dict):
        return {without_secrets(k, "", known): without_secrets(v, str(k), known) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(without_secrets(item, key, known) for item in value)
    if not isinstance(value, (str, os.PathLike)):
        return value
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    clean = HIDDEN if text and SECRET_KEY.search(key) else URL_SECRET.sub(rf"\1={HIDDEN}", URL_LOGIN.sub(HIDDEN, text))
    for secret in known:
        clean = clean.replace(secret, HIDDEN)
    return value if clean == text else clean


class SaveConfigWithoutSecrets(SaveConfigCallback):
    """Writes ``config.yaml`` next to the logs, without passwords and tokens."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *args: Any, **kwargs: Any) -> None:
        super().__init__(parser, without_secrets(config), *args, **kwargs)


class FabricTrainer(Trainer):
    """Lends the ``fabric`` command the options of a Trainer; none is ever made."""

    def fabric(self, model: SparseBitNet, datamodule: TokenDataModule, ckpt_path: str | None = None) -> None:
        """Trains in the loop of ``sbn_lightning.fabric``.

        Args:
            model: What to train.
            datamodule: On what.
            ckpt_path: Checkpoint to continue from, of this command or of ``fit``; ``last`` is the newest run's, if any.
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
    try:
        return command(None if args == sys.argv[1:] else args)
    except SIGTERMException as error:
        if error.code is None:  # raised by Lightning, which takes it for a success
            say("SIGTERM: stopped, nothing saved; --ckpt_path last continues from the last checkpoint, if there is one")
            error.code = SIGTERM_STATUS
        raise
