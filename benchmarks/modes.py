"""The tables of "What you get on your GPU": speed, memory and distance from the reference of each way to train.

Speed and memory come from ``training_step.csv``, memory by part from ``training_memory.csv``, and distances from
``loss_curves.csv``. A cell of the first table shows the newest row of its shape that has a ratio to bf16 in the same
run.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from render import read

# Variant of training_step.py, what it is called on the page, and its run of loss_curves.py (empty: no such run).
MODES = (
    ("bf16 dense", "dense model, BF16, compiled", ""),
    ("bf16 dense, CUDA graphs", "the same, `cuda_graphs: true`", ""),
    ("bf16 dense, chunked loss", "the same, with our loss", ""),
    ("float8 tensorwise (torchao)", "dense model, torchao's float8", ""),
    ("float8 tensorwise (torchao), chunked loss", "the same, with our loss", ""),
    ("float8 rowwise (torchao)", "dense model, torchao's float8, one scale a row", ""),
    ("ours 2:4", "2:4, exact gradients", "sparse"),
    ("ours 2:4, chunked loss", "the same, with our loss", ""),
    ("ours 2:4, int8 dX", '2:4, `gradients: int8-dx`', "sparse, int8 dX"),
    ("ours 2:4, int8 dX, int8 gates", '2:4, `gradients: int8-dx`, `saved_gates: int8`', ""),
    ("ours 2:4, int8 dW", '2:4, `gradients: int8-dw`', "sparse, int8 dW"),
    ("ours 2:4, int8 gradients", '2:4, `gradients: int8`', "sparse, int8 gradients"),
    (
        "ours 2:4, int8 gradients, head and gates",
        "the same, `head_precision: int8`, `saved_gates: int8`",
        "sparse, int8 gradients, head and gates",
    ),
    (
        "ours 2:4, int8 gradients, int8 head",
        "2:4, `gradients: int8`, `head_precision: int8`",
        "sparse, int8 gradients and head",
    ),
    (
        "ours 2:4, int8 gradients, int8 gates",
        "2:4, `gradients: int8`, `saved_gates: int8`",
        "sparse, int8 gradients, int8 gates",
    ),
    (
        "ours 2:4, int8 gradients, MLP recomputed",
        "2:4, `gradients: int8`, `activation_checkpointing: mlp`",
        "",
    ),
    (
        "ours 2:4, int8 gradients, head and gates, AdamW8bit",
        "2:4, `gradients: int8`, `head_precision: int8`, `saved_gates: int8`, torchao's AdamW8bit",
        "",
    ),
    ("ours 2:4, int8 gradients, CUDA graphs", "2:4, `gradients: int8`, `cuda_graphs: true`", ""),
    ("ours 2:4, int8 gradients, int8 head, CUDA graphs", "the same, `head_precision: int8`", ""),
    ("ours 2:4, CUDA graphs", "2:4, exact gradients, `cuda_graphs: true`", ""),
    ("ours 6:8", "6:8, exact gradients", "int8 6:8"),
    ("ours 6:8, int8 gradients", '6:8, `gradients: int8`', "int8 6:8, int8 gradients"),
)  # fmt: skip


def distances(path: Path) -> dict[str, list[float]]:
    """The distance of each run of ``loss_curves.csv`` from its reference, for every seed."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    newest = {row["run"]: float(row["distance"]) for row in rows}
    found: dict[str, list[float]] = {}
    for run, distance in newest.items():
        found.setdefault(re.sub(r", seed \d+$", "", run), []).append(distance)
    return found


def _span(values: list[float]) -> str:
    if not values:
        return ""
    lowest, highest = min(values), max(values)
    return f"{lowest:.3f}" if len(values) == 1 else f"{lowest:.3f} to {highest:.3f} ({len(values)} seeds)"


def table(steps: Path) -> str:
    """The environment of the rows, an empty line, and the table as Markdown."""
    rows, where = read(steps)
    plain = [row for row in rows if row["checkpointing"] == "False"]
    shapes = list(dict.fromkeys(row["shape"] for row in plain))
    newest = {(row["variant"], row["shape"]): row for row in plain if row["vs_bf16"]}
    losses = distances(steps.with_name("loss_curves.csv"))
    lines = [["", *shapes, "distance of the loss"], ["---"] * (len(shapes) + 2)]
    for variant, name, run in MODES:
        cells = [newest.get((variant, shape)) for shape in shapes]
        if not any(cells):
            continue
        texts = [f"{float(row['vs_bf16']):.2f}x, {float(row['peak_gib']):.0f} GiB" if row else "" for row in cells]
        lines.append([name, *texts, _span(losses.get(run, []))])
    memory = memory_by_part(steps.with_name("training_memory.csv"), {variant: name for variant, name, _ in MODES})
    return f"{where}\n\n{_markdown(lines)}\n\n{MEMORY}\n\n{memory}"


MEMORY = """## Where the memory goes

GiB at the peak of a step, each from the newest run that measured it. What the forward saves for the backward is split
into the widest tensors, which are the gates and ups, and the rest. Ours saves tokens as int8 codes; with
`saved_gates: int8` gates and ups as well."""


def memory_by_part(path: Path, names: dict[str, str]) -> str:
    """A table of the memory by part.

    Args:
        path: ``training_memory.csv``. The rows of a run begin with the parameters.
        names: What the page calls each variant.
    """
    runs: dict[tuple[str, str], dict[str, float]] = {}
    for row in read(path)[0]:
        parts = runs.setdefault((row["shape"], row["variant"]), {})
        if row["part"] == "parameters":
            parts.clear()
        parts[row["part"]] = float(row["gib"])
    lines = [
        ["", "parameters, gradients, optimiser", "prepared weights", "gates and ups", "other saved", "temporary", "all"]
    ]
    lines.append(["---"] * len(lines[0]))
    for (shape, variant), parts in sorted(runs.items(), key=lambda item: item[0][0]):
        saved = {name: size for name, size in parts.items() if name.startswith("saved")}
        widest = max(saved, key=_width)
        held = sum(parts[name] for name in ("parameters", "gradients", "optimiser states"))
        prepared, rest = parts["buffers and prepared weights"], sum(saved.values()) - saved[widest]
        sizes = [held, prepared, saved[widest], rest, parts["temporaries"], sum(parts.values())]
        lines.append([f"{shape}: {names.get(variant, variant)}", *(f"{size:.1f}" for size in sizes)])
    return _markdown(lines)


def _width(part: str) -> int:
    """The features of the saved tensors of a part, as in ``saved int8 x 28672``."""
    return int(part.rpartition(" x ")[2]) if " x " in part else 0


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
