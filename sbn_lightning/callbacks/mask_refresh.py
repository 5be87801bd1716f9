"""``MaskRefresh``: when masks are recomputed. :mod:`sbn_lightning.schedule.refresh` has the rule and its reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from sbn_lightning.callbacks.base import StepCallback, require_masked_layers
from sbn_lightning.schedule.refresh import Refresh, StaleGradient

if TYPE_CHECKING:
    from sbn_lightning.callbacks.base import Run


class MaskRefresh(StepCallback):
    """Recompute masks every ``interval`` optimiser steps.

    Whether masks are recomputed after step k depends on k alone. A resumed run therefore refreshes its masks at the
    same steps as a run that was never interrupted.

    Args:
        interval: The number of optimiser steps between refreshes. 1 follows the weights at every step.
        freeze_after: The optimiser step after which masks stay as they are. From then on only the weights that the mask
            keeps get gradients.
        stale_gradient: The gradient of masked weights while the mask is older than the weights. ``"masked"`` gives
            none, which is safe. ``"dense"`` gives the straight-through gradient of the paper, which cost 0.18 to 0.34
            nats at an interval of 10.

    Raises:
        ConfigError: If a value is out of range, and when training starts if the model has no masked layer.
    """

    needs_masked_layers = True

    def __init__(
        self, interval: int = 1, freeze_after: int | None = None, stale_gradient: StaleGradient = "masked"
    ) -> None:
        super().__init__()
        self.refresh = Refresh(interval, freeze_after, stale_gradient, owner="MaskRefresh")
        if self.refresh.warning:
            rank_zero_warn(self.refresh.warning)
        self.interval = interval
        self.freeze_after = freeze_after
        self.stale_gradient = stale_gradient
        self.last_refresh = 0

    def is_due(self, step: int) -> bool:
        """Return whether masks are recomputed after ``step`` optimiser steps."""
        return self.refresh.is_due(step)

    def on_step(self, trainer: Run, module: nn.Module, step: int) -> None:
        """Recompute the masks if that is due."""
        # With several optimisers global_step counts the steps of all of them, so it may jump over a step that is due.
        if self.refresh.apply(require_masked_layers(self, module).values(), step, self._before):
            self.last_refresh = step

    def on_train_end(self, trainer: Run, pl_module: nn.Module) -> None:
        """Let go of the masks: a held mask stays until its weight trains again, and follows the weight from then on."""
        self.refresh.release(require_masked_layers(self, pl_module).values())

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for the checkpoint."""
        return {"interval": self.interval, "freeze_after": self.freeze_after, "last_refresh": self.last_refresh}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state, and warn if the checkpoint was made with another schedule."""
        self.last_refresh = state_dict["last_refresh"]
        before = {key: state_dict[key] for key in ("interval", "freeze_after")}
        now = {"interval": self.interval, "freeze_after": self.freeze_after}
        if before != now:
            rank_zero_warn(f"MaskRefresh: the checkpoint was made with {before}, this run continues with {now}")
