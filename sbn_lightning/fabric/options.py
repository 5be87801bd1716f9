"""Read a recipe's ``trainer:`` options for the Fabric loop. An option that changes training is never ignored."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy as FabricDDPStrategy
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn

from sbn_lightning.callbacks.lightning_internals import has_comm_hook, options_of_ddp, options_of_process_group
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed.fabric_strategy import FabricReplicatedStrategy, FabricShardedStrategy
from sbn_lightning.distributed.strategies import ReplicatedStrategy, ShardedStrategy
from sbn_lightning.fabric.run import FabricRun
from sbn_lightning.training.precision import SparseTernaryPrecision

# The keys of a recipe's ``trainer:``, grouped by what happens to them. Any other key must have its default value.
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
# These keys do nothing in a ``fit`` either. They belong to other commands, or to data that is not streamed.
NOT_OF_TRAINING = ("limit_test_batches", "limit_predict_batches", "inference_mode", "use_distributed_sampler")
ONLY_SHOWN = ("enable_model_summary", "model_registry")


def fabric_run(**config: Any) -> FabricRun:
    """Make a :class:`FabricRun` from the options of a Trainer.

    Args:
        **config: The options. Classes in them are instantiated already.

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
    fabric = Fabric(callbacks=callbacks, loggers=loggers or [], **{key: config[key] for key in FABRIC_TAKES})
    options = {key: config[key] for key in LOOP_TAKES}
    options |= {key: config[key] for key in LOOP_TAKES_UNLESS_NONE if config[key] is not None}
    return FabricRun(fabric, **options)


def check_fabric_options(config: dict[str, Any]) -> None:
    """Warn of options that the ``fabric`` command does not use, and replace a Trainer's strategy by Fabric's.

    Args:
        config: The options of a Trainer; changed in place.

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
    ours = {"sbn_ddp": ReplicatedStrategy, "sbn_fsdp2": ShardedStrategy}
    strategy = config["strategy"]
    if isinstance(strategy, str) and strategy in ours:
        strategy = ours[strategy]()
    if isinstance(strategy, ShardedStrategy):
        config["strategy"] = fabric_sharded(strategy)
    elif isinstance(strategy, ReplicatedStrategy) and not strategy.by_torch:
        config["strategy"] = FabricReplicatedStrategy(
            strategy.reduce_dtype, max_ctas=strategy.max_ctas, **options_of_process_group(strategy)
        )
    elif isinstance(strategy, DDPStrategy):
        if has_comm_hook(strategy):
            raise ConfigError(
                "the Fabric loop cannot honour ddp_comm_hook, nor reduce_dtype of sbn_ddp beside options of torch's "
                "DDP: leave them out, or use `fit`"
            )
        if isinstance(strategy, ReplicatedStrategy) and strategy.max_ctas is not None:
            raise ConfigError(
                "the Fabric loop cannot honour max_ctas of sbn_ddp beside options of torch's DDP; leave it out, or use "
                "`fit`"
            )
        config["strategy"] = FabricDDPStrategy(**options_of_process_group(strategy), **options_of_ddp(strategy))
    elif strategy not in ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"):
        name = type(strategy).__name__ if isinstance(strategy, Strategy) else strategy
        raise ConfigError(
            f"the Fabric loop cannot honour trainer.strategy={name}, only ddp, sbn_ddp and sbn_fsdp2; use `fit`"
        )
    plugins = config["plugins"] or []
    for plugin in plugins if isinstance(plugins, list) else [plugins]:
        if isinstance(plugin, Precision) and not isinstance(plugin, SparseTernaryPrecision):
            raise ConfigError(
                f"{type(plugin).__name__} in trainer.plugins works in a Trainer only: give its counterpart for "
                "Fabric, or trainer.precision"
            )


def fabric_sharded(strategy: ShardedStrategy) -> FabricShardedStrategy:
    """Make the strategy ``sbn_fsdp2`` of Fabric from that of a Trainer.

    Raises:
        ConfigError: If the strategy saves sharded checkpoints, which this loop does not write.
    """
    if strategy._save_distributed_checkpoint:
        raise ConfigError("the Fabric loop saves a checkpoint as one file: set save_distributed_checkpoint=false")
    return FabricShardedStrategy(
        **strategy.sharding, process_group_backend=strategy.process_group_backend, timeout=strategy._timeout
    )
