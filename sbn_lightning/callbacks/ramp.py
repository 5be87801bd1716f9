"""``DenseToSparseRamp``: from dense to the target pattern. :mod:`sbn_lightning.schedule.ramp` has the arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from sbn_lightning.callbacks.base import (
    StepCallback,
    is_compiled,
    require_masked_layers,
    schedule_length,
    warn_of_early_end,
)
from sbn_lightning.layers.masked_linear import MaskedLinear, masked_layers
from sbn_lightning.schedule.ramp import Curve, Density, Ramp, RampShape
from sbn_lightning.sparsity.pattern import NMPattern

if TYPE_CHECKING:
    from sbn_lightning.callbacks.base import Run


class DenseToSparseRamp(StepCallback):
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
        total_steps: The number of optimiser steps of the whole training. None takes the trainer's ``max_steps``, or
            else the number of steps in its ``max_epochs``.

    Raises:
        ConfigError: If the values do not make a ramp, and when training starts if the length of training is not known.
    """

    needs_masked_layers = True

    def __init__(
        self,
        shape: RampShape = "step",
        start: float = 0.0,
        end: float = 0.5,
        curve: Curve = "linear",
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.ramp = Ramp(shape, start, end, curve, owner="DenseToSparseRamp")
        self.shape, self.start, self.end, self.curve, self.total_steps = shape, start, end, curve, total_steps
        self._densities: list[Density] = []
        self._is_loaded = False  # Whether a checkpoint was just loaded, with its densities.

    def progress(self, step: int, total_steps: int) -> float:
        """Return p after ``step`` of ``total_steps`` optimiser steps, 0 to 1."""
        return self.ramp.progress(step, total_steps)

    def density(self, progress: float, pattern: NMPattern, index: int, count: int) -> Density:
        """Return the density of layer ``index`` of ``count`` layers, as arguments of its ``set_density``."""
        return self.ramp.density(progress, pattern, index, count)

    def restore(self, trainer: Run, module: nn.Module) -> None:
        """Tell the layers which densities the masks in the checkpoint have."""
        if self._is_loaded:
            self._is_loaded = False
            self.ramp.restore(list(require_masked_layers(self, module).values()), self._densities)

    def on_train_start(self, trainer: Run, pl_module: nn.Module) -> None:
        """Check the length of training, and warn if torch would compile the model too often."""
        self._length(trainer)
        layers = list(require_masked_layers(self, pl_module).values())
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
        """Give each layer the density of this step."""
        layers = list(require_masked_layers(self, module).values())
        self._densities = self.ramp.apply(layers, step, self._length(trainer))

    def on_train_end(self, trainer: Run, pl_module: nn.Module) -> None:
        """Warn if training ended before the ramp did."""
        layers = [layer for _, layer in masked_layers(pl_module)]  # None, if another callback has reverted them.
        warn_of_early_end(trainer, self.ramp.unfinished(layers, trainer.global_step, self._length(trainer)))

    def _length(self, trainer: Run) -> int:
        return schedule_length(self, trainer, self.total_steps) if self.ramp.needs_length else 1

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for the checkpoint."""
        return {"densities": self._densities}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the densities of the masks in the checkpoint."""
        self._densities = [(int(keep_n), float(share)) for keep_n, share in state_dict["densities"]]
        self._is_loaded = True
