"""Weight decay that falls to zero during training, as ternary training wants it (Sparse-BitNet's recipe)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from torch import nn

from sbn_lightning.callbacks.base import StepCallback, schedule_length
from sbn_lightning.core.errors import ConfigError

if TYPE_CHECKING:
    from sbn_lightning.callbacks.base import Run


def check_share(callback: Callback, until: float | None) -> None:
    """Raises:
    ConfigError: If ``until`` is given and no share of training.
    """
    if until is not None and not 0 < until <= 1:
        raise ConfigError(f"{type(callback).__name__}: until={until} is not a share of training above 0 and up to 1")


def cosine_to_zero(step: int, last_step: float) -> float:
    """A cosine from 1 at step 0 to 0 at ``last_step``, and 0 from there on."""
    return 0.5 * (1 + math.cos(math.pi * min(step / max(last_step, 1), 1.0)))


class WeightDecaySchedule(StepCallback):
    """Multiplies each parameter group's weight decay by a cosine that falls from 1 to 0, then keeps 0.

    Groups without weight decay stay without. The value is logged as ``weight_decay`` (the largest over groups).

    Args:
        until: Share of training after which weight decay is 0; None leaves weight decay alone and only logs it.
        total_steps: Optimiser steps of the whole training; the trainer's ``max_steps`` if not given.
    """

    def __init__(self, until: float | None = 0.5, total_steps: int | None = None) -> None:
        super().__init__()
        check_share(self, until)
        self.until = until
        self.total_steps = total_steps
        self._initial: list[float] = []
        self._is_restored = False

    def factor(self, step: int, total_steps: int) -> float:
        """Share of the initial weight decay after ``step`` of ``total_steps`` optimiser steps."""
        if self.until is None:
            return 1.0
        return cosine_to_zero(step, self.until * total_steps)

    def on_train_start(self, trainer: Run, pl_module: nn.Module) -> None:
        groups = self._groups(trainer)
        # A resumed optimiser holds the decay of its last step; the initial one comes from this callback's state.
        if not self._is_restored or len(self._initial) != len(groups):
            self._initial = [float(group.get("weight_decay", 0.0)) for group in groups]
        self._is_restored = False  # another run of this callback has an optimiser of its own
        super().on_train_start(trainer, pl_module)

    def on_step(self, trainer: Run, module: nn.Module, step: int) -> None:
        groups = self._groups(trainer)
        if self.until is not None:
            factor = self.factor(step, schedule_length(self, trainer, self.total_steps))
            for group, initial in zip(groups, self._initial, strict=True):
                if initial > 0:
                    group["weight_decay"] = initial * factor
        every = trainer.log_every_n_steps  # type: ignore[union-attr]
        if step > 0 and every and step // every > self._before // every:
            decay = max(float(group.get("weight_decay", 0.0)) for group in groups)
            for logger in trainer.loggers:
                logger.log_metrics({"weight_decay": decay}, step)

    @staticmethod
    def _groups(trainer: Run) -> list[dict[str, Any]]:
        return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"initial": self._initial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._initial = list(state_dict["initial"])
        self._is_restored = True
