"""Curves that several schedules share."""

from __future__ import annotations

import math

from sbn_lightning.core.errors import ConfigError


def cosine_to_zero(step: int, last_step: float) -> float:
    """Return a cosine that falls from 1 at step 0 to 0 at ``last_step`` and stays 0 from there on."""
    return 0.5 * (1 + math.cos(math.pi * min(step / max(last_step, 1), 1.0)))


def check_share(owner: str, until: float | None) -> None:
    """Check that ``until`` is None or a share of training.

    Args:
        owner: The name of the class that was given ``until``, for the message.
        until: The value to check.

    Raises:
        ConfigError: If ``until`` is 0 or less, or above 1.
    """
    if until is not None and not 0 < until <= 1:
        raise ConfigError(f"{owner}: until={until} is not a share of training above 0 and up to 1")
