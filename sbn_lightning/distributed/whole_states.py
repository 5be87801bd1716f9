"""Weights and optimiser states of a sharded model, made whole for a checkpoint of one file, and put back.

Lightning's ``ModelParallelStrategy`` does the same for a Trainer. Fabric leaves this to the loop.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from sbn_lightning.distributed.sharding import reshard

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_weights(module: nn.Module) -> dict[str, Any]:
    """The state dict of a sharded model, on the CPU of rank 0. Other ranks get an empty one, and must call this too."""
    return get_model_state_dict(module, options=_WHOLE)


def whole_optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state of an optimiser of a sharded model by the names of parameters, on rank 0. All ranks must call this."""
    return get_optimizer_state_dict(module, optimizer, options=_WHOLE)


def load_weights(module: nn.Module, state: dict[str, Any]) -> None:
    """Load a whole state dict, which every rank has read, into a sharded model."""
    reshard(module)
    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True))


def load_optimizer_state(module: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a whole optimiser state with the names of parameters, which every rank has read."""
    set_optimizer_state_dict(module, optimizer, state, options=StateDictOptions(full_state_dict=True))
