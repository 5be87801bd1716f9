"""Training on several processes: sharding, masks that equal those of one process, and optimiser states by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbn_lightning.distributed.meeting import meet_afresh
    from sbn_lightning.distributed.optimizer_states import name_optimizer_states
    from sbn_lightning.distributed.sharding import (
        gradients_stay,
        keep_masks_out_of_broadcasts,
        rest_stays_whole,
        shard,
    )
    from sbn_lightning.distributed.strategies import check_checkpoint, check_strategy

_MODULE_OF = {
    "check_checkpoint": "strategies",
    "check_strategy": "strategies",
    "gradients_stay": "sharding",
    "keep_masks_out_of_broadcasts": "sharding",
    "meet_afresh": "meeting",
    "name_optimizer_states": "optimizer_states",
    "rest_stays_whole": "sharding",
    "shard": "sharding",
}

__all__ = [
    "check_checkpoint",
    "check_strategy",
    "gradients_stay",
    "keep_masks_out_of_broadcasts",
    "meet_afresh",
    "name_optimizer_states",
    "rest_stays_whole",
    "shard",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
