"""``WeightDecaySchedule``: a weight decay that falls to zero during training, as in Sparse-BitNet's recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from sbn_lightning.callbacks.base import StepCallback, schedule_length
from sbn_lightning.schedule.curves import check_share, cosine_to_zero

if TYPE_CHECKING:
    from sbn_lightning.callbacks.base import Run


class WeightDecaySchedule(StepCallback):
    """Multiply each parameter group's weight decay by a cosine that falls from 1 to 0 and stays 0.

    Groups without weight decay stay without. The largest weight decay of all groups is logged as ``weight_decay``.

    Args:
        until: The share of training after which weight decay is 0. None leaves weight decay alone and only logs it.
        total_steps: The number of optimiser steps of the whole training. None takes the trainer's ``max_steps``, or
            else the number of steps in its ``max_epochs``.

    Raises:
        ConfigError: If ``until`` is no share of training, and when training starts if its length is not known.
    """

    def __init__(self, until: float | None = 0.5, total_steps: int | None = None) -> None:
        super().__init__()
        check_share(type(self).__name__, until)
        self.until = until
        self.total_steps = total_steps
        self._initial: list[float] = []
        self._is_restored = False

    def factor(self, step: int, total_steps: int) -> float:
        """Return the share of the initial weight decay after ``step`` of ``total_steps`` optimiser steps."""
        if self.until is None:
            return 1.0
        return cosine_to_zero(step, self.until * total_steps)

    def on_train_start(self, trainer: Run, pl_module: nn.Module) -> None:
        """Note the weight decay that training began with."""
        groups = self._groups(trainer)
        # A resumed optimiser holds the decay of its last step; the initial one comes from this callback's state.
        if not self._is_restored or len(self._initial) != len(groups):
            self._initial = [float(group.get("weight_decay", 0.0)) for group in groups]
        self._is_restored = False  # A second fit with this callback has an optimiser of its own.
        super().on_train_start(trainer, pl_module)

    def on_step(self, trainer: Run, module: nn.Module, step: int) -> None:
        """Set the weight decay of the next optimiser step, and log the largest one."""
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
        """Return plain values for the checkpoint."""
        return {"initial": self._initial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the weight decay that training began with."""
        self._initial = list(state_dict["initial"])
        self._is_restored = True
