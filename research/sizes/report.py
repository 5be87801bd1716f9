"""Write what the study measured as Markdown tables and a plot."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from research.reproduce.noise import t_factor
from research.reproduce.paper import ABSOLUTE
from research.reproduce.tables import change, table
from research.sizes.fit import Gap, Row, by_the_rule, family_and_way, family_differences, fit, gaps, tokens_each
from research.sizes.rates import EACH, best_rates, learning_rate
from research.sizes.rounds import VARIANTS_AT
from research.sizes.trials import PARAMETERS, SIZES, tokens_of

# The part of a page from this line on is written by `report`.
MARK = "<!-- From here on, this page is written by python -m research.sizes report. -->"
WAYS = ("6:8", "2:4", "2:4 with masked decay")
FAMILIES = ("bf16", "ternary")


def write_report(rows: Sequence[Row], page: Path, images: Path) -> None:
    """Write the tables into a page below :data:`MARK`, and the plot into a folder.

    Args:
        rows: The lines of results.
        page: The Markdown file. What stands above the mark stays.
        images: The folder for the plot.
    """
    before = page.read_text(encoding="utf-8").partition(MARK)[0] if page.is_file() else "# Sizes\n\n"
    draw(rows, images / "sizes_gap.png")
    page.write_text(f"{before}{MARK}\n\n{report(rows)}\n", encoding="utf-8")


def report(rows: Sequence[Row]) -> str:
    """Return all tables."""
    parts = [
        "## The gap to the dense model",
        gap_table(rows),
        "![The gap between sparse and dense over sizes and tokens](images/sizes_gap.png)",
        "## BF16 against ternary",
        family_table(rows),
        "## The fit",
        fit_table(rows),
        "## Learning rates",
        rate_table(rows),
        f"## Other ideas at {VARIANTS_AT[0]}",
        variant_table(rows),
        "## Losses",
        loss_table(rows),
    ]
    return "\n\n".join(parts)


def gap_table(rows: Sequence[Row]) -> str:
    """Return the gaps of all ways with the rule's learning rates."""
    cells = []
    for family in FAMILIES:
        for way in WAYS:
            for place in gaps(rows, family, way):
                shown = "noise not known" if place.error is None else f"±{place.error:.3f}"
                source = "-" if place.noise is None else place.noise.source
                cells.append([
                    family, way, place.size, f"{place.each:g}", str(len(place.values)), f"{place.mean:+.4f} {shown}",
                    change(math.exp(place.mean)), source,
                ])  # fmt: skip
    header = ("family", "pattern", "size", "tokens a parameter", "seeds", "gap in nats", "perplexity", "noise from")
    return table(header, cells) if cells else "Not run."


def family_table(rows: Sequence[Row]) -> str:
    """Return how much more BF16 models pay for a way than ternary models do, and how this changes with the size."""
    cells, slopes = [], []
    for way in WAYS:
        places = family_differences(rows, way)
        for place in places:
            shown = "noise not known" if place.error is None else f"±{place.error:.4f}"
            said = "-" if place.error is None else "within noise" if abs(place.mean) <= place.error else (
                "BF16 pays more" if place.mean > 0 else "ternary pays more")  # fmt: skip
            source = "-" if place.noise is None else place.noise.source
            cells.append([way, place.size, f"{place.each:g}", f"{place.mean:+.4f} {shown}", said, source])
        found = fit(places)
        if found is not None and "a decade of size" in found.line:
            slopes.append(f"{way} {found.line['a decade of size']}")
    header = ("pattern", "size", "tokens a parameter", "BF16 gap minus ternary gap, nats", "verdict", "noise from")
    if not cells:
        return "Not run."
    change_of = f"\n\nChange of this difference with ten times the size, nats: {'; '.join(slopes)}." if slopes else ""
    return f"{table(header, cells)}{change_of}"


def fit_table(rows: Sequence[Row]) -> str:
    """Return the fitted coefficients."""
    cells = []
    for family in FAMILIES:
        for way in WAYS:
            places = gaps(rows, family, way)
            found = fit(places)
            if found is None:
                continue
            power = "-" if found.power is None else str(found.power.get("a decade of size", "-"))
            cells.append([
                family, way, str(len(places)), *(str(found.line.get(name, "-")) for name in
                ("at 15M", "a decade of size", "a decade of tokens")), power,
            ])  # fmt: skip
    header = (
        "family", "pattern", "gaps", f"gap at 15M, {EACH:g} tokens a parameter", "change with ten times the size",
        "change with ten times the tokens a parameter", "exponent of a power law in size",
    )  # fmt: skip
    if not cells:
        return "Not run."
    paper = ", ".join(f"{family} {slope:+.3f}" for family, slope in paper_slopes())
    units = "Nats, with 95 % of bootstrap samples in brackets (`research/sizes/fit.py`)."
    slopes = f"The paper at 6:8, a line through its three sizes (0.5B to 3B): {paper} nats for ten times the size."
    return f"{table(header, cells)}\n\n{units} {slopes}"


def rate_table(rows: Sequence[Row]) -> str:
    """Return the losses at each learning rate, where several were tried; the rule's rate is marked."""
    found: dict[tuple[str, str, str, float], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        trial = row["trial"]
        if not trial["variant"] and not trial["shrink"]:
            key = trial["size"], trial["family"], trial["pattern"], tokens_each(row)
            found[key][trial["lr"]].append(row["loss"])
    cells = []
    for (size, family, pattern, each), losses in sorted(found.items(), key=lambda item: PARAMETERS[item[0][0]]):
        if len(losses) < 2:
            continue
        rule = learning_rate(size, family, best_rates(rows))  # type: ignore[arg-type]
        text = ", ".join(
            f"{lr:g}: {fmean(values):.4f}" + (" (rule)" if lr == rule else "") for lr, values in sorted(losses.items())
        )
        cells.append([size, family, pattern, f"{each:g}", text])
    header = ("size", "family", "pattern", "tokens a parameter", "learning rate: loss")
    return table(header, cells) if cells else "Not run."


def variant_table(rows: Sequence[Row]) -> str:
    """Return the other ideas, each against the same training without the idea, with the noise of one seed's loss."""
    size, each = VARIANTS_AT
    at = [row for row in rows if row["trial"]["size"] == size and row["trial"]["tokens"] == tokens_of(size, each)]
    cells: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    for row in at:
        cells[(*family_and_way(row), row["trial"]["lr"] * row["trial"]["scale"])].append(row["loss"])
    freedom = sum(len(losses) - 1 for losses in cells.values())
    squares = sum(sum((loss - fmean(losses)) ** 2 for loss in losses) for losses in cells.values())
    noise = math.sqrt(squares / freedom) if freedom else None
    lines = []
    for (family, way, lr), losses in sorted(cells.items()):
        pattern, _, variant = way.partition(", ")
        rule = learning_rate(size, family, best_rates(rows))  # type: ignore[arg-type]
        base = cells.get((family, pattern, rule))
        line = [family, pattern, variant or "baseline", f"{lr:g}", str(len(losses)), f"{fmean(losses):.4f}"]
        if base is None or (not variant and lr == rule):
            lines.append([*line, "-", "-"])
            continue
        difference = fmean(losses) - fmean(base)
        error = None if noise is None else t_factor(freedom) * noise * math.sqrt(1 / len(losses) + 1 / len(base))
        said = "noise not known" if error is None else "within noise" if abs(difference) <= error else (
            "better" if difference < 0 else "worse")  # fmt: skip
        lines.append([*line, f"{difference:+.4f}" + ("" if error is None else f" ±{error:.4f}"), said])
    header = (
        "family",
        "pattern",
        "idea",
        "learning rate of matrices",
        "seeds",
        "loss",
        "against the baseline",
        "verdict",
    )
    return table(header, lines) if lines else "Not run."


def loss_table(rows: Sequence[Row]) -> str:
    """Return the mean loss of every cell with the rule's learning rate."""
    cells: dict[tuple[str, float, str, str], list[Row]] = defaultdict(list)
    best = best_rates(rows)
    for row in rows:
        if by_the_rule(row, best):
            cells[(row["trial"]["size"], tokens_each(row), *family_and_way(row))].append(row)
    lines = []
    for (size, each, family, way), found in sorted(
        cells.items(), key=lambda item: (PARAMETERS[item[0][0]], *item[0][1:])
    ):
        losses = [row["loss"] for row in found]
        spread = f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else "-"
        lines.append([
            size, f"{each:g}", f"{found[0]['tokens'] / 1e6:.0f}M", f"{found[0]['epochs']:.1f}", family, way,
            str(len(found)), f"{fmean(losses):.4f}", spread, f"{fmean(row['tokens_per_second'] for row in found):,.0f}",
        ])  # fmt: skip
    header = (
        "size", "tokens a parameter", "tokens", "epochs", "family", "pattern", "seeds", "loss",
        "largest minus smallest", "tokens a second of a process",
    )  # fmt: skip
    return table(header, lines) if lines else "Not run."


def draw(rows: Sequence[Row], file: Path) -> None:
    """Draw the gaps over sizes, and over tokens at the size that has most of them, with 95 % intervals."""
    from matplotlib.figure import Figure

    most = max(SIZES, key=lambda size: len({tokens_each(row) for row in rows if row["trial"]["size"] == size}))
    several = len({tokens_each(row) for row in rows if row["trial"]["size"] == most}) > 1
    figure = Figure(figsize=(11 if several else 8, 4), layout="constrained")
    axes = figure.subplots(1, 3 if several else 2)
    colours = dict(zip(WAYS, ("#55a868", "#c44e52", "#4c72b0"), strict=True))
    styles = {"bf16": ("s", "--"), "ternary": ("o", "-")}
    for family, axis in zip(FAMILIES, axes, strict=False):
        for shift, way in zip((0.97, 1.0, 1.03), WAYS, strict=True):  # Bars at one place would hide each other.
            usual = [place for place in gaps(rows, family, way) if place.each == EACH]
            _bars(axis, [shift * PARAMETERS[p.size] for p in usual], usual, colours[way], way, styles[family])
        axis.set(
            xscale="log", xlabel=f"parameters, {EACH:g} tokens each", ylabel="loss minus dense (nats)", title=family
        )
        there = [size for size in SIZES if any(row["trial"]["size"] == size for row in rows)]
        axis.set_xticks([PARAMETERS[size] for size in there], there)
        axis.minorticks_off()
    if several:
        for family in FAMILIES:
            for way in ("2:4", "2:4 with masked decay"):
                here = [place for place in gaps(rows, family, way) if place.size == most]
                _bars(axes[2], [p.each for p in here], here, colours[way], f"{family}, {way}", styles[family])
        axes[2].set(xscale="log", xlabel=f"tokens a parameter at {most}", title="more tokens")
    for axis in axes:
        axis.axhline(0, c="grey", lw=0.5)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _bars(
    axis: Any, x: Sequence[float], places: Sequence[Gap], colour: str, label: str, style: tuple[str, str]
) -> None:
    if not places:
        return
    errors = [place.error or 0.0 for place in places]
    mark, line = style
    axis.errorbar(x, [p.mean for p in places], errors, marker=mark, ls=line, ms=4, capsize=2, c=colour, label=label)


def paper_slopes() -> Iterator[tuple[str, float]]:
    """Yield the change of the paper's gap at 6:8 with ten times the size, in nats, for each family."""
    for family, perplexities in ABSOLUTE.items():
        sizes = [math.log10(float(size.removesuffix("B"))) for size in perplexities]
        logs = [math.log(sparse / dense) for dense, sparse in perplexities.values()]
        yield family.removesuffix("-sparse"), float(np.polyfit(sizes, logs, 1)[0])
