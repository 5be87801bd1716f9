"""Compare every way to train, at its own best learning rate, with dense training in the same way."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

from research.reproduce.grid import Grid
from research.reproduce.tables import DASH, FAMILIES, Cell, Results, change, density, number, table

# The goal for the perplexity at a pattern, as a multiple of the perplexity of dense ternary.
GOALS = {"2:4": 1.01, "2:8": 1.10}
# Factors that change nothing in a model without masks.
SPARSE_ONLY = ("mask_source", "gradient", "refresh_interval", "stale_gradient", "freeze_after", "masked_decay", "ramp")
NOTE = (
    "A way's best rate has the lowest mean loss among its rates with the most seeds; one with fewer seeds is taken "
    "only if it is better by more than the noise, so that no lucky run wins. The best of several single runs, or the "
    "first of many ways, looks better than it is. Against the method: at the same pattern, with the noise of that. "
    "Against dense training in the same way at its own best rate, where that was run, otherwise as the method is (the "
    "verdict says so). Where there is a goal, the verdict is on the goal. The goals, no more than "
    f"{' and '.join(f'{100 * (goal - 1):.0f} % at {pattern}' for pattern, goal in GOALS.items())} above dense ternary, "
    "are the aims that this project set itself for equal tokens, each at its own best learning rate."
)


def at_best_rates(results: Results, grid: Grid | None = None) -> str:
    """Return a table of the patterns that have a goal, and of those where something was varied.

    Args:
        results: The lines of results.
        grid: The grid, to explain the names of its choices; None leaves the explanation out.
    """
    rows = []
    for family in FAMILIES:
        lines = [line for line in results.lines if line["factors"]["family"] == family]
        wanted = {line["factors"]["pattern"] for line in lines if line["varied"]}
        wanted |= set(GOALS) if family == "ternary" else set()
        ways = {_name(line["varied"]): line["varied"] for line in lines}
        if wanted:
            for pattern in sorted(wanted | {"8:8"}, key=lambda text: (-density(text), text)):
                rows += _pattern(results, family, pattern, ways)
    header = ("family", "pattern", "way", "learning rate", "rates run", "perplexity", "against the method", "seeds")
    columns = (*header, "against dense", "noise", "goal", "verdict")
    if not rows:
        return "Not run."
    choices = [] if grid is None else _choices(results, grid)
    named = f"The names above, and what they set in the recipe:\n\n{table(('name', 'sets'), choices)}"
    return "\n\n".join([table(columns, rows), *([named] if choices else []), NOTE])


def _choices(results: Results, grid: Grid) -> list[list[str]]:
    """Return a row for each named choice of the grid that has results."""
    # The id holds a digest of the recipe. In lines of another grid the same name may have set something else.
    done = {line["id"] for line in results.lines}
    varied = [run.varied for run in grid.runs() if run.id in done]
    rows = []
    for factor, choices in grid.factors.items():
        for choice, keys in choices.items() if isinstance(choices, dict) else ():
            if any(each.get(factor) == choice for each in varied):
                values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in keys.items()}
                rows.append([_name({factor: choice}), ", ".join(f"{key} {value}" for key, value in values.items())])
    return rows


def _pattern(results: Results, family: str, pattern: str, ways: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the rows of one pattern, the best first."""
    rows = []
    plain = results.sweep(family, pattern, {})
    method = plain[results.best(plain)] if plain else None
    for name, varied in ways.items():
        sweep = results.sweep(family, pattern, varied)
        if not sweep:
            continue
        rate = results.best(sweep)
        cell = sweep[rate]
        gain = results.compare(cell, method) if method is not None and varied else None
        row = [family, pattern, name, f"{rate:g}", str(len(sweep)), number(cell.perplexity)]
        row.append(DASH if gain is None else f"{change(gain.ratio)} ({gain.noise})")
        rows.append((cell.loss, [*row, *_against_dense(results, family, pattern, varied, cell, _single(sweep, cell))]))
    return [row for _, row in sorted(rows, key=lambda each: each[0])]


def _against_dense(
    results: Results, family: str, pattern: str, varied: dict[str, Any], cell: Cell, single: str
) -> list[str]:
    """Return the cells for seeds, change, noise, goal and verdict."""
    if pattern == "8:8":
        return [str(len(cell.runs)), DASH, DASH, DASH, single or DASH]
    same = {key: value for key, value in varied.items() if not _sparse_only(key, value)}
    remarks = [single] if single else []
    dense = results.sweep(family, "8:8", same)
    if not dense and same:
        dense = results.sweep(family, "8:8", {})
        remarks.append(f"dense without {_name(same)}")
    if not dense:
        return [str(len(cell.runs)), DASH, DASH, DASH, "no dense run"]
    reference = dense[results.best(dense)]
    if single_dense := _single(dense, reference):
        remarks.append(f"dense: {single_dense}")
    compared = results.compare(cell, reference)
    goal = GOALS.get(pattern) if family == "ternary" else None
    verdict = compared.verdict()
    if goal is not None:
        judged = replace(compared, difference=compared.difference - math.log(goal))
        verdict = judged.verdict(words=("reached", "not reached"), below="goal within the noise")
    said = verdict + (f" ({'; '.join(remarks)})" if remarks else "")
    seeds = f"{len(cell.runs)} against {len(reference.runs)}"
    return [seeds, change(compared.ratio), compared.noise, change(goal), said]


def _single(sweep: dict[float, Cell], chosen: Cell) -> str:
    """Return a remark if the chosen cell is a single run, else an empty text."""
    if len(chosen.runs) > 1:
        return ""
    alone = all(len(cell.runs) == 1 for cell in sweep.values())
    return f"best of {len(sweep)} single runs" if alone and len(sweep) > 1 else "one run"


def _sparse_only(key: str, value: Any) -> bool:
    # Without a mask, gamma over kept or masked weights is gamma over all. Over nonzero weights it is another gamma.
    return key in SPARSE_ONLY or (key == "gamma_over" and value in ("kept", "masked"))


def _name(varied: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in sorted(varied.items())) or "the method"
