"""Renders a benchmark's CSV as a Markdown table.

python benchmarks/render.py benchmarks/results/layer_forward.csv [--summary]

With ``--summary`` the table is arranged for a reader, as ``benchmarks/pages.py`` puts it into the documentation:

- layers: one row a shape, times in ms, ratios to bf16;
- generation: one row a model, phase and batch;
- training steps: one row a variant, tokens a second, ratios to bf16.

A CSV may hold several runs (column ``measured``). The newest row counts, with its ratio to bf16 in its own run.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

ENVIRONMENT = ("gpu", "torch", "triton", "driver")


def _short(value: str) -> str:
    """At most 4 significant digits for a fraction; integers and words as they are."""
    try:
        number = float(value)
    except ValueError:
        return value
    return value if number.is_integer() and "e" not in value else f"{number:.4g}"


def read(path: Path) -> tuple[list[dict[str, str]], str]:
    """The rows of a CSV, and the one environment in which all of them were measured.

    Raises:
        ValueError: If there are no rows, or if they come from several environments.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows")
    where = {tuple(row[k] for k in ENVIRONMENT) for row in rows}
    if len(where) != 1:
        raise ValueError(f"{path} mixes environments: {sorted(where)}")
    gpu, torch, triton, driver = where.pop()
    return rows, f"{gpu}, torch {torch}, triton {triton}, driver {driver}"


# Columns of the summary: heading, variant, what was timed.
SUMMARY = (
    ("bf16", "bf16 F.linear", "layer"),
    ("fp8 rowwise", "fp8 rowwise _scaled_mm", "gemm"),
    ("cuSPARSELt, unscaled", "cuSPARSELt 2:4, unscaled bf16", "gemm"),
    ("2:4, GEMM alone", "2:4 sparse, 2-bit", "gemm"),
    ("**2:4 layer**", "2:4 sparse, 2-bit", "layer"),
    ("**6:8 layer**", "6:8 as dense ternary, 2-bit", "layer"),
    ("2:4, Ampere's GEMM", "2:4 by mma.sp, 2-bit, tile 128 x 128", "gemm"),
    ("6:8, Ampere's GEMM", "6:8 by mma, 2-bit, tile 128 x 128", "gemm"),
)


def _ratio(row: dict[str, str]) -> str:
    return f" ({float(row['vs_bf16']):.2f}x)" if row["vs_bf16"] else ""


def summarize(path: Path) -> str:
    """The table of a benchmark for the documentation, with ratios to bf16 in the same run."""
    rows, where = read(path)
    kinds = {"same": _summarize_generation, "mfu": _summarize_steps}
    return next((kind for column, kind in kinds.items() if column in rows[0]), _summarize_layers)(rows, where)


def _summarize_steps(rows: list[dict[str, str]], where: str) -> str:
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        shape = row["shape"] + (", checkpointing" if row["checkpointing"] == "True" else "")
        cell = f"{float(row['tokens_per_s']):,.0f}{_ratio(row)}, {float(row['peak_gib']):.0f} GiB"
        table.setdefault(row["variant"], {})[shape] = cell
    shapes = sorted({shape for cells in table.values() for shape in cells})
    lines = [where, "", "| tokens/s | " + " | ".join(shapes) + " |", "|" + " --- |" * (len(shapes) + 1)]
    lines += [
        f"| {name} | " + " | ".join(cells.get(shape, "") for shape in shapes) + " |" for name, cells in table.items()
    ]
    return "\n".join(lines)


def _summarize_generation(rows: list[dict[str, str]], where: str) -> str:
    """Rows a model: prefill, then decode, by batch. Columns: BF16, ours, transformers."""
    table: dict[tuple[str, str, int], dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: row["measured"]):
        ratio = _ratio(row) if row["variant"] != "bf16 dense" else ""
        cells = table.setdefault((row["model"], row["what"], int(row["batch"])), {})
        cells[row["variant"]] = f"{float(row['tokens_s']):,.0f}{ratio}"
    known = ("bf16 dense", "2:4", "6:8", "transformers generate")
    found = list(dict.fromkeys(row["variant"] for row in rows))
    variants = [name for name in known if name in found] + [name for name in found if name not in known]
    lines = [where, "", "| tokens/s | " + " | ".join(variants) + " |", "|" + " --- |" * (len(variants) + 1)]
    for model, what, batch in sorted(table, key=lambda cell: (cell[0], not cell[1].startswith("prefill"), *cell[1:])):
        values = " | ".join(table[model, what, batch].get(variant, "") for variant in variants)
        lines.append(f"| {model}, {what}, batch {batch} | {values} |")
    return "\n".join(lines)


def _summarize_layers(rows: list[dict[str, str]], where: str) -> str:
    """One row a shape and run, because a ratio belongs to one run."""
    table: dict[tuple[str, ...], dict[tuple[str, str], dict[str, str]]] = {}
    for row in rows:
        run = (row["tokens"], row["in"], row["out"], row["measured"])
        table.setdefault(run, {})[row["variant"], row["what"]] = row
    lines = [where, "", "| tokens, in, out | " + " | ".join(heading for heading, _, _ in SUMMARY) + " |"]
    lines.append("|" + " --- |" * (len(SUMMARY) + 1))
    for (*shape, _), cells in table.items():
        values = []
        for heading, variant, what in SUMMARY:
            row = cells.get((variant, what))
            ratio = _ratio(row) if row and ("**" in heading or "Ampere" in heading) else ""
            values.append(f"{float(row['ms']):.3f}{ratio}" if row else "")
        lines.append(f"| {', '.join(shape)} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def summarize_gradients(path: Path) -> str:
    """One row a shape of the backward benchmark: totals with ratios to bf16, then the parts of int8, in ms."""
    rows, where = read(path)
    table: dict[tuple[str, ...], dict[tuple[str, str], dict[str, str]]] = {}
    for row in rows:
        table.setdefault((row["tokens"], row["in"], row["out"]), {})[row["variant"], row["part"]] = row
    parts = ("quantize", "dX", "transpose", "dW")
    headings = ["bf16", "**exact**", "**int8**", *(f"int8: {part}" for part in parts), "dW, TFLOP/s"]
    lines = [where, "", "| tokens, in, out | " + " | ".join(headings) + " |", "|" + " --- |" * (len(headings) + 1)]
    for shape, cells in table.items():
        values = [f"{float(cells['bf16', 'all']['ms']):.3f}"]
        for variant in ("exact", "int8"):
            row = cells[variant, "all"]
            values.append(f"{float(row['ms']):.3f}{_ratio(row)}")
        values += [f"{float(cells['int8', part]['ms']):.3f}" for part in parts]
        lines.append(
            f"| {', '.join(shape)} | " + " | ".join(values) + f" | {float(cells['int8', 'dW']['tflops']):.0f} |"
        )
    return "\n".join(lines)


def render(path: Path) -> str:
    """The table, preceded by the line that says where it was measured.

    Raises:
        ValueError: If the rows are not all from one environment.
    """
    rows, where = read(path)
    columns = [name for name in rows[0] if name not in (*ENVIRONMENT, "measured")]
    lines = [where, "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_short(row[name]) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[2:] not in ([], ["--summary"]):
        sys.exit(__doc__)
    file = Path(sys.argv[1])
    summary = summarize_gradients if file.stem == "gradients" else summarize
    print((summary if sys.argv[2:] else render)(file))
