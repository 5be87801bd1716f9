"""How a run goes from unrounded latent weights to ternary ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.masked_linear import MaskedLinear
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.schedule.ramp import OF_STEPS, Curve

RoundingShape = Literal["all", "layers"]
Rounded = Literal["both", "weights", "tokens"]


@dataclass(frozen=True)
class Rounding:
    """Start with unrounded weights and tokens, and end with ternary weights and quantised tokens.

    The progress p goes from 0 at ``start`` to 1 at ``end``. A layer with the share a computes with
    ``W + a (gamma T - W)`` in place of the ternary weight (:mod:`sbn_lightning.sparsity.partial_rounding`). The share
    is a pure function of the optimiser step. With the defaults everything is rounded from the first step.

    The source of the shape ``"all"`` is Hugging Face's warm-up for 1.58-bit fine-tuning
    (huggingface.co/blog/1_58_llm_extreme_quantization). The shape ``"layers"`` follows Incremental Network
    Quantization (arXiv 1702.03044), with whole layers in place of groups of weights.

    Args:
        end: The share of training at which everything is rounded, 0 to 1. 0 means no warm-up.
        start: The share of training at which the rounding begins.
        shape: ``"all"``: every layer has the share p. ``"layers"``: the first share p of the layers is rounded and the
            others are not; the layer at the border has the share in between.
        curve: ``"linear"``, or ``"cubic"`` for ``1 - (1 - p)^3``.
        what: What grows into its rounding: ``"both"``, the ``"weights"`` or the ``"tokens"``. The other one is rounded
            from the first step.
        owner: The name that error messages start with.

    Raises:
        ConfigError: If the values do not make a warm-up.
    """

    end: float = 0.0
    start: float = 0.0
    shape: RoundingShape = "all"
    curve: Curve = "linear"
    what: Rounded = "both"
    owner: str = "Rounding"

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("shape", self.shape, ("all", "layers")),
            ("curve", self.curve, ("linear", "cubic")),
            ("what", self.what, ("both", "weights", "tokens")),
        ):
            if value not in choices:
                raise ConfigError(f"{self.owner}: {name}={value!r} is not one of {', '.join(map(repr, choices))}")
        if not 0 <= self.end <= 1:
            raise ConfigError(f"{self.owner}: end={self.end} is not a share of training, 0 to 1")
        if self.end and not 0 <= self.start < self.end:
            raise ConfigError(f"{self.owner}: start={self.start} must be 0 or more, and lie before end={self.end}")

    @property
    def needs_length(self) -> bool:
        """Whether the warm-up depends on the length of training."""
        return self.end > 0

    def progress(self, step: int, total_steps: int) -> float:
        """Return p after ``step`` of ``total_steps`` optimiser steps, 0 to 1."""
        if not self.end:
            return 1.0
        first = round(self.start * total_steps)
        last = max(round(self.end * total_steps), first + 1)
        p = min(max((step - first) / (last - first), 0.0), 1.0)
        return p if self.curve == "linear" else 1 - (1 - p) ** 3

    def share(self, progress: float, index: int, count: int) -> float:
        """Return the share of the rounding of layer ``index`` of ``count`` layers, 0 to 1."""
        if self.shape == "all" or progress == 1:
            return progress
        return min(max(progress * count - index, 0.0), 1.0)

    def unfinished(self, layers: Sequence[MaskedLinear], step: int, total_steps: int) -> str | None:
        """Return what a user should know if training ends after ``step`` of ``total_steps`` steps; None if nothing."""
        progress = self.progress(step, total_steps)
        if progress == 1 or not any(isinstance(layer, SparseBitLinear) for layer in layers):
            return None
        return (
            f"{self.owner}: training ended after {step} of {total_steps} steps, at {progress:.0%} of the rounding. "
            "From here on the model is rounded as a whole, and computes something else than it did in training: "
            f"continue from a checkpoint, or train again with the true number of steps{OF_STEPS}"
        )

    def apply(self, layers: Sequence[MaskedLinear], step: int, total_steps: int) -> float:
        """Give each ternary layer its share after ``step`` of ``total_steps`` optimiser steps, and return p.

        Raises:
            ConfigError: If a layer cannot be rounded partly.
        """
        progress = self.progress(step, total_steps)
        ternary = [layer for layer in layers if isinstance(layer, SparseBitLinear)]
        for index, layer in enumerate(ternary):
            share = self.share(progress, index, len(ternary))
            layer.set_rounding(
                1.0 if self.what == "tokens" else share,
                1.0 if self.what == "weights" else share,
            )
        return progress
