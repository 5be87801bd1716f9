"""How large a difference must be to count, in standard deviations that are estimated from few runs."""

from __future__ import annotations

import math
from functools import lru_cache

# The probability that a difference stays below the bound, up or down, where there is no effect.
PROBABILITY = 0.95


@lru_cache
def t_factor(freedom: int) -> float:
    """Return the two-sided quantile of Student's t: 12.7 for one degree of freedom, 1.96 for many.

    SciPy has this function, but SciPy is no dependency of this project, and 25 lines do not justify one. For integer
    degrees of freedom the probability has a closed form (Abramowitz and Stegun, 26.7.3 and 26.7.4). The probability
    grows with t, so bisection finds the quantile.

    Args:
        freedom: The degrees of freedom, at least 1.
    """
    low, high = 0.0, math.pi / 2  # Bounds of atan(t / sqrt(freedom)).
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < PROBABILITY else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """Return the probability of ``abs(t)`` below ``sqrt(freedom) * tan(angle)``."""
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
    """Return the standard deviation of a sum of independent estimates, and its degrees of freedom.

    The degrees of freedom are those of Welch and Satterthwaite.

    Args:
        deviations: The standard deviation and the degrees of freedom of each estimate.

    Returns:
        The standard deviation of the sum, and its degrees of freedom, rounded down.
    """
    variance = sum(deviation**2 for deviation, _ in deviations)
    fourth = sum(deviation**4 / freedom for deviation, freedom in deviations)
    degrees = variance**2 / fourth if fourth else min(freedom for _, freedom in deviations)
    return math.sqrt(variance), max(1, math.floor(degrees + 1e-9))
