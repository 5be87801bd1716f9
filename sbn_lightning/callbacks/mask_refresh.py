"""When masks are recomputed.

With a dense gradient and a mask that is older than the weights, a masked weight keeps receiving a gradient that its
own movement never feeds back into: it drifts, and at the next refresh all drifted weights come in at once. Measured:
perplexity up to five times worse at an interval of ten steps. Two things keep an interval above 1 safe here, both on by
default: masked weights get a gradient only in the step right after a refresh, when the mask is true to the weights,
and none while it is stale. So a masked weight can still come back, by one honest step an interval.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from sbn_lightning.callbacks.base import StepCallback, require_masked_layers
from sbn_lightning.core.errors import ConfigError

if TYPE_CHECKING:
    from sbn_lightning.callbacks.base import Run


class MaskRefresh(StepCallback):
    """Recomputes masks every ``interval`` optimiser steps.

    Whether step k refreshes depends on k alone, so a resumed run refreshes when an undisturbed one would.

    Args:
        interval: Optimiser steps between refreshes; 1 follows the weights at every step.
        freeze_after: Optimiser step after which masks stay as they are. From then on only kept weights get gradients.
        stale_gradient: Gradient of masked weights while the mask is older than the weights: ``"masked"`` gives none
            (safe), ``"dense"`` the straight-through one (the paper's gradient; ruins training above interval 1).
    """

    def __init__(
        self,
        interval: int = 1,
        freeze_after: int | None = None,
        stale_gradient: Literal["masked", "dense"] = "masked",
    ) -> None:
        super().__init__()
        if interval < 1:
            raise ConfigError(f"MaskRefresh: interval={interval} must be at least 1")
        if freeze_after is not None and freeze_after < 0:
            raise ConfigError(f"MaskRefresh: freeze_after={freeze_after} must not be negative")
        if stale_gradient not in ("masked", "dense"):
            raise ConfigError(f"MaskRefresh: stale_gradient={stale_gradient!r} is not 'masked' or 'dense'")
        if stale_gradient == "dense" and (interval > 1 or freeze_after is not None):
            rank_zero_warn(
                f"MaskRefresh(interval={interval}, freeze_after={freeze_after}, stale_gradient='dense'): masked "
                "weights drift under a stale mask and come in all at once; stale_gradient='masked' avoids it"
            )
        self.interval = interval
        self.freeze_after = freeze_after
        self.stale_gradient = stale_gradient
        self.last_refresh = 0

    def is_due(self, step: int) -> bool:
        """Whether masks are recomputed after ``step`` optimiser steps."""
        return step % self.interval == 0 and (self.freeze_after is None or step <= self.freeze_after)

    def on_step(self, trainer: Run, module: nn.Module, step: int) -> None:
        # With several optimisers global_step counts the steps of all, and may jump over one that is due.
        due = any(self.is_due(passed) for passed in range(self._before + 1, step + 1))
        for layer in require_masked_layers(self, module).values():
            layer.hold_mask = self.interval > 1 or self.freeze_after is not None
            layer.regrow = due or self.stale_gradient == "dense"
            if due and layer.hold_mask:
                layer.refresh_mask()
        if due:
            self.last_refresh = step

    def on_train_end(self, trainer: Run, pl_module: nn.Module) -> None:
        """Held masks stay until the weights train again, and follow them then, as after loading a checkpoint."""
        for layer in require_masked_layers(self, pl_module).values():
            if layer.hold_mask:
                layer.keep_mask()
            layer.hold_mask, layer.regrow = False, True

    def state_dict(self) -> dict[str, Any]:
        return {"interval": self.interval, "freeze_after": self.freeze_after, "last_refresh": self.last_refresh}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_refresh = state_dict["last_refresh"]
        before = {key: state_dict[key] for key in ("interval", "freeze_after")}
        now = {"interval": self.interval, "freeze_after": self.freeze_after}
        if before != now:
            rank_zero_warn(f"MaskRefresh: the checkpoint was made with {before}, this run continues with {now}")
