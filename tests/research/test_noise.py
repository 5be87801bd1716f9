"""Student's t agrees with printed tables."""

import random
from statistics import fmean, stdev

import pytest

from research.reproduce.noise import combined, t_factor


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (8, 2.306), (9, 2.262), (30, 2.042), (100_000, 1.96)],
)
def test_quantiles(freedom, expected):
    assert t_factor(freedom) == pytest.approx(expected, abs=6e-4)


def test_three_runs_against_three_cross_it_once_in_twenty():
    draw = random.Random(0)
    trials, crossed = 20_000, 0
    for _ in range(trials):
        a, b = ([draw.gauss(0, 1) for _ in range(3)] for _ in range(2))
        deviation = ((stdev(a) ** 2 + stdev(b) ** 2) / 2 * 2 / 3) ** 0.5
        crossed += abs(fmean(a) - fmean(b)) > t_factor(4) * deviation
    assert crossed / trials == pytest.approx(0.05, abs=0.006)


def test_combined():
    assert combined([(3.0, 8), (4.0, 8)]) == (5.0, 14)  # 625 / ((81 + 256) / 8) = 14.8
    assert combined([(1.0, 8), (1.0, 8)])[1] == 16
    assert combined([(1.0, 2), (1e-6, 8)]) == (pytest.approx(1), 2)
    assert combined([(0.0, 3), (0.0, 5)]) == (0, 3)
