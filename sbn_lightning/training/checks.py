"""What :class:`~sbn_lightning.training.module.SparseBitNet` checks before a run, against its data and its trainer.

Each check raises one line that names the option and the way out, before the first batch is computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.strategies.single_device import SingleDeviceStrategy as FabricSingleDeviceStrategy
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.distributed.fabric_strategy import FabricReplicatedStrategy, FabricShardedStrategy
from sbn_lightning.distributed.strategies import ReplicatedStrategy, ShardedStrategy
from sbn_lightning.formats.init_from import check_tokenizer
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.training.distillation import Distillation
from sbn_lightning.training.parameter_groups import SCALE


def check_lengths(config: TransformerConfig, data: Any) -> None:
    """Check that the model has room for the tokens and the sequences of the data.

    Args:
        config: The configuration of the model.
        data: The data module. Data without ``vocab_size`` or ``sequence_length`` are not checked.

    Raises:
        ConfigError: If the tokenizer has more tokens than the embedding has rows, or sequences are too long.
    """
    vocab_size = getattr(data, "vocab_size", None)
    if vocab_size is not None and vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer of {getattr(data, 'path', 'the data')} has {vocab_size} tokens, the model's vocab_size "
            f"is {config.vocab_size}: set model.config.vocab_size to {vocab_size} or more"
        )
    length = getattr(data, "sequence_length", None)
    if length is not None and length > config.max_sequence_length:
        raise ConfigError(
            f"data.sequence_length={length} is longer than model.config.max_sequence_length="
            f"{config.max_sequence_length}"
        )


def check_teacher(distillation: Distillation, config: TransformerConfig, data: Any) -> None:
    """Check that there is a teacher, and that its tokens are those of the student.

    Args:
        distillation: The options of the distillation. Without a teacher, the data must hold a teacher's logits.
        config: The configuration of the student.
        data: The data module.

    Raises:
        ConfigError: If teacher and student do not share a tokenizer, or there is neither a teacher nor logits of one.
        DataError: If the teacher does not exist.
    """
    if distillation.teacher is None:
        rows = getattr(data, "teacher_rows", None)
        if rows is None:
            raise ConfigError(
                "distillation.teacher is null, and the data hold no teacher's logits: give the teacher, or a "
                "data.path that `sbn teacher-logits` wrote"
            )
        if rows.vocab_size != config.vocab_size:
            raise ConfigError(
                f"distillation: the teacher {rows.teacher} has {rows.vocab_size} tokens, the student "
                f"{config.vocab_size}: they must share a tokenizer"
            )
        return
    if not Path(distillation.teacher).exists():
        raise DataError(
            f"distillation: the teacher {distillation.teacher} does not exist; write it with: sbn "
            f"import-hf --input MODEL --output {distillation.teacher}"
        )
    check_tokenizer(distillation.teacher, data, "distillation.teacher")


GRAPHED = (
    SingleDeviceStrategy,
    ReplicatedStrategy,
    ShardedStrategy,
    FabricSingleDeviceStrategy,
    FabricReplicatedStrategy,
    FabricShardedStrategy,
)


def check_graphs(module: Any, trainer: Any) -> None:
    """Refuse what a CUDA graph of the step cannot hold.

    Args:
        module: The :class:`~sbn_lightning.training.module.SparseBitNet`, or a subclass, that is trained with
            ``cuda_graphs``.
        trainer: The Trainer, or what stands for it in the Fabric loop.

    Raises:
        ConfigError: If the run has something that does not work with ``cuda_graphs``. The message names it.
    """
    strategy = trainer.strategy if isinstance(trainer, Trainer) else trainer.fabric.strategy
    distillation = module.distillation
    sharding = getattr(strategy, "sharding", {})
    reasons = {
        f"{type(strategy).__name__}, only with trainer.strategy: auto, sbn_ddp or sbn_fsdp2": not isinstance(
            strategy, GRAPHED
        ),
        f"gather: {sharding.get('gather')} in sbn_fsdp2, only with packed_step": sharding
        and sharding["gather"] != "packed_step",
        "reduce: step in sbn_fsdp2, only with micro_batch": sharding.get("reduce") == "step",
        "options of torch's DistributedDataParallel in sbn_ddp": getattr(strategy, "by_torch", False),
        f"linear: {module.config.linear} in sbn_fsdp2, only with ternary": sharding
        and module.config.linear != "ternary",
        "a mixture of experts, whose host reads how many tokens each expert has": any(
            "Experts" in type(part).__name__ for part in module.model.modules()
        ),
        "distillation.teacher: null": distillation is not None and distillation.teacher is None,
        "answers": module.answers is not None,
        "loss: liger, which waits for the GPU": getattr(module.config, "loss", None) == "liger",
        f"a run on {strategy.root_device.type}": strategy.root_device.type != "cuda",
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), None):
        can_shrink = reason == "a run on cpu" and not hasattr(module.config, "hugging_face")
        or_shrink = "; --config sizes/cpu makes a recipe for a GPU fit a CPU" if can_shrink else ""
        raise ConfigError(f"model.cuda_graphs does not work with {reason}; set model.cuda_graphs to false{or_shrink}")


def warn_of_other_options(optimizer: Optimizer) -> None:
    """Warn if an optimiser that continues from a checkpoint has other options than the command gives."""
    for name in ("lr", "betas", "eps", "momentum"):
        group = optimizer.param_groups[0]
        wanted = _as_tuple(optimizer.defaults.get(name))
        if name == "lr" and wanted is not None:
            wanted = wanted * group.get(SCALE, 1.0)  # Not in place: a learning rate may be a tensor.
        has = _as_tuple(group.get("initial_lr" if name == "lr" else name, wanted))
        if has != wanted:
            rank_zero_warn(
                f"training goes on with the checkpoint's {name}={has}, not {wanted}: an optimiser's options "
                "are part of its state (model.init_from starts a new run from weights)"
            )


def _as_tuple(option: Any) -> Any:
    """Return a list as a tuple: YAML and checkpoints have betas as lists."""
    return tuple(option) if isinstance(option, list) else option
