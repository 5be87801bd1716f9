"""The learning rate of each size, by a rule: tuned at the smallest size and at 15M, a power of the width in between.

At 15M the rates are those of ``research/reproduce``, which tried several in 119 trainings. At 2M the study tries four
of them for each family, for the dense model and for 2:4. The rule is ``lr = lr(15M) * (512 / d_model) ** p``, where p
is such that the best rate at 2M comes out. p = 1 would be the rule of muP for matrices (arXiv 2203.03466).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from research.sizes.trials import SIZES, Family, Trial, tokens_of

AT_15M: dict[Family, float] = {"ternary": 4e-3, "bf16": 2e-3}
SMALLEST = "2M"
FACTORS = (1.0, 2.0, 4.0, 8.0)  # of the rate at 15M, which are tried at 2M
EACH = 10.0  # tokens a parameter of the sweep
PATTERNS = ("8:8", "2:4")
# The exponent of the rule if the sweep has no result.
UNKNOWN = 0.5


def sweep() -> list[Trial]:
    """Return the trials that choose the learning rate at the smallest size; the likeliest rates come first."""
    return [
        Trial(SMALLEST, family, pattern, tokens_of(SMALLEST, EACH), lr=AT_15M[family] * factor)
        for factor in sorted(FACTORS, key=lambda factor: abs(math.log2(factor / 2.5)))
        for family in AT_15M
        for pattern in PATTERNS
    ]


def is_complete(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether all trials of the sweep are done."""
    return {trial.name for trial in sweep()} <= {row["name"] for row in rows}


def best_rates(rows: Sequence[dict[str, Any]]) -> dict[Family, float]:
    """Return the rate at the smallest size whose mean loss of the dense model and 2:4 is the lowest, by family.

    Rates for which one of the two models is not there do not count. A family without any has the rate of the rule with
    the exponent :data:`UNKNOWN`.
    """
    wanted = {trial.name for trial in sweep()}
    losses: dict[tuple[Family, float], list[float]] = defaultdict(list)
    for row in rows:
        if row["name"] in wanted:
            losses[row["trial"]["family"], row["trial"]["lr"]].append(row["loss"])
    found: dict[Family, float] = {}
    for family, usual in AT_15M.items():
        means = {lr: fmean(each) for (of, lr), each in losses.items() if of == family and len(each) == len(PATTERNS)}
        width = SIZES["15M"].d_model / SIZES[SMALLEST].d_model
        means = {lr: mean for lr, mean in means.items() if math.isfinite(mean)}  # A high rate may diverge.
        found[family] = min(means, key=lambda lr: means[lr]) if means else usual * width**UNKNOWN
    return found


def learning_rate(size: str, family: Family, best: dict[Family, float]) -> float:
    """Return the learning rate of the rule.

    Args:
        size: The name of the size.
        family: The family.
        best: The best rates at the smallest size, of :func:`best_rates`.
    """
    ratio = SIZES["15M"].d_model / SIZES[size].d_model
    exponent = math.log(best[family] / AT_15M[family]) / math.log(SIZES["15M"].d_model / SIZES[SMALLEST].d_model)
    return float(f"{AT_15M[family] * ratio**exponent:.3g}")


def resolve(trial: Trial, best: dict[Family, float]) -> Trial:
    """Return a trial with the learning rate of the rule, unless it has its own."""
    return trial if trial.lr else replace(trial, lr=learning_rate(trial.size, trial.family, best))
