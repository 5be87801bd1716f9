"""Draw the results as PNG files. Dashed lines and open marks show what the paper reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from research.reproduce import paper
from research.reproduce.tables import FAMILIES, Cell, Results, change, density
from research.reproduce.variants import ABLATIONS, BASES, FLIPS, RAMPS
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.core.install import how_to_install

COLOURS = {"bf16-sparse": "#4c72b0", "ternary": "#c44e52"}
Figure = Any  # matplotlib.figure.Figure, which is imported only to draw.


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """Draw the plots that there are results for.

    Args:
        results: The lines of results.
        folder: The folder to write the files to.

    Returns:
        The files by name.

    Raises:
        ConfigError: If matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError(f"plots need matplotlib: {how_to_install('plots')}, or pass --plots false")
    from matplotlib.figure import Figure as MakeFigure

    folder.mkdir(parents=True, exist_ok=True)
    drawers: dict[str, Callable[[Results, Figure], bool]] = {
        "perplexity": perplexity,
        "flip_rate": flip_rate,
        "ablations": ablations,
        "ramps": ramps,
    }
    files = {}
    for name, drawer in drawers.items():
        figure = MakeFigure(figsize=(10, 4), layout="constrained")
        if drawer(results, figure):
            files[name] = folder / f"reproduction_{name}.png"
            figure.savefig(files[name], dpi=110)
    return files


def perplexity(results: Results, figure: Figure) -> bool:
    """Draw the perplexity against N / M, absolute and relative to dense."""
    absolute, relative = figure.subplots(1, 2)
    drawn = False
    for family in FAMILIES:
        cells = {p: cell for p in results.patterns() if (cell := results.cell(family, p))}
        ours = {p: cell.perplexity for p, cell in cells.items()}
        drawn |= bool(ours)
        _line(absolute, ours, family)
        for p, cell in cells.items():
            absolute.scatter([density(p)] * len(cell.runs), [math.exp(x) for x in cell.losses], s=8, c=COLOURS[family])
        if "8:8" in ours:
            _line(relative, {p: value / ours["8:8"] for p, value in ours.items()}, family)
        reported = paper.RELATIVE[family]
        points = sorted((density(p), value) for p, value in reported.items())
        relative.plot(*zip(*points, strict=True), "--", c=COLOURS[family], alpha=0.5, label=f"{family}, paper (0.5B)")
    for axes, what in ((absolute, "perplexity"), (relative, "perplexity relative to dense")):
        axes.set(xlabel="N / M (2:4 as an open square)", ylabel=what)
        axes.invert_xaxis()
        axes.legend()
    return drawn


def _line(axes: Any, values: dict[str, float], family: str) -> None:
    if not values:
        return
    points = sorted((density(p), value) for p, value in values.items() if p != "2:4")
    axes.plot([x for x, _ in points], [y for _, y in points], "o-", ms=4, c=COLOURS[family], label=family)
    if "2:4" in values:
        axes.plot([0.5], [values["2:4"]], "s", mfc="none", c=COLOURS[family])


def flip_rate(results: Results, figure: Figure) -> bool:
    """Draw the flip rate of masks over time: by pattern, and for the ablations that are said to freeze or oscillate."""
    panels = figure.subplots(1, 2)
    left = {f"{f} {p}": results.cell(f, p) for f in FAMILIES for p in BASES}
    right = {name: results.cell("ternary", "6:8", varied) for name, varied in FLIPS.items()}
    drawn = False
    for axes, cells, title in zip(panels, (left, right), ("by pattern", "ternary 6:8"), strict=True):
        for label, cell in cells.items():
            curve = cell.runs[0]["sparsity"].get("flip_rate_mask") if cell else None
            if curve:
                axes.plot([step for step, _ in curve], [100 * rate for _, rate in curve], label=label)
                drawn = True
        axes.set(xlabel="step", ylabel="mask bits changed since the last look, %", title=title)
        axes.set_yscale("log" if axes.lines else "linear")
        if axes.lines:
            axes.legend()
    return drawn


def ablations(results: Results, figure: Figure) -> bool:
    """Draw the change of perplexity as bars, at each of ``BASES``."""
    panels = figure.subplots(1, len(BASES))
    drawn = False
    for axes, pattern in zip(panels, BASES, strict=True):
        base = results.cell("ternary", pattern)
        rows: list[tuple[str, float, float, float | None]] = []
        for name, value in ABLATIONS:
            cell = results.cell("ternary", pattern, {name: value})
            if cell and base:
                compared = results.compare(cell, base)
                reported = paper.ABLATIONS.get((name, value)) if pattern == "6:8" else None
                share = None if reported is None else 100 * (reported / paper.SPARSE_BITNET - 1)
                noise = 100 * math.expm1(compared.threshold or 0)
                rows.append((f"{name}:\n{value}", 100 * (compared.ratio - 1), noise, share))
        if rows:
            drawn = True
            names, values, noises, shares = zip(*rows, strict=True)
            axes.bar(names, values, yerr=noises, capsize=4, color=COLOURS["ternary"])
            marks = [(name, share) for name, share in zip(names, shares, strict=True) if share is not None]
            if marks:
                axes.plot(*zip(*marks, strict=True), "D", mfc="none", c="black", label="paper (0.5B)")
                axes.legend()
        axes.axhline(0, c="black", lw=0.8)
        axes.tick_params(axis="x", labelsize=8)  # Five names stand side by side.
        axes.set(title=f"ternary {pattern}, with bars of noise", ylabel="perplexity, % against the method")
    return drawn


def ramps(results: Results, figure: Figure) -> bool:
    """Draw the validation loss over time, at each of ``BASES``."""
    panels = figure.subplots(1, len(BASES))
    drawn = False
    for axes, pattern in zip(panels, BASES, strict=True):
        cells: dict[str, Cell | None] = {
            "sparse from the start": results.cell("ternary", pattern),
            **{name: results.cell("ternary", pattern, {"ramp": name}) for name in RAMPS},
            "never sparse": results.cell("ternary", "8:8"),
        }
        for label, cell in cells.items():
            if cell:
                curve = cell.runs[0]["validation_curve"]
                reported = paper.SHARES.get(label) if pattern == "6:8" else None
                said = "" if reported is None else f" (paper: {change(reported / paper.SPARSE_BITNET)} perplexity)"
                axes.plot([x for x, _ in curve], [y for _, y in curve], "o-", ms=3, label=label + said)
                drawn |= label in RAMPS
        axes.set(xlabel="step", ylabel="validation loss", title=f"ternary, to {pattern}")
        if axes.lines:
            axes.legend()
    return drawn
