"""``RoundingWarmup``: from latent to ternary weights. :mod:`sbn_lightning.schedule.rounding` has the arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from sbn_lightning.callbacks.base import StepCallback, require_masked_layers, schedule_length, warn_of_early_end
from sbn_lightning.layers.masked_linear import masked_layers
from sbn_lightning.schedule.ramp import Curve
from sbn_lightning.schedule.rounding import Rounded, Rounding, RoundingShape

if TYPE_CHECKING:
    from sbn_lightning.callbacks.base import Run


class RoundingWarmup(StepCallback):
    """Let the rounding of ternary layers grow from nothing to the whole; for a run that starts from pretrained weights.

    While the rounding grows, the layers compute in plain PyTorch, and the int8 kernels only make masks and codes.
    Validation measures the model as it is trained at that moment. A checkpoint from the middle of a warm-up is
    evaluated and exported with the whole rounding. A run that resumes takes up the share of its step.

    Args:
        end: The share of training at which everything is rounded, 0 to 1. 0 means no warm-up.
        start: The share of training at which the rounding begins.
        shape: ``"all"``: every layer has the share p. ``"layers"``: one layer after the other, from the first.
        curve: ``"linear"``, or ``"cubic"`` for ``1 - (1 - p)^3``.
        what: What grows into its rounding: ``"both"``, the ``"weights"`` or the ``"tokens"``.
        total_steps: The number of optimiser steps of the whole training. None takes the trainer's ``max_steps``, or
            else the number of steps in its ``max_epochs``.

    Raises:
        ConfigError: If the values do not make a warm-up, and when training starts if the length of training is not
            known.
    """

    needs_masked_layers = True

    def __init__(
        self,
        end: float = 0.0,
        start: float = 0.0,
        shape: RoundingShape = "all",
        curve: Curve = "linear",
        what: Rounded = "both",
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.rounding = Rounding(end, start, shape, curve, what, owner="RoundingWarmup")
        self.total_steps = total_steps

    def on_step(self, trainer: Run, module: nn.Module, step: int) -> None:
        """Give each layer the share of this step."""
        if self.rounding.needs_length:
            layers = list(require_masked_layers(self, module).values())
            self.rounding.apply(layers, step, schedule_length(self, trainer, self.total_steps))

    def on_train_end(self, trainer: Run, pl_module: nn.Module) -> None:
        """Leave a model whose rounding is whole, and warn if the warm-up had not ended yet."""
        layers = [layer for _, layer in masked_layers(pl_module)]  # None, if another callback has reverted them.
        if self.rounding.needs_length:
            length = schedule_length(self, trainer, self.total_steps)
            warn_of_early_end(trainer, self.rounding.unfinished(layers, trainer.global_step, length))
            Rounding().apply(layers, 1, 1)
