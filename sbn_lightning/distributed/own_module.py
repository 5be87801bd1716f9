"""LightningModules of a user's own under ``sbn_fsdp2``: the strategy shards them, unless they have done so themselves.

The LightningModule itself is the root of the sharded model. Its steps are the methods for which weights are gathered,
so a step may call any part of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed.packed import exchange_of
from sbn_lightning.distributed.sharding import OPTIONS, shard
from sbn_lightning.layers.sparse_bit_linear import ternary_layers

STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def is_sharded(module: nn.Module) -> bool:
    """Whether a model or a part of it is sharded."""
    return any(isinstance(part, FSDPModule) for part in module.modules()) or any(
        isinstance(parameter, DTensor) for parameter in module.parameters()
    )


@contextmanager
def configured(module: LightningModule) -> Iterator[None]:
    """Let a module without ``configure_model`` pass for one that has it. ``ModelParallelStrategy`` demands the hook."""
    if is_overridden("configure_model", module):
        yield
        return
    vars(module)["configure_model"] = _nothing
    try:
        yield
    finally:
        vars(module).pop("configure_model", None)


def _nothing() -> None:
    """A ``configure_model`` for modules that build their layers elsewhere."""


def shard_module(module: LightningModule, mesh: DeviceMesh, options: Mapping[str, Any]) -> None:
    """Shard a whole LightningModule, after the layers were converted and before the optimiser is made.

    Args:
        module: The module, changed in place. An attribute ``blocks`` names the transformer blocks.
        mesh: The mesh of the strategy.
        options: The options of :func:`~sbn_lightning.distributed.sharding.shard`.

    Raises:
        ConfigError: If the module optimises by hand, if ``gather`` needs ``blocks`` and the module has none, or if its
            ``blocks`` cannot be read.
    """
    name, blocks = type(module).__name__, getattr(module, "blocks", None)
    if not module.automatic_optimization:
        raise ConfigError(
            f"sbn_fsdp2 cannot shard {name} by itself, because its training_step calls the backward. Shard its "
            "networks in configure_model: convert_linears(self.net, ...), then shard(self.net, "
            'self.device_mesh["data_parallel"], blocks=..., **self.trainer.strategy.sharding)'
        )
    if blocks is None and hasattr(type(module), "blocks"):  # An AttributeError in a property looks like no attribute.
        raise ConfigError(f"blocks of {name} gives no blocks: it is None, or its property raises an AttributeError")
    if blocks is None and options["gather"] != "packed_step":
        raise ConfigError(
            f"gather={options['gather']!r} gathers one transformer block after the other, and {name} does not say "
            "which these are: give the LightningModule an attribute or a property blocks, a list of modules in the "
            "order in which they run"
        )
    methods = [step for step in STEPS if is_overridden(step, module)]
    shard(module, mesh, blocks=() if blocks is None else blocks, methods=methods, **options)


def check_sharded(module: nn.Module, options: Mapping[str, Any]) -> None:
    """Check that a module which has sharded itself did so as the strategy says, and as a whole.

    Args:
        module: The module. What FSDP2 has gathered must have been given back.
        options: The options of the strategy.

    Raises:
        ConfigError: If options of the strategy have no effect, or if nothing averages the gradients of a parameter.
    """
    advice = (
        "leave the sharding out of configure_model, because sbn_fsdp2 shards by itself; or call "
        'shard(self.net, self.device_mesh["data_parallel"], blocks=..., **self.trainer.strategy.sharding) after '
        "convert_linears"
    )
    name = type(module).__name__.removeprefix("FSDP")  # FSDP2 makes a class of its own, with this prefix.
    found = [vars(part)[OPTIONS] for part in module.modules() if OPTIONS in vars(part)]
    if not found:
        raise ConfigError(f"{name} is sharded without the options of sbn_fsdp2 ({_listed(options)}): {advice}")
    for one in found:
        if differing := {key: value for key, value in options.items() if one[key] != value}:
            own = _listed({key: one[key] for key in differing})
            raise ConfigError(f"{name} is sharded with {own}, and sbn_fsdp2 has {_listed(differing)}: {advice}")
    ternary = {key: layer for key, layer in ternary_layers(module).items() if not hasattr(layer, "experts")}
    if ternary and options["gather"] != "latent":
        late = [key for key, layer in ternary.items() if exchange_of([layer]) is None]
        if late:
            raise ConfigError(f"{_first(late)} became ternary after {name} was sharded: {advice}")
    left = [key for key, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if left:
        raise ConfigError(f"nothing averages the gradients of {_first(left)}, which {name} has not sharded: {advice}")


def check_not_alone(module: nn.Module, strategy: Any) -> None:
    """Refuse to train one unrelated model on each rank: ``ModelParallelStrategy`` leaves it to the module to shard.

    Raises:
        ConfigError: If several ranks train in parallel and no parameter is sharded.
    """
    if not isinstance(strategy, ModelParallelStrategy) or strategy.device_mesh["data_parallel"].size() == 1:
        return
    if not is_sharded(module):
        raise ConfigError(
            f"{type(module).__name__} is not sharded, so each rank would train a model of its own: use the strategy "
            "sbn_fsdp2, which shards by itself, or call fully_shard in configure_model"
        )


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
