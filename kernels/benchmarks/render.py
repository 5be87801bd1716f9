"""Renders a benchmark's CSV as a Markdown table.

python kernels/benchmarks/render.py kernels/benchmarks/results/layer_forward.csv
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


def render(path: Path) -> str:
    """The table, preceded by the line that says where it was measured.

    Raises:
        ValueError: If the rows are not all from one environment: ratios only count within one run.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows")
    where = {tuple(row[k] for k in ENVIRONMENT) for row in rows}
    if len(where) != 1:
        raise ValueError(f"{path} mixes runs: {sorted(where)}")
    gpu, torch, triton, driver = where.pop()
    columns = [name for name in rows[0] if name not in ENVIRONMENT]
    lines = [f"{gpu}, torch {torch}, triton {triton}, driver {driver}", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_short(row[name]) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(render(Path(sys.argv[1])))
