"""The gap between a sparse model and the dense one, over sizes and over tokens a parameter, with error bars.

A gap is the loss of a way (2:4, for example) minus the loss of the dense model of the same family, size, tokens and
seed, in nats. A way is a pattern, with or without masked decay. Both models read the same text in the same order. (A
machine with other packages has another text, and a gap between models of two texts means nothing.)

The noise of one seed's gap differs much between sizes, so each size has its own noise. There are four estimates: from
the seeds of the way at this size; from the seeds of all ways of the family at this size; at 15M from the 119 runs of
``research/reproduce``; and from the seeds of both families at this size. The first estimate with at least four degrees
of freedom counts. With fewer, three seeds that happen to agree would outweigh all other places in a fit. If no estimate
has four, the one with the most degrees of freedom counts. If none has two, the noise of the next smaller size counts.

Two curves are fitted by least squares, each place weighted by the inverse of its variance:

* a line, ``gap = a + b log10(parameters / 15M) + c log10(tokens a parameter / 10)``;
* a power law, ``gap = A (parameters / 15M)^p (tokens a parameter / 10)^q``, if all gaps are above zero.

Intervals hold 95 % of bootstrap samples. In a sample each place moves by its noise, times a draw of Student's t for the
degrees of freedom: places have too few seeds to draw from the seeds themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.reproduce.noise import combined, t_factor
from research.reproduce.results import read_results
from research.reproduce.tables import LEAST_FREEDOM, Results
from research.sizes.rates import EACH, best_rates, learning_rate
from research.sizes.trials import PARAMETERS, SIZES, Family

Row = dict[str, Any]
Array = NDArray[np.float64]
SAMPLES = 4000
ENOUGH_FREEDOM = 4
EARLIER = Path(__file__).parents[1] / "reproduce" / "results.jsonl"


@dataclass(frozen=True)
class Noise:
    """How much one seed's gap varies.

    Args:
        deviation: The standard deviation, in nats.
        freedom: The degrees of freedom of the estimate.
        source: Where the estimate comes from, in a few words.
    """

    deviation: float
    freedom: int
    source: str


@dataclass(frozen=True)
class Gap:
    """The gap at one size and one number of tokens.

    Args:
        size: The name of the size.
        each: The tokens a parameter, rounded to a half.
        values: The gap of each seed, in nats.
        noise: The noise of one seed's gap; None if it is not known.
    """

    size: str
    each: float
    values: tuple[float, ...]
    noise: Noise | None = None

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float | None:
        """The standard deviation of the mean, in nats."""
        return None if self.noise is None else self.noise.deviation / len(self.values) ** 0.5

    @property
    def error(self) -> float | None:
        """Half of the 95 % interval of the mean, in nats."""
        return None if self.noise is None else t_factor(self.noise.freedom) * self.deviation  # type: ignore[operator]


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
    """

    line: dict[str, Coefficient]
    power: dict[str, Coefficient] | None


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
    """Return the gaps of a family and a way with their noise, the smallest size first."""
    ways = {found for found in map(family_and_way, rows) if found[1] != "8:8"}
    all_ways = {found: _without_noise(rows, *found) for found in ways}
    places = all_ways.get((family, way), [])
    return [replace(place, noise=noise(all_ways, family, way, place.size)) for place in places]


def _without_noise(rows: Sequence[Row], family: str, way: str) -> list[Gap]:
    dense: dict[tuple[str, float, int, int], float] = {}
    sparse: dict[tuple[str, float, int, int], float] = {}
    best = best_rates(rows)
    for row in rows:
        if not by_the_rule(row, best) or row["trial"]["family"] != family:
            continue
        place = row["trial"]["size"], tokens_each(row), row["trial"]["seed"], row["text_tokens"]
        if family_and_way(row)[1] == "8:8":
            dense[place] = row["loss"]
        elif family_and_way(row)[1] == way:
            sparse[place] = row["loss"]
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    for place in sorted(sparse.keys() & dense.keys()):
        found[place[:2]].append(sparse[place] - dense[place])
    order = list(SIZES)
    return [
        Gap(size, each, tuple(values))
        for (size, each), values in sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    ]


def noise(all_ways: dict[tuple[str, str], list[Gap]], family: str, way: str, size: str) -> Noise | None:
    """Return the noise of one seed's gap at a size, as the docstring of this module says.

    Args:
        all_ways: The gaps of both families by family and way.
        family: The family.
        way: The way.
        size: The name of the size.
    """
    here = {found: [place for place in places if place.size == size] for found, places in all_ways.items()}
    of_family = [place for found, places in here.items() for place in places if found[0] == family]
    estimates = [
        _pooled(here.get((family, way), []), f"{way} at {size}"),
        _pooled(of_family, f"all patterns at {size}"),
        earlier_noise(family, way.partition(" ")[0].rstrip(",")) if size == "15M" else None,
        _pooled([place for places in here.values() for place in places], f"both families at {size}"),
    ]
    if known := [estimate for estimate in estimates if estimate is not None]:
        sure = [estimate for estimate in known if estimate.freedom >= ENOUGH_FREEDOM]
        return sure[0] if sure else max(known, key=lambda estimate: estimate.freedom)
    before = list(SIZES).index(size) - 1
    return noise(all_ways, family, way, list(SIZES)[before]) if before >= 0 else None


def _pooled(places: Sequence[Gap], source: str) -> Noise | None:
    squares = sum(float(np.sum((np.array(place.values) - place.mean) ** 2)) for place in places)
    freedom = sum(len(place.values) - 1 for place in places)
    return Noise((squares / freedom) ** 0.5, freedom, source) if freedom >= LEAST_FREEDOM else None


@cache
def earlier_noise(family: str, pattern: str) -> Noise | None:
    """Return the noise of a gap at 15M from ``research/reproduce``, where seeds have other texts and are not paired."""
    results = Results(read_results(EARLIER))
    name = {"bf16": "bf16-sparse"}.get(family, family)
    parts = [results.noise(name, of) for of in ("8:8", pattern)]
    if None in parts:
        return None
    return Noise(*combined([(part.deviation, part.freedom) for part in parts if part]), "the runs of reproduction.md")


def family_differences(rows: Sequence[Row], way: str) -> list[Gap]:
    """Return the gap of BF16 minus the gap of ternary models, at each place where both are known.

    If both families share one estimate of the noise, the difference has the degrees of freedom of this estimate.

    Args:
        rows: The lines of results.
        way: The way, for example ``"2:4"``.
    """
    ternary = {(place.size, place.each): place for place in gaps(rows, "ternary", way)}
    found = []
    for bf16 in gaps(rows, "bf16", way):
        other = ternary.get((bf16.size, bf16.each))
        if other is None:
            continue
        noise = None
        if bf16.noise is not None and other.noise is not None:
            parts = [(place.deviation, place.noise.freedom) for place in (bf16, other)]  # type: ignore[union-attr]
            deviation, freedom = combined(parts)  # type: ignore[arg-type]
            if bf16.noise == other.noise:
                freedom = bf16.noise.freedom
            noise = Noise(deviation, freedom, f"{bf16.noise.source}, {freedom} degrees of freedom")
        found.append(Gap(bf16.size, bf16.each, (bf16.mean - other.mean,), noise))
    return found


def fit(places: Sequence[Gap], seed: int = 0) -> Fit | None:
    """Fit both curves to the gaps of a family and a way; None for fewer than three places, or for unknown noise."""
    if len(places) < 3 or any(place.noise is None for place in places):
        return None
    sizes = np.log10([PARAMETERS[place.size] / PARAMETERS["15M"] for place in places])
    tokens = np.log10([place.each / EACH for place in places])
    columns = {"at 15M": np.ones(len(places))}
    if len(set(sizes)) > 1:
        columns["a decade of size"] = sizes
    if len(set(tokens)) > 1:
        columns["a decade of tokens"] = tokens
    design = np.stack(list(columns.values()), axis=1)
    if np.linalg.matrix_rank(design) < design.shape[1] or len(places) <= design.shape[1]:
        columns.pop("a decade of tokens", None)
        design = np.stack(list(columns.values()), axis=1)
    means = np.array([place.mean for place in places])
    deviations = np.array([place.deviation for place in places], dtype=float)
    generator = np.random.default_rng(seed)
    t = np.stack([generator.standard_t(place.noise.freedom, SAMPLES) for place in places])  # type: ignore[union-attr]
    draws = means[:, None] + deviations[:, None] * t
    line = _coefficients(columns, design, deviations, means, draws)
    power = None
    if (means > 0).all() and len(columns) > 1:
        # A sample at or below zero has no logarithm; the least gap that is told from zero stands for it.
        floor = float(means.min()) / 20
        logs = np.log10(np.maximum(draws, floor))
        power = _coefficients(columns, design, deviations / means, np.log10(means), logs)
        power.pop("at 15M")
    return Fit(line, power)


def _coefficients(
    columns: dict[str, Array], design: Array, deviations: Array, means: Array, draws: Array
) -> dict[str, Coefficient]:
    """Solve the weighted least squares for the means, and for each column of ``draws``."""
    root = 1 / deviations[:, None]
    solved = np.linalg.lstsq(design * root, means[:, None] * root, rcond=None)[0][:, 0]
    samples = np.linalg.lstsq(design * root, draws * root, rcond=None)[0]
    low, high = np.quantile(samples, [0.025, 0.975], axis=1)
    return {name: Coefficient(*map(float, each)) for name, *each in zip(columns, solved, low, high, strict=True)}
