"""``MaskedWeightDecay``: a decay of masked weights alone. :mod:`sbn_lightning.schedule.masked_decay` explains it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from sbn_lightning.callbacks.base import RunCallback, require_masked_layers, schedule_length
from sbn_lightning.callbacks.lightning_internals import precision_of
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.schedule.masked_decay import MaskedDecay

if TYPE_CHECKING:
    from sbn_lightning.callbacks.base import Run


class MaskedWeightDecay(RunCallback):
    """Let the weights that the mask drops decay by ``lr * decay`` an optimiser step, besides any other weight decay.

    The mask is the one of the forward pass. ``lr`` is the learning rate of the weight's own parameter group. The
    callback does not work with ``16-mixed``: its scaler skips optimiser steps, and the decay would still act.

    Args:
        decay: The strength, in the units of a weight decay. 0 does nothing.
        until: The share of training after which the decay is 0. A cosine leads there. None leaves the decay constant.
        total_steps: The number of optimiser steps of the whole training, which ``until`` needs. None takes the
            trainer's ``max_steps``, or else the number of steps in its ``max_epochs``.

    Raises:
        ConfigError: If the decay is negative or ``until`` is no share of training, and when training starts if the
            decay cannot work with what trains.
    """

    needs_masked_layers = True

    def __init__(self, decay: float = 0.0, until: float | None = None, total_steps: int | None = None) -> None:
        self.schedule = MaskedDecay(decay, until, owner="MaskedWeightDecay")
        self.decay, self.until, self.total_steps = decay, until, total_steps

    def decay_at(self, trainer: Run) -> float:
        """Return the decay of the optimiser step that comes next."""
        if not self.schedule.needs_length:
            return self.decay
        return self.schedule.decay_at(trainer.global_step, schedule_length(self, trainer, self.total_steps))

    def on_train_start(self, trainer: Run, pl_module: nn.Module) -> None:
        """Check that the decay can work here."""
        if not self.decay_at(trainer):  # The call also raises now if the length of training is needed and not known.
            return
        self.schedule.check(require_masked_layers(self, pl_module), trainer.optimizers)
        if getattr(precision_of(trainer), "scaler", None) is not None:
            raise ConfigError(
                "MaskedWeightDecay: the scaler of 16-mixed leaves optimiser steps out, not the decay; use bf16-mixed"
            )

    def on_before_optimizer_step(self, trainer: Run, pl_module: nn.Module, optimizer: torch.optim.Optimizer) -> None:  # type: ignore[override]
        """Shrink the masked weights that the optimiser is about to update."""
        if decay := self.decay_at(trainer):
            self.schedule.apply(require_masked_layers(self, pl_module), optimizer, decay)
