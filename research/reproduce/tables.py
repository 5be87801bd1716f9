"""Gather lines of results into cells, compare cells, and write Markdown tables.

A cell holds the runs that differ only in their seed. Cells are compared in log perplexity (nats), where effects of the
same relative size are equally large.

The noise of one run is the standard deviation of its loss between seeds. It is pooled over all cells of a family and
pattern that have several seeds, because some patterns train less steadily than others. A pattern with less than two
degrees of freedom takes the noise of its family, without the runs of the pattern that it is compared with: those runs
already give the noise of the other side. A difference of two means counts if it exceeds its standard deviation times
the quantile of Student's t for the degrees of freedom.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from research.reproduce.noise import combined, t_factor

Line = dict[str, Any]
FAMILIES = ("bf16-sparse", "ternary")
DASH = "-"
# The least degrees of freedom for an estimate. With one, Student's t asks for 12.7 standard deviations.
LEAST_FREEDOM = 2


@dataclass(frozen=True)
class Cell:
    """Runs that differ only in their seed.

    Attributes:
        runs: The lines of the runs.
    """

    runs: tuple[Line, ...]

    @property
    def factors(self) -> dict[str, Any]:
        """The factors of the runs. Only the seed differs between the runs."""
        factors: dict[str, Any] = self.runs[0]["factors"]
        return factors

    @property
    def losses(self) -> list[float]:
        """The validation losses, in nats per token."""
        return [line["validation"]["loss"] for line in self.runs]

    @property
    def loss(self) -> float:
        """The mean validation loss, in nats per token."""
        return fmean(self.losses)

    @property
    def perplexity(self) -> float:
        """The perplexity of the mean loss."""
        return math.exp(self.loss)

    def mean(self, *keys: str) -> float | None:
        """Return the mean of the value under ``keys`` in the lines, or None if a line lacks it."""
        values = []
        for line in self.runs:
            value: Any = line
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, list):  # The value of a curve is its last one.
                value = value[-1][1] if value else None
            if value is None:
                return None
            values.append(float(value))
        return fmean(values)

    def spread(self, *keys: str) -> float | None:
        """Return the largest value under ``keys`` minus the smallest, over seeds; None for a single run."""
        each = [Cell((line,)).mean(*keys) for line in self.runs]
        known = [value for value in each if value is not None]
        return max(known) - min(known) if len(known) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """The comparison of two cells.

    Attributes:
        difference: The difference of the mean losses, in nats.
        deviation: The standard deviation of the difference; None if no cell has several seeds.
        freedom: The degrees of freedom of the estimate of the deviation.
    """

    difference: float
    deviation: float | None
    freedom: int = 0

    @property
    def threshold(self) -> float | None:
        """The bound that the difference has to exceed to be more than noise; None if the noise is not known."""
        return None if self.deviation is None else t_factor(self.freedom) * self.deviation

    @property
    def ratio(self) -> float:
        """The ratio of the perplexities."""
        return math.exp(self.difference)

    def less(self, other: Comparison) -> Comparison:
        """Return by how much this difference exceeds another one, which is of other runs."""
        difference = self.difference - other.difference
        if self.deviation is None or other.deviation is None:
            return Comparison(difference, None)
        return Comparison(difference, *combined([(self.deviation, self.freedom), (other.deviation, other.freedom)]))

    @property
    def noise(self) -> str:
        """The threshold as a change in per cent."""
        return DASH if self.threshold is None else f"±{100 * math.expm1(self.threshold):.1f} %"

    def verdict(
        self,
        reported: float | None = None,
        words: tuple[str, str] = ("better", "worse"),
        below: str = "below the noise",
    ) -> str:
        """Return in words whether the difference is more than noise, and whether it agrees with the paper.

        Args:
            reported: The ratio that the paper reports, or None.
            words: The words for a difference below zero and for one above.
            below: The words for a difference that is no more than noise.
        """
        if self.threshold is None:
            return "one seed: noise not known"
        counts = abs(self.difference) > self.threshold
        said = words[self.difference > 0] if counts else below
        if reported is None:
            return said
        theirs = math.log(reported)
        if abs(self.difference - theirs) <= self.threshold:
            return f"{said}, agrees with the paper"
        if counts and self.difference * theirs < 0:
            return f"{said}, against the paper"
        # If our interval holds zero and not the paper's figure, our effect is the smaller one.
        smaller = not counts or abs(self.difference) < abs(theirs)
        return f"{said}, {'smaller' if smaller else 'larger'} than the paper's"


@dataclass(frozen=True)
class Noise:
    """How much the loss of one run varies between seeds.

    Attributes:
        deviation: The estimated standard deviation, in nats.
        freedom: The degrees of freedom of the estimate.
        pattern: The pattern of the runs that give the estimate; None for runs of several patterns.
    """

    deviation: float
    freedom: int
    pattern: str | None


def _pooled(lines: Sequence[Line], pattern: str | None) -> Noise | None:
    cells: dict[str, list[float]] = {}
    for line in lines:
        # As in Results.cell(): older lines lack the factors that a grid gained later.
        key = repr((line["factors"]["pattern"], line["factors"]["learning_rate"], sorted(line["varied"].items())))
        cells.setdefault(key, []).append(line["validation"]["loss"])
    squares = sum(sum((loss - fmean(losses)) ** 2 for loss in losses) for losses in cells.values())
    freedom = sum(len(losses) - 1 for losses in cells.values())
    return Noise(math.sqrt(squares / freedom), freedom, pattern) if freedom else None


class Results:
    """The lines that can be compared: those of the corpus, model and length that most lines have.

    Args:
        lines: All lines.
    """

    def __init__(self, lines: Sequence[Line]) -> None:
        keys = [(line["data"]["fingerprint"], line["parameters"], line["steps"], line["tokens"]) for line in lines]
        self.common = Counter(keys).most_common(1)[0][0]
        self.lines = [line for line, key in zip(lines, keys, strict=True) if key == self.common]
        self.left_out = len(lines) - len(self.lines)
        self.learning_rates = {family: rate for family in FAMILIES if (rate := self._usual_rate(family)) is not None}

    def _usual_rate(self, family: str) -> float | None:
        """Return the learning rate of a family's comparisons: the rate of most runs with nothing varied.

        Variants do not count where there are other runs: a variant that is tried at another rate must not move every
        table.
        """
        lines = [line for line in self.lines if line["factors"]["family"] == family]
        plain = [line for line in lines if not line["varied"]]
        rates = Counter(line["factors"]["learning_rate"] for line in plain or lines)
        return rates.most_common(1)[0][0] if rates else None

    def cell(
        self, family: str, pattern: str, varied: dict[str, Any] | None = None, rate: float | None = None
    ) -> Cell | None:
        """Return the runs of a family and pattern with only ``varied`` not at its default; None if there is no run."""
        rate = self.learning_rates.get(family) if rate is None else rate
        found = [
            line
            for line in self.lines
            if (line["factors"]["family"], line["factors"]["pattern"]) == (family, pattern)
            and line["factors"]["learning_rate"] == rate
            and line["varied"] == (varied or {})
        ]
        return Cell(tuple(sorted(found, key=lambda line: line["factors"]["seed"]))) if found else None

    def sweep(self, family: str, pattern: str, varied: dict[str, Any] | None = None) -> dict[float, Cell]:
        """Return the cells at every learning rate that was run, the lowest rate first."""
        cells = {rate: self.cell(family, pattern, varied, rate) for rate in self.values("learning_rate", family)}
        return {rate: cell for rate, cell in cells.items() if cell is not None}

    def best(self, sweep: dict[float, Cell]) -> float:
        """Return the learning rate of the lowest mean loss among the rates with the most seeds.

        A rate with fewer seeds has to be better by more than the noise. Otherwise the luckiest of many single runs
        would win.
        """
        chosen: float | None = None
        for seeds in sorted({len(cell.runs) for cell in sweep.values()}, reverse=True):
            rate = min((rate for rate in sweep if len(sweep[rate].runs) == seeds), key=lambda rate: sweep[rate].loss)
            if chosen is None:
                chosen = rate
                continue
            compared = self.compare(sweep[rate], sweep[chosen])
            if compared.threshold is not None and compared.difference < -compared.threshold:
                chosen = rate
        assert chosen is not None, "a sweep of nothing"
        return chosen

    def noise(self, family: str, pattern: str | None = None) -> Noise | None:
        """Estimate how much the loss of one run varies between seeds.

        Args:
            family: The family of the runs.
            pattern: The pattern of the runs. If it has too few runs, or is None, the whole family counts.

        Returns:
            The noise; None if no cell has several seeds.
        """
        lines = [line for line in self.lines if line["factors"]["family"] == family]
        of_pattern = [line for line in lines if line["factors"]["pattern"] == pattern]
        found = _pooled(of_pattern, pattern)
        return found if found is not None and found.freedom >= LEAST_FREEDOM else _pooled(lines, None)

    def compare(self, cell: Cell, reference: Cell) -> Comparison:
        """Compare two cells of one family."""
        difference = cell.loss - reference.loss
        family = cell.factors["family"]
        noises = self._noises(family, cell.factors["pattern"], reference.factors["pattern"])
        if noises is None:
            return Comparison(difference, None)
        deviations = [
            (noise.deviation / math.sqrt(len(each.runs)), noise.freedom)
            for noise, each in zip(noises, (cell, reference), strict=True)
        ]
        if noises[0] == noises[1]:  # This is one estimate, not two.
            return Comparison(difference, math.hypot(*(deviation for deviation, _ in deviations)), noises[0].freedom)
        return Comparison(difference, *combined(deviations))

    def _noises(self, family: str, *patterns: str) -> list[Noise] | None:
        """Return the noise of two patterns: either one estimate for both, or two from runs with nothing in common."""
        found = [self.noise(family, pattern) for pattern in patterns]
        noises = [noise for noise in found if noise is not None]
        if len(noises) < len(found):
            return None
        own = {noise.pattern for noise in noises} - {None}
        if len(own) != 1 or noises[0] == noises[1]:  # Both have their own estimate, or both share one.
            return noises
        others = [
            line for line in self.lines if line["factors"]["family"] == family and line["factors"]["pattern"] not in own
        ]
        rest = _pooled(others, None)
        if rest is not None and rest.freedom >= LEAST_FREEDOM:
            return [rest if noise.pattern is None else noise for noise in noises]
        # Nearly all runs of the family have the one pattern, so there is no second estimate.
        return [noise for noise in noises if noise.pattern is None] * len(noises)

    def values(self, factor: str, family: str | None = None) -> list[Any]:
        """Return the values of a factor that occur."""
        found = {
            line["factors"].get(factor) for line in self.lines if family is None or line["factors"]["family"] == family
        }
        return sorted((value for value in found if value is not None), key=lambda v: (isinstance(v, str), v))

    def patterns(self) -> list[str]:
        """Return the patterns that occur, the densest first."""
        return sorted(self.values("pattern"), key=lambda text: (-density(text), text))


def density(pattern: str) -> float:
    """Return N / M."""
    n, m = pattern.split(":")
    return int(n) / int(m)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with ``digits`` digits after the point; a dash for None."""
    return DASH if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share as per cent; a dash for None."""
    return DASH if value is None else f"{100 * value:.{digits}f} %"


def change(ratio: float | None) -> str:
    """Return a ratio of perplexities as a change in per cent, with its sign."""
    return DASH if ratio is None else f"{100 * (ratio - 1):+.1f} %"
