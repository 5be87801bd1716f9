"""How a run goes from dense weights to the target pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.masked_linear import MaskedLinear
from sbn_lightning.sparsity.pattern import NMPattern

RampShape = Literal["step", "walk", "rows", "layers"]
Curve = Literal["linear", "cubic"]
Density = tuple[int, float]
"""The arguments of ``MaskedLinear.set_density``: weights kept in a group, and the share of rows that are sparse."""
OF_STEPS = " (max_steps or total_steps)"  # Where the number of steps is given.


@dataclass(frozen=True)
class Ramp:
    """Start dense and end at each layer's pattern N:M.

    The shapes differ in what happens while the progress p goes from 0 at ``start`` to 1 at ``end``:

    * ``"step"``: dense until ``start``, N:M from there on. The paper's "sparse share" is ``1 - start``.
    * ``"walk"``: M:M, then M-1:M, and so on to N:M, in equal parts.
    * ``"rows"``: a share p of each layer's rows (output features) is N:M, the other rows are dense.
    * ``"layers"``: the first share p of the layers is N:M, the other layers are dense.

    The density is a pure function of the optimiser step. With the defaults, training is sparse from its first step.

    Args:
        shape: One of the four shapes above.
        start: The share of training at which the weights stop being dense, 0 to 1.
        end: The share of training at which the ramp arrives at N:M. The shape ``"step"`` does not use it.
        curve: ``"linear"``, or ``"cubic"`` for ``1 - (1 - p)^3``, which is fast first and slow at the end
            (Zhu and Gupta, arXiv 1710.01878).
        owner: The name that error messages start with.

    Raises:
        ConfigError: If the values do not make a ramp.
    """

    shape: RampShape = "step"
    start: float = 0.0
    end: float = 0.5
    curve: Curve = "linear"
    owner: str = "Ramp"

    def __post_init__(self) -> None:
        if self.shape not in ("step", "walk", "rows", "layers"):
            raise ConfigError(f"{self.owner}: shape={self.shape!r} is not one of 'step', 'walk', 'rows', 'layers'")
        if self.curve not in ("linear", "cubic"):
            raise ConfigError(f"{self.owner}: curve={self.curve!r} is not 'linear' or 'cubic'")
        if not 0 <= self.start <= 1:
            raise ConfigError(f"{self.owner}: start={self.start} is not a share of training, 0 to 1")
        if self.shape != "step" and not self.start < self.end <= 1:
            raise ConfigError(f"{self.owner}: end={self.end} must lie after start={self.start}, and not after 1")

    @property
    def needs_length(self) -> bool:
        """Whether the ramp depends on the length of training."""
        return self.shape != "step" or self.start > 0

    def progress(self, step: int, total_steps: int) -> float:
        """Return p after ``step`` of ``total_steps`` optimiser steps, 0 to 1."""
        first = round(self.start * total_steps)
        if self.shape == "step":
            return float(step >= first)
        last = max(round(self.end * total_steps), first + 1)
        p = min(max((step - first) / (last - first), 0.0), 1.0)
        return p if self.curve == "linear" else 1 - (1 - p) ** 3

    def density(self, progress: float, pattern: NMPattern, index: int, count: int) -> Density:
        """Return the density of layer ``index`` of ``count`` layers, as arguments of its ``set_density``."""
        if self.shape == "rows":
            return pattern.n, progress
        if self.shape == "layers":
            return pattern.n, float(index < progress * count)
        # Without the small term, a rounding error as in 0.1 + 0.2 could delay a stage by one step.
        return pattern.m - int(progress * (pattern.m - pattern.n) + 1e-9), 1.0

    def apply(self, layers: Sequence[MaskedLinear], step: int, total_steps: int) -> list[Density]:
        """Give each layer its density after ``step`` of ``total_steps`` optimiser steps, and return the densities."""
        progress = self.progress(step, total_steps)
        densities = [self.density(progress, layer.pattern, i, len(layers)) for i, layer in enumerate(layers)]
        for layer, (keep_n, share) in zip(layers, densities, strict=True):
            layer.set_density(keep_n, share)
        return densities

    def unfinished(self, layers: Sequence[MaskedLinear], step: int, total_steps: int) -> str | None:
        """Return what a user should know if training ends after ``step`` of ``total_steps`` steps; None if nothing."""
        progress = self.progress(step, total_steps)
        densities = [self.density(progress, layer.pattern, i, len(layers)) for i, layer in enumerate(layers)]
        late = [layer for layer, density in zip(layers, densities, strict=True) if density != (layer.pattern.n, 1.0)]
        if not late:
            return None
        return (
            f"{self.owner}: training ended after {step} of {total_steps} steps, at {progress:.0%} of the ramp. "
            f"{len(late)} of {len(layers)} layers are not yet {late[0].pattern}: continue from a checkpoint, train "
            f"again with the true number of steps{OF_STEPS}, or call layer.set_density({late[0].pattern.n}, 1.0)"
        )

    @staticmethod
    def restore(layers: Sequence[MaskedLinear], densities: Sequence[Density]) -> None:
        """Tell layers that were loaded which densities their masks have. The masks stay as they are.

        Nothing happens if the number of densities is not the number of layers. A layer whose pattern does not fit its
        old density gets a fresh mask at the next :meth:`apply`.
        """
        if len(densities) != len(layers):
            return
        for layer, (keep_n, share) in zip(layers, densities, strict=True):
            if layer.pattern.n <= keep_n <= layer.pattern.m:
                layer.set_density(keep_n, share, refresh=False)
