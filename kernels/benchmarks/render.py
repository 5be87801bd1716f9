"""Renders a benchmark's CSV as a Markdown table.

python kernels/benchmarks/render.py kernels/benchmarks/results/layer_forward.csv [--summary]

With ``--summary`` the layer benchmark becomes one row a shape, times in ms and ratios to bf16: the README's table.
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


def _read(path: Path) -> tuple[list[dict[str, str]], str]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows")
    where = {tuple(row[k] for k in ENVIRONMENT) for row in rows}
    if len(where) != 1:
        raise ValueError(f"{path} mixes runs: {sorted(where)}")
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
)


def summarize(path: Path) -> str:
    """One row a shape of the layer benchmark; ours with the ratio to bf16 in the same run."""
    rows, where = _read(path)
    table: dict[tuple[str, ...], dict[tuple[str, str], dict[str, str]]] = {}
    for row in rows:
        table.setdefault((row["tokens"], row["in"], row["out"]), {})[row["variant"], row["what"]] = row
    lines = [where, "", "| tokens, in, out | " + " | ".join(heading for heading, _, _ in SUMMARY) + " |"]
    lines.append("|" + " --- |" * (len(SUMMARY) + 1))
    for shape, cells in table.items():
        values = []
        for heading, *key in SUMMARY:
            row = cells[key[0], key[1]]
            ratio = f" ({float(row['vs_bf16']):.2f}x)" if heading.startswith("**") else ""
            values.append(f"{float(row['ms']):.3f}{ratio}")
        lines.append(f"| {', '.join(shape)} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def render(path: Path) -> str:
    """The table, preceded by the line that says where it was measured.

    Raises:
        ValueError: If the rows are not all from one environment: ratios only count within one run.
    """
    rows, where = _read(path)
    columns = [name for name in rows[0] if name not in ENVIRONMENT]
    lines = [where, "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_short(row[name]) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[2:] not in ([], ["--summary"]):
        sys.exit(__doc__)
    print((summarize if sys.argv[2:] else render)(Path(sys.argv[1])))
