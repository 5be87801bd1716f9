"""Scaled rotary positions as plain values: which kind of scaling a model has, and its numbers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.sparsity.config import check_choice

RopeType = Literal["llama3", "linear", "yarn", "dynamic"]

# The fields that each kind has besides ``factor``, and which of these it needs.
_FIELDS: dict[str, tuple[str, ...]] = {
    "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "linear": (),
    "yarn": ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "dynamic": ("original_max_position_embeddings",),
}
_NEEDED = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass
class RopeScaling:
    """Slower rotary frequencies for contexts beyond the one that a model was first trained with.

    The names and meanings are those of ``rope_parameters`` in transformers. A wave is the rotation of one pair of
    features. :func:`~sbn_lightning.models.rope.rope_stretch` has the formulas.

    Args:
        factor: How many times longer the slowest waves become; 1 or more.
        low_freq_factor: A number of turns (``llama3``). Waves that turn less often in the original context are
            stretched by ``factor``.
        high_freq_factor: A number of turns (``llama3``). Waves that turn more often in the original context stay as
            they are.
        original_max_position_embeddings: The length of the original context, in tokens.
        rope_type: The kind of scaling. ``"llama3"`` is that of Llama 3.1 to 3.3. ``"linear"`` stretches all waves by
            ``factor``. ``"yarn"`` is YaRN (arXiv 2309.00071). ``"dynamic"`` changes nothing up to the original context;
            longer sequences are refused, because their frequencies would change with their length.
        attention_factor: The factor of queries and keys under YaRN. None means ``0.1 ln(factor) + 1``.
        beta_fast: A number of turns (``yarn``). Waves that turn more often in the original context stay as they are.
        beta_slow: A number of turns (``yarn``). Waves that turn less often are stretched by ``factor``.
        truncate: Whether YaRN rounds the two borders between waves to whole pairs of features.

    Raises:
        ConfigError: If a number is missing, is out of range, or does not belong to the kind of scaling.
    """

    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    rope_type: RopeType = "llama3"
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        check_choice("rope_scaling: rope_type", self.rope_type, get_args(RopeType))
        if not 1 <= self.factor < math.inf:
            raise ConfigError(f"rope_scaling: factor={self.factor} must be 1 or more")
        own = _FIELDS[self.rope_type]
        for name in _NEEDED:
            if name in own and getattr(self, name) is None:
                raise ConfigError(f"rope_scaling: rope_type {self.rope_type!r} needs {name}")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in defaults.keys() - {"factor", "rope_type", *own}:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"rope_scaling: rope_type {self.rope_type!r} does not use {name}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and not 0 < low < high:
            raise ConfigError(f"rope_scaling: low_freq_factor={low} must be above 0 and below high_freq_factor={high}")
        if self.original_max_position_embeddings is not None and self.original_max_position_embeddings < 1:
            raise ConfigError(
                f"rope_scaling: original_max_position_embeddings={self.original_max_position_embeddings} must be at "
                "least 1"
            )
        if not 0 < self.beta_slow <= self.beta_fast:
            raise ConfigError(
                f"rope_scaling: beta_slow={self.beta_slow} must be above 0 and at most beta_fast={self.beta_fast}"
            )
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise ConfigError(f"rope_scaling: attention_factor={self.attention_factor} must be above 0 and finite")

    @property
    def original_context(self) -> int:
        """The length of the original context, in tokens; only for kinds that have one."""
        assert self.original_max_position_embeddings is not None
        return self.original_max_position_embeddings

    @property
    def magnitude(self) -> float:
        """The factor of the rotated queries and keys: 1, except under YaRN."""
        if self.rope_type != "yarn":
            return 1.0
        return yarn_magnitude(self.factor) if self.attention_factor is None else self.attention_factor

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of this kind of scaling that differ from their defaults, as plain values."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in vars(self).items() if value != defaults[name]}


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """YaRN's factor of queries and keys: ``0.1 scale ln(factor) + 1``."""
    return 0.1 * scale * math.log(factor) + 1.0
