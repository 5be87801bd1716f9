"""The gap between a sparse model and the dense one, over sizes and over tokens a parameter, with error bars.

A gap is the loss of a way (2:4, for example) minus the loss of the dense model of the same family, size, tokens and
seed, in nats; both read the same text in the same order. The noise of a gap is pooled over all places of a family and a
way that have several seeds: a single place has too few.

Two curves are fitted by least squares, each place weighted by its number of seeds:

* a line, ``gap = a + b log10(parameters / 15M) + c log10(tokens a parameter / 20)``;
* a power law, ``gap = A (parameters / 15M)^p (tokens a parameter / 20)^q``, if all gaps are above zero.

Intervals hold 95 % of bootstrap samples: each place gets as many differences from its mean as it has seeds, drawn with
replacement from the differences of all places, which are widened by ``sqrt(n / (n - 1))`` first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.sizes.rates import best_rates, learning_rate
from research.sizes.trials import PARAMETERS, SIZES, Family

Row = dict[str, Any]
Array = NDArray[np.float64]
SAMPLES = 4000


@dataclass(frozen=True)
class Gap:
    """The gap at one size and one number of tokens.

    Args:
        size: The name of the size.
        each: The tokens a parameter, rounded to a half.
        values: The gap of each seed, in nats.
    """

    size: str
    each: float
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(np.mean(self.values))


@dataclass(frozen=True)
class Coefficient:
    """A fitted number with the interval that holds 95 % of the bootstrap samples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True)
class Fit:
    """What was fitted to the gaps of a family and a way.

    Args:
        line: The coefficients of the line by name: ``"at 15M"`` (a), ``"a decade of size"`` (b) and ``"a decade of
            tokens"`` (c). A coefficient without two different places is left out.
        power: The exponents of the power law under the same names; None if a gap is not above zero.
        deviation: The standard deviation of one seed's gap, in nats; None if no place has several seeds.
    """

    line: dict[str, Coefficient]
    power: dict[str, Coefficient] | None
    deviation: float | None


def family_and_way(row: Row) -> tuple[str, str]:
    """Return the family of a row, and its way: the pattern, with the masked decay and the variant."""
    trial = row["trial"]
    decay = " with masked decay" if trial["shrink"] else ""
    variant = f", {trial['variant']}" if trial["variant"] else ""
    return trial["family"], trial["pattern"] + decay + variant


def tokens_each(row: Row) -> float:
    """Return the tokens a parameter of a row, rounded to a half."""
    return round(2 * row["tokens"] / PARAMETERS[row["trial"]["size"]]) / 2


def by_the_rule(row: Row, best: dict[Family, float]) -> bool:
    """Whether a row has the learning rate of the rule and no variant."""
    trial = row["trial"]
    return trial["lr"] == learning_rate(trial["size"], trial["family"], best) and not trial["variant"]


def gaps(rows: Sequence[Row], family: str, way: str) -> list[Gap]:
    """Return the gaps of a family and a way, the smallest size first."""
    dense: dict[tuple[str, float, int], float] = {}
    sparse: dict[tuple[str, float, int], float] = {}
    best = best_rates(rows)
    for row in rows:
        if not by_the_rule(row, best) or row["trial"]["family"] != family:
            continue
        place = row["trial"]["size"], tokens_each(row), row["trial"]["seed"]
        if family_and_way(row)[1] == "8:8":
            dense[place] = row["loss"]
        elif family_and_way(row)[1] == way:
            sparse[place] = row["loss"]
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    for size, each, seed in sorted(sparse.keys() & dense.keys()):
        found[size, each].append(sparse[size, each, seed] - dense[size, each, seed])
    order = list(SIZES)
    return [
        Gap(size, each, tuple(values))
        for (size, each), values in sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    ]


def residuals(places: Sequence[Gap]) -> Array:
    """Return the widened differences of single seeds from the mean of their place."""
    found = [
        (np.array(place.values) - place.mean) * (len(place.values) / (len(place.values) - 1)) ** 0.5
        for place in places
        if len(place.values) > 1
    ]
    return np.concatenate(found) if found else np.zeros(0)


def deviation(places: Sequence[Gap]) -> float | None:
    """Return the standard deviation of one seed's gap, pooled over places; None without a place of several seeds."""
    squares = sum(float(np.sum((np.array(place.values) - place.mean) ** 2)) for place in places)
    freedom = sum(len(place.values) - 1 for place in places)
    return (squares / freedom) ** 0.5 if freedom else None


def fit(places: Sequence[Gap], seed: int = 0) -> Fit | None:
    """Fit both curves to the gaps of a family and a way; None with fewer than three places or without noise."""
    pool = residuals(places)
    if len(places) < 3 or not len(pool):
        return None
    sizes = np.log10([PARAMETERS[place.size] / PARAMETERS["15M"] for place in places])
    tokens = np.log10([place.each / 20 for place in places])
    columns = {"at 15M": np.ones(len(places))}
    if len(set(sizes)) > 1:
        columns["a decade of size"] = sizes
    if len(set(tokens)) > 1:
        columns["a decade of tokens"] = tokens
    design = np.stack(list(columns.values()), axis=1)
    if np.linalg.matrix_rank(design) < design.shape[1] or len(places) <= design.shape[1]:
        columns.pop("a decade of tokens", None)
        design = np.stack(list(columns.values()), axis=1)
    counts = np.array([len(place.values) for place in places])
    means = np.array([place.mean for place in places])
    generator = np.random.default_rng(seed)
    draws = np.stack(
        [means + np.array([generator.choice(pool, n).mean() for n in counts]) for _ in range(SAMPLES)], axis=1
    )
    line = _coefficients(columns, design, counts, means, draws)
    power = None
    if (means > 0).all() and len(columns) > 1:
        # A sample at or below zero has no logarithm; the least gap that is told from zero stands for it.
        floor = float(means.min()) / 20
        power = _coefficients(columns, design, counts, np.log10(means), np.log10(np.maximum(draws, floor)))
        power.pop("at 15M")
    return Fit(line, power, deviation(places))


def _coefficients(
    columns: dict[str, Array], design: Array, counts: Array, means: Array, draws: Array
) -> dict[str, Coefficient]:
    """Solve the weighted least squares for the means, and for each column of ``draws``."""
    root = np.sqrt(counts)[:, None]
    solved = np.linalg.lstsq(design * root, means[:, None] * root, rcond=None)[0][:, 0]
    samples = np.linalg.lstsq(design * root, draws * root, rcond=None)[0]
    low, high = np.quantile(samples, [0.025, 0.975], axis=1)
    return {name: Coefficient(*map(float, each)) for name, *each in zip(columns, solved, low, high, strict=True)}
