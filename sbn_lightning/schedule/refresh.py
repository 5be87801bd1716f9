"""When masks are recomputed.

A mask may be older than its weight, for example between two refreshes that are ten steps apart. With the dense
gradient a masked weight then keeps receiving a gradient that does not depend on the weight. The weight drifts, and at
the next refresh all drifted weights come in at once. In short trainings the loss was 0.18 to 0.34 nats higher at an
interval of ten steps (docs/LOG.md, 2026-11-22). The default ``stale_gradient="masked"`` avoids the drift: masked
weights get a gradient only in the step right after a refresh, when the mask fits the weights, and none while the mask
is stale. A masked weight can still come back, by one step in each interval.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.masked_linear import MaskedLinear

StaleGradient = Literal["masked", "dense"]


@dataclass(frozen=True)
class Refresh:
    """Recompute masks every ``interval`` optimiser steps.

    Whether masks are recomputed after step k depends on k alone. A resumed run therefore refreshes its masks at the
    same steps as a run that was never interrupted.

    Args:
        interval: The number of optimiser steps between refreshes. 1 follows the weights at every step.
        freeze_after: The optimiser step after which masks stay as they are. From then on only the weights that the
            mask keeps get gradients.
        stale_gradient: The gradient of masked weights while the mask is older than the weights. ``"masked"`` gives
            none, which is safe. ``"dense"`` gives the straight-through gradient of the paper, which cost 0.18 to 0.34
            nats at an interval of 10.
        owner: The name that error messages start with.

    Raises:
        ConfigError: If a value is out of range.
    """

    interval: int = 1
    freeze_after: int | None = None
    stale_gradient: StaleGradient = "masked"
    owner: str = "Refresh"

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ConfigError(f"{self.owner}: interval={self.interval} must be at least 1")
        if self.freeze_after is not None and self.freeze_after < 0:
            raise ConfigError(f"{self.owner}: freeze_after={self.freeze_after} must not be negative")
        if self.stale_gradient not in ("masked", "dense"):
            raise ConfigError(f"{self.owner}: stale_gradient={self.stale_gradient!r} is not 'masked' or 'dense'")

    @property
    def warning(self) -> str | None:
        """A warning about these values for the user, or None."""
        if self.stale_gradient == "masked" or (self.interval == 1 and self.freeze_after is None):
            return None
        return (
            f"{self.owner}(interval={self.interval}, freeze_after={self.freeze_after}, stale_gradient='dense'): masked "
            "weights drift under a stale mask and come in all at once; stale_gradient='masked' avoids it"
        )

    @property
    def holds_masks(self) -> bool:
        """Whether masks change only at refreshes. Otherwise they follow the weights at every use."""
        return self.interval > 1 or self.freeze_after is not None

    def is_due(self, step: int) -> bool:
        """Return whether masks are recomputed after ``step`` optimiser steps."""
        return step % self.interval == 0 and (self.freeze_after is None or step <= self.freeze_after)

    def apply(self, layers: Iterable[MaskedLinear], step: int, before: int) -> bool:
        """Refresh the masks of ``layers`` if that is due after ``step`` optimiser steps.

        The layers also learn whether their masks are held, and whether masked weights get gradients.

        Args:
            layers: The layers whose masks this schedule decides about.
            step: The number of optimiser steps done.
            before: The step of the last call. A loop with several optimisers may jump over a step that is due.

        Returns:
            Whether masks were recomputed.
        """
        due = any(self.is_due(passed) for passed in range(before + 1, step + 1))
        for layer in layers:
            layer.hold_mask = self.holds_masks
            layer.regrow = due or self.stale_gradient == "dense"
            if due and layer.hold_mask:
                layer.refresh_mask()
        return due

    @staticmethod
    def release(layers: Iterable[MaskedLinear]) -> None:
        """End the schedule: a held mask stays until its weight trains again, and follows the weight from then on."""
        for layer in layers:
            if layer.hold_mask:
                layer.keep_mask()
            layer.hold_mask, layer.regrow = False, True
