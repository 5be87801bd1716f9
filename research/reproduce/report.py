"""Write the results as Markdown: one function for each section. A section shows as much as there are results for."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from research.reproduce import paper
from research.reproduce.best import at_best_rates
from research.reproduce.grid import Grid
from research.reproduce.noise import t_factor
from research.reproduce.not_run import not_run
from research.reproduce.plots import draw
from research.reproduce.probe import DISTANCES
from research.reproduce.tables import DASH, FAMILIES, Cell, Line, Noise, Results, change, number, percent, table
from research.reproduce.variants import ABLATIONS, BASES, FLIPS, RAMPS
from sbn_lightning.core.files import write_text

PATTERNS = ("8:8", "7:8", "6:8", "5:8", "4:8", "2:4", "3:8", "2:8")
INTERVALS = (10, 100, 1000)


def write_report(lines: list[Line], output: Path, images: Path | None, grid: Grid | None = None) -> None:
    """Write the report.

    Args:
        lines: The lines of results, at least one.
        output: The Markdown file to write.
        images: The folder for the plots; None for no plots.
        grid: The grid, to list its runs that have no line and to explain its names; None leaves both out.

    Raises:
        ConfigError: If plots are wanted and matplotlib is missing, or the grid cannot work.
    """
    results = Results(lines)
    pictures: dict[str, str] = {}
    if images is not None:
        pictures = {name: os.path.relpath(path, output.parent) for name, path in draw(results, images).items()}
    sections: list[tuple[str, str, Callable[[Results], str]]] = [
        ("Perplexity against N", "perplexity", main_table),
        ("Learning rates", "", learning_rates),
        ("Ablations", "ablations", ablations),
        ("From dense to sparse", "ramps", ramps),
        ("Each at its own best learning rate", "", partial(at_best_rates, grid=grid)),
        ("Mask refresh", "", refresh),
        ("int8 gradients", "", int8_gradients),
        ("Zeros and flips", "flip_rate", zeros),
        ("Bracket matching", "", brackets),
    ]
    text = ["# Reproduction", setting(results)]
    if grid is None:
        text.append("Runs that are missing are not listed: there was no grid file to compare with.")
    for title, picture, section in sections:
        text += [f"## {title}", section(results)]
        if picture in pictures:
            text.append(f"![{title}]({pictures[picture]})")
        if picture == "flip_rate":
            text.append(_flips(results))
    if grid is not None and (left := not_run(results, grid)) is not None:
        text += ["## Not run", left]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, "\n\n".join(text) + "\n")


def _noise_row(family: str, noise: Noise | None) -> list[str]:
    if noise is None:
        return [family, "all", "no cell has two seeds, noise is not known", DASH, DASH]
    spread = percent(noise.deviation, 2)
    return [family, noise.pattern or "all", spread, str(noise.freedom), f"{t_factor(noise.freedom):.2f}"]


def setting(results: Results) -> str:
    """Return the section on what was run, and on which hardware and data."""
    lines = results.lines
    first = lines[0]
    machines = sorted({line["hardware"] for line in lines})
    versions = sorted({", ".join(f"{k} {v}" for k, v in line["versions"].items()) for line in lines})
    tokens = first["data"]["tokens"]
    count = "1 run" if len(lines) == 1 else f"{len(lines)} runs"
    parts = [
        f"{count} of {first['parameters'] / 1e6:.1f}M parameters, {first['tokens'] / 1e6:.1f}M tokens "
        f"({first['steps']} steps) each; corpus {first['data']['fingerprint'][:12]} of "
        f"{tokens.get('train', 0) / 1e6:.1f}M training and {tokens.get('val', 0) / 1e6:.2f}M validation tokens. "
        f"{' and '.join(machines)}; {'; '.join(versions)}. "
        f"{sum(line['seconds'] for line in lines) / 60:.0f} minutes of training, added up over runs that may have "
        "shared the GPU.",
        "Perplexity is over all held-out text. A difference is called noise unless it exceeds its standard deviation "
        "times Student's t for the degrees of freedom; where there is no effect, one comparison in twenty exceeds "
        "that. The deviation of one run is estimated from those that differ in their seed alone, for each family and "
        "pattern; where a pattern has too few of them, from all of the family, without the pattern that it is compared "
        "with where the others have enough:",
    ]
    rows = []
    for family in FAMILIES:
        if family in results.learning_rates:
            found = {pattern: results.noise(family, pattern) for pattern in results.patterns()}
            own = [noise for pattern, noise in found.items() if noise is not None and noise.pattern == pattern]
            rows += [_noise_row(family, noise) for noise in (*own, results.noise(family))]
    parts.append(table(("family", "pattern", "one run varies by", "degrees of freedom", "times"), rows))
    rates = ", ".join(f"{rate:g} for {family}" for family, rate in results.learning_rates.items())
    parts.append(f"Learning rates are {rates} where none is given.")
    parts.append(
        "A verdict says first whether our effect is more than this noise, then how it stands to the paper's: agrees "
        "means no more than that the paper's figure lies within our noise of ours."
    )
    parts.append(paper.ORIGIN)
    if results.left_out:
        parts.append(f"{results.left_out} lines of another corpus, model or length are left out.")
    return "\n\n".join(parts)


def main_table(results: Results) -> str:
    """Return the table of each family at each pattern, against the dense model of the family."""
    rows = []
    for family in FAMILIES:
        dense = results.cell(family, "8:8")
        for pattern in PATTERNS:
            cell = results.cell(family, pattern)
            if cell is None:
                continue
            reported = paper.RELATIVE[family].get(pattern)
            spread = cell.spread("validation", "perplexity")
            row = [family, pattern, number(cell.perplexity), str(len(cell.runs)), number(spread)]
            if dense is None or pattern == "8:8":
                rows.append([*row, DASH, DASH, number(reported), DASH])
            else:
                compared = results.compare(cell, dense)
                judged = [compared.noise, number(reported), compared.verdict(reported)]
                rows.append([*row, number(compared.ratio), *judged])
    header = ("family", "pattern", "perplexity", "seeds", "spread", "relative to dense", "noise", "paper", "verdict")
    return "\n\n".join([table(header, rows), _across_families(results), _absolute(results)])


def _across_families(results: Results) -> str:
    """Return the table that says which family loses less to sparsity."""
    said = []
    for pattern in PATTERNS[1:]:
        cells = [(results.cell(family, pattern), results.cell(family, "8:8")) for family in FAMILIES]
        (bf16, bf16_dense), (ternary, ternary_dense) = cells
        if not (bf16 and bf16_dense and ternary and ternary_dense):
            continue
        costs = [results.compare(bf16, bf16_dense), results.compare(ternary, ternary_dense)]
        gap = costs[1].less(costs[0])
        reported = [paper.RELATIVE[family][pattern] for family in FAMILIES if pattern in paper.RELATIVE[family]]
        theirs = reported[1] / reported[0] if len(reported) == 2 else None
        verdict = gap.verdict(theirs, words=("ternary loses less", "bf16-sparse loses less"))
        ours = [change(costs[0].ratio), change(costs[1].ratio), change(gap.ratio), gap.noise]
        said.append((pattern, *ours, change(theirs), verdict))
    if not said:
        return "Which family sparsity costs less: needs both families, dense and sparse."
    header = ("pattern", "bf16-sparse", "ternary", "difference", "noise", "paper's difference", "verdict")
    return f"What sparsity costs each family, and how much more it costs ternary:\n\n{table(header, said)}"


def _absolute(results: Results) -> str:
    """Return the table of perplexities, ours and the paper's by size."""

    def said(dense: float, sparse: float) -> str:
        return f"{dense:.2f} → {sparse:.2f} ({change(sparse / dense)})"

    rows = []
    for family in FAMILIES:
        dense, sparse = results.cell(family, "8:8"), results.cell(family, "6:8")
        ours = DASH if dense is None or sparse is None else said(dense.perplexity, sparse.perplexity)
        rows.append([family, ours, *(said(*each) for each in paper.ABSOLUTE[family].values())])
    sizes = [f"paper, {size}" for size in paper.ABSOLUTE["ternary"]]
    header = ("family", f"here, {results.lines[0]['parameters'] / 1e6:.1f}M", *sizes)
    return f"Perplexities, dense → 6:8. {paper.ABSOLUTE_ARE_APART}\n\n{table(header, rows)}"


def learning_rates(results: Results) -> str:
    """Return the table of the learning rate sweep, and whether the best rate lies inside the sweep."""
    rows, said = [], []
    for family in FAMILIES:
        for pattern in results.patterns():
            cells = results.sweep(family, pattern)
            if len(cells) < 2:
                continue
            best = results.best(cells)
            rows += [
                [family, pattern, f"{rate:g}", number(cell.perplexity), str(len(cell.runs)), "best" * (rate == best)]
                for rate, cell in cells.items()
            ]
            if best in (min(cells), max(cells)):
                said.append(f"- {family} {pattern}: the best is at the edge of the sweep")
            if best != results.learning_rates[family]:
                used = cells.get(results.learning_rates[family])
                cost = "" if used is None else f", {change(results.compare(used, cells[best]).ratio)} in perplexity"
                said.append(f"- {family} {pattern}: the other tables are at {results.learning_rates[family]:g}{cost}")
    if not rows:
        return "Not run."
    header = ("family", "pattern", "learning rate", "perplexity", "seeds", "")
    return "\n\n".join([table(header, rows), *(["\n".join(said)] if said else [])])


def _variants(results: Results, variants: Sequence[tuple[str, dict[str, Any], float | None]], title: str) -> str:
    """Return a table of variants of ternary training against the default, at each of ``BASES``."""
    rows = []
    for pattern in BASES:
        base = results.cell("ternary", pattern)
        for name, varied, reported in variants:
            cell = results.cell("ternary", pattern, varied)
            if cell is None or base is None:
                continue
            compared = results.compare(cell, base)
            ratio = reported / paper.SPARSE_BITNET if reported is not None and pattern == "6:8" else None
            seeds = f"{len(cell.runs)} against {len(base.runs)}"
            changes = [change(compared.ratio), compared.noise, change(ratio), compared.verdict(ratio)]
            rows.append([pattern, name, number(cell.perplexity), seeds, *changes])
    if not rows:
        return "Not run."
    return table(("pattern", title, "perplexity", "seeds", "change", "noise", "paper", "verdict"), rows)


def ablations(results: Results) -> str:
    """Return the section on mask source, gradient and gamma."""
    variants = [(f"{name}: {value}", {name: value}, paper.ABLATIONS.get((name, value))) for name, value in ABLATIONS]
    return f"{_variants(results, variants, 'changed')}\n\n{paper.INCONSISTENT}"


def ramps(results: Results) -> str:
    """Return the section on trainings that become sparse late or step by step, against sparse from the start."""
    variants = [(name, {"ramp": name}, paper.SHARES.get(name)) for name in RAMPS]
    return _variants(results, variants, "ramp")


def refresh(results: Results) -> str:
    """Return the section on rarer mask refreshes, safe and naive, at 6:8."""
    base, rows = results.cell("ternary", "6:8"), []
    for interval in INTERVALS:
        for gradient, name in (("masked", "safe"), ("dense", "naive")):
            varied = {"refresh_interval": interval} | ({"stale_gradient": "dense"} if name == "naive" else {})
            cell = results.cell("ternary", "6:8", varied)
            if cell is None or base is None:
                continue
            compared = results.compare(cell, base)
            changes = [change(compared.ratio), compared.noise, compared.verdict()]
            rows.append([str(interval), name, gradient, number(cell.perplexity), *changes])
    if not rows:
        return "Not run."
    header = ("every", "", "stale_gradient", "perplexity", "against every step", "noise", "verdict")
    return table(header, rows) + "\n\nThe paper reports no such runs."


def int8_gradients(results: Results) -> str:
    """Return the section on rounded against exact gradients."""
    return _variants(results, [("int8 gradients", {"gradients": "int8"}, None)], "changed")


def zeros(results: Results) -> str:
    """Return the section on zeros and flips at the end of training."""
    rows = []
    for pattern in PATTERNS:
        for family in FAMILIES:
            cell = results.cell(family, pattern)
            if cell is None:
                continue
            names = ("zeros_natural", "zeros_enforced", "flip_rate_mask", "flip_rate_code")
            values = [_with_spread(cell, name) for name in names]
            reported = paper.ENFORCED_ZEROS.get(pattern) if family == "ternary" else None
            rows.append([family, pattern, *values, percent(reported)])
    note = (
        f"Shares of all masked weights, at the last look, with the spread over seeds. The paper has "
        f"{percent(paper.NATURAL_ZEROS, 0)} natural zeros after 50 billion tokens; a Gaussian has 31 %."
    )
    header = ("family", "pattern", "natural zeros", "enforced", "mask flips", "code flips", "paper: enforced")
    return f"{table(header, rows)}\n\n{note}" if rows else "Not run."


def _flips(results: Results) -> str:
    """Return what the paper says about flip rates, and where our curves end."""
    cells = {name: results.cell("ternary", "6:8", varied) for name, varied in FLIPS.items()}
    ends = {name: cell.mean("sparsity", "flip_rate_mask") for name, cell in cells.items() if cell is not None}
    said = ", ".join(f"{percent(end, 2)} {name}" for name, end in ends.items() if end is not None)
    return paper.FLIP_RATES + (f" Here ternary 6:8 ends at {said}." if said else "")


def _with_spread(cell: Cell, name: str) -> str:
    spread = cell.spread("sparsity", name)
    return percent(cell.mean("sparsity", name), 2) + ("" if spread is None else f" (spread {percent(spread, 2)})")


def brackets(results: Results) -> str:
    """Return the section on bracket matching, which can fail without a change in the loss."""
    far = f"{DISTANCES[-1]}+"
    wanted = [(family, pattern, results.cell(family, pattern)) for family in FAMILIES for pattern in PATTERNS]
    variants = [*ABLATIONS, *(("ramp", ramp) for ramp in RAMPS), ("gradients", "int8")]
    wanted += [(f"ternary, {k}: {v}", p, results.cell("ternary", p, {k: v})) for k, v in variants for p in BASES]
    rows = []
    for name, pattern, cell in wanted:
        if cell is not None and cell.mean("probe", "balanced_accuracy") is not None:
            keys = (("balanced_accuracy",), ("by_distance", far, "balanced_accuracy"), ("accuracy",), ("always_round",))
            values = [percent(cell.mean("probe", *key)) for key in keys]
            spread = percent(cell.spread("probe", "balanced_accuracy"))
            rows.append([name, pattern, str(len(cell.runs)), values[0], spread, *values[1:]])
    if not rows:
        return "Not run."
    header = ("runs", "pattern", "seeds", "balanced accuracy", "spread", f"{far} tokens away", "accuracy", 'always ")"')
    note = (
        "Which kind of bracket closes, where the next token closes one; balanced over the three kinds (guessing: "
        "33 %). Differences within the spread of seeds are noise."
    )
    return f"{table(header, rows)}\n\n{note}"
