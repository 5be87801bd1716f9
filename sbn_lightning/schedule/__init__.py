"""What happens to masks over the course of a training run, for any training loop.

Each file here decides one thing as a pure function of the optimiser step: when masks are recomputed
(:class:`Refresh`), how dense they are (:class:`Ramp`), how much of the rounding is in effect (:class:`Rounding`), and
how fast masked weights decay (:class:`MaskedDecay`). :class:`SparsitySchedule` applies all of them to a model in a
plain PyTorch loop. The Lightning callbacks apply the same classes, so both kinds of loop compute the same numbers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbn_lightning.schedule.masked_decay import MaskedDecay
    from sbn_lightning.schedule.ramp import Curve, Ramp, RampShape
    from sbn_lightning.schedule.refresh import Refresh, StaleGradient
    from sbn_lightning.schedule.rounding import Rounding
    from sbn_lightning.schedule.schedule import SparsitySchedule

_MODULE_OF = {
    "Curve": "ramp",
    "MaskedDecay": "masked_decay",
    "Ramp": "ramp",
    "RampShape": "ramp",
    "Refresh": "refresh",
    "Rounding": "rounding",
    "SparsitySchedule": "schedule",
    "StaleGradient": "refresh",
}

__all__ = ["Curve", "MaskedDecay", "Ramp", "RampShape", "Refresh", "Rounding", "SparsitySchedule", "StaleGradient"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
