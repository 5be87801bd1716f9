"""How many standard deviations a difference has to exceed when the deviation itself is estimated from few runs."""

from __future__ import annotations

import math
from functools import lru_cache

PROBABILITY = 0.95  # of no more than that, either way, where there is no effect


@lru_cache
def t_factor(freedom: int) -> float:
    """The two-sided quantile of Student's t: 12.7 for one degree of freedom, 1.96 for many.

    For integer degrees the probability has a closed form (Abramowitz and Stegun, 26.7.3 and 26.7.4); it grows with t,
    so bisection finds the quantile.

    Args:
        freedom: Degrees of freedom, at least 1.
    """
    low, high = 0.0, math.pi / 2  # of atan(t / sqrt(freedom))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < PROBABILITY else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """Probability of ``abs(t)`` below ``sqrt(freedom) * tan(angle)``."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, freedom - 1, 2):  # cos + 2/3 cos^3 + ..., or 1 + 1/2 cos^2 + 1 3/(2 4) cos^4 + ...
        term *= cosine * cosine * (k - 1) / k
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))


def combined(deviations: list[tuple[float, int]]) -> tuple[float, int]:
    """Standard deviation of a sum of independent estimates, and its degrees of freedom (Welch and Satterthwaite).

    Args:
        deviations: Standard deviation and degrees of freedom of each.

    Returns:
        The same of the sum; degrees are rounded down.
    """
    variance = sum(deviation**2 for deviation, _ in deviations)
    fourth = sum(deviation**4 / freedom for deviation, freedom in deviations)
    degrees = variance**2 / fourth if fourth else min(freedom for _, freedom in deviations)
    return math.sqrt(variance), max(1, math.floor(degrees + 1e-9))
