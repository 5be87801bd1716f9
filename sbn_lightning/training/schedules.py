"""How the learning rate changes over training."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "two_stage", "constant"]
# The peak of the second stage as a share of the first one's: 1e-3 after 1.5e-3 in the tips of BitNet b1.58.
SECOND_STAGE = 2 / 3


def learning_rate_factor(step: int, *, schedule: Schedule, warmup_steps: int, max_steps: int, floor: float) -> float:
    """Return the learning rate of an optimiser step as a share of the peak.

    The learning rate rises linearly for ``warmup_steps`` steps. Then it falls along a cosine or a line and reaches
    ``floor`` at ``max_steps``, or stays at the peak. ``"two_stage"`` falls along a line too, and in the second half the
    line is two thirds as high ("The Era of 1-bit LLMs: Training Tips, Code and FAQ", of the authors of BitNet b1.58;
    their weight decay ends where the second stage starts, which the callback for weight decay can do).

    Args:
        step: The number of the optimiser step, from 0.
        schedule: The form of the fall; ``"constant"`` does not fall.
        warmup_steps: The number of steps of the warm-up.
        max_steps: The step at which the fall ends.
        floor: The share of the peak at the end.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup_steps) / max(max_steps - warmup_steps, 1), 1.0)
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    if schedule == "two_stage" and progress >= 0.5:
        falling *= SECOND_STAGE
    return floor + (1 - floor) * falling
