"""From dense to the target pattern inside one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from sbn_lightning.callbacks.base import StepCallback, is_compiled, require_masked_layers, schedule_length
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.sparse_linear import MaskedLinear
from sbn_lightning.sparsity.pattern import NMPattern

if TYPE_CHECKING:
    from sbn_lightning.callbacks.base import Run

RampShape = Literal["step", "walk", "rows", "layers"]
Curve = Literal["linear", "cubic"]


class DenseToSparseRamp(StepCallback):
    """Starts dense and ends at each layer's pattern N:M.

    The shapes, with progress p going from 0 at ``start`` to 1 at ``end``:

    * ``"step"``: dense until ``start``, N:M from there on (the paper's "sparse share" is ``1 - start``);
    * ``"walk"``: M:M, M-1:M, ..., N:M in equal parts;
    * ``"rows"``: a share p of each layer's rows (output features) is N:M, the others dense;
    * ``"layers"``: the first share p of the layers is N:M, the others dense.

    Density is a pure function of the optimiser step. With the defaults training is sparse from its first step.

    Args:
        shape: See above.
        start: Share of training at which the ramp leaves dense, 0 to 1.
        end: Share of training at which it arrives at N:M; not used by ``"step"``.
        curve: ``"linear"``, or ``"cubic"``: ``1 - (1 - p)^3``, fast first and slow at the end (arXiv 1710.01878).
        total_steps: Optimiser steps of the whole training; the trainer's ``max_steps`` if not given.

    Raises:
        ConfigError: If the values do not make a ramp.
    """

    def __init__(
        self,
        shape: RampShape = "step",
        start: float = 0.0,
        end: float = 0.5,
        curve: Curve = "linear",
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        if shape not in ("step", "walk", "rows", "layers"):
            raise ConfigError(f"DenseToSparseRamp: shape={shape!r} is not one of 'step', 'walk', 'rows', 'layers'")
        if curve not in ("linear", "cubic"):
            raise ConfigError(f"DenseToSparseRamp: curve={curve!r} is not 'linear' or 'cubic'")
        if not 0 <= start <= 1:
            raise ConfigError(f"DenseToSparseRamp: start={start} is not a share of training, 0 to 1")
        if shape != "step" and not start < end <= 1:
            raise ConfigError(f"DenseToSparseRamp: end={end} must lie after start={start}, and not after 1")
        self.shape, self.start, self.end, self.curve, self.total_steps = shape, start, end, curve, total_steps
        self._densities: list[tuple[int, float]] = []

    def progress(self, step: int, total_steps: int) -> float:
        """p after ``step`` of ``total_steps`` optimiser steps, 0 to 1."""
        first = round(self.start * total_steps)
        if self.shape == "step":
            return float(step >= first)
        last = max(round(self.end * total_steps), first + 1)
        p = min(max((step - first) / (last - first), 0.0), 1.0)
        return p if self.curve == "linear" else 1 - (1 - p) ** 3

    def density(self, progress: float, pattern: NMPattern, index: int, count: int) -> tuple[int, float]:
        """What layer ``index`` of ``count`` keeps: ``(keep_n, sparse_share)`` for its ``set_density``."""
        if self.shape == "rows":
            return pattern.n, progress
        if self.shape == "layers":
            return pattern.n, float(index < progress * count)
        # The small term keeps 0.1 + 0.2 style rounding from delaying a stage by a step.
        return pattern.m - int(progress * (pattern.m - pattern.n) + 1e-9), 1.0

    def on_train_start(self, trainer: Run, pl_module: nn.Module) -> None:
        self._length(trainer)
        layers = list(require_masked_layers(self, pl_module).values())
        if len(self._densities) == len(layers):
            # A resumed run: the masks in the checkpoint were made for these densities, unless the pattern is another.
            for layer, (keep_n, share) in zip(layers, self._densities, strict=True):
                if layer.pattern.n <= keep_n <= layer.pattern.m:
                    layer.set_density(keep_n, share, refresh=False)
        if is_compiled(pl_module) and not all(layer.owner_prepares for layer in layers):
            self._warn_of_compilations(layers)
        super().on_train_start(trainer, pl_module)

    def _warn_of_compilations(self, layers: list[MaskedLinear]) -> None:
        densities = {"walk": max(layer.pattern.m - layer.pattern.n for layer in layers), "layers": len(layers)}
        times, limit = densities.get(self.shape, 0) + 1, torch._dynamo.config.recompile_limit
        if times > limit:
            rank_zero_warn(
                f"DenseToSparseRamp(shape={self.shape!r}) changes density {times - 1} times; each time torch compiles "
                f"the model again; after {limit} times it goes on uncompiled. Use shape='rows', or raise "
                "torch._dynamo.config.recompile_limit"
            )

    def on_step(self, trainer: Run, module: nn.Module, step: int) -> None:
        layers = list(require_masked_layers(self, module).values())
        progress = self.progress(step, self._length(trainer))
        self._densities = [self.density(progress, layer.pattern, i, len(layers)) for i, layer in enumerate(layers)]
        for layer, (keep_n, share) in zip(layers, self._densities, strict=True):
            layer.set_density(keep_n, share)

    def _length(self, trainer: Run) -> int:
        sparse_from_the_start = self.shape == "step" and self.start == 0
        return 1 if sparse_from_the_start else schedule_length(self, trainer, self.total_steps)

    def state_dict(self) -> dict[str, Any]:
        return {"densities": self._densities}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._densities = [(int(keep_n), float(share)) for keep_n, share in state_dict["densities"]]
