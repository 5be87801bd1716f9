"""What every benchmark shares: timing by CUDA-graph replay, the environment's description, CSV files.

A number counts only after the result was compared with a reference (``verify``), and ratios only within one run.
"""

from __future__ import annotations

import csv
import io
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import triton

from sbn_lightning.core.files import write_text

RESULTS = Path(__file__).parent / "results"
MEASURED = time.strftime("%Y-%m-%d %H:%M", time.gmtime())  # the same for all rows of a run: ratios need one run
ADDED = ("gpu", "torch", "triton", "driver", "measured")  # columns that every row gets
L2_BYTES_TO_EXCEED = 200e6


def environment() -> dict[str, str]:
    """Returns the GPU, the versions of torch, Triton and the driver, and the clocks if they can be read."""
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        driver, *clocks = [field.strip() for field in out.splitlines()[torch.cuda.current_device()].split(",")]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver, clocks = "unknown", []
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": driver,
        "clocks": " ".join(clocks) or "unknown",
    }


def header() -> str:
    """Returns one line for the top of a table."""
    e = environment()
    versions = f"{e['gpu']}, torch {e['torch']}, triton {e['triton']}, driver {e['driver']}"
    return f"{versions}; clocks now, highest, memory, power limit: {e['clocks']}"


def copies(bytes_each: float, most: int = 24) -> int:
    """Returns the number of buffer sets that together exceed the L2 cache."""
    return max(2, min(most, int(L2_BYTES_TO_EXCEED // max(bytes_each, 1)) + 1))


def median_ms(calls: Sequence[Callable[[], object]], seconds: float = 0.25, repeats: int = 12) -> float:
    """Median time of one call, in ms, over replays of a CUDA graph of ``repeats`` calls that rotate through ``calls``.

    ``calls`` are the same work on different buffers.
    """
    repeats = -(-max(repeats, len(calls)) // len(calls)) * len(calls)
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats):
            calls[i % len(calls)]()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    graph.replay()
    events[0].record()
    graph.replay()
    events[1].record()
    torch.cuda.synchronize()
    count = max(5, min(400, int(seconds * 1000 / max(events[0].elapsed_time(events[1]), 1e-3))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) / repeats


def verify(name: str, ours: torch.Tensor, reference: torch.Tensor) -> None:
    """Raises:
    AssertionError: If a single element differs.
    """
    wrong = int((ours != reference).sum())
    if wrong:
        raise AssertionError(f"{name}: {wrong} of {reference.numel()} elements differ from the reference")


def reference_gemm(x8: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    """Computes the exact product in float64, scaled and rounded to bfloat16, 2048 tokens at a time."""
    weight = codes.double().t()
    parts = []
    for x, s in zip(x8.split(2048), scale.split(2048), strict=True):
        parts.append(((x.double() @ weight).float() * (s[:, None] * row_scale)).bfloat16())
    return torch.cat(parts)


def fresh_results(name: str, keep: bool = False, columns: Sequence[str] = ()) -> Path:
    """Path of a benchmark's CSV, emptied; with ``keep`` it stays as it is, for rows to be added.

    Raises:
        ValueError: If it is kept and has not ``columns``: known now, not only after the first measurement.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    if not keep:
        path.unlink(missing_ok=True)
    elif columns:
        _kept_rows(path, [*columns, *ADDED])
    return path


def append(path: Path, row: dict[str, object], key: Sequence[str] = ()) -> None:
    """Adds a row (with the environment) to a CSV and prints it.

    Args:
        path: The CSV.
        row: Column -> value.
        key: Columns that say what was measured, if rows that agree in them are to be replaced.

    Raises:
        ValueError: If the CSV has other columns.
    """
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    full = {**row, **{k: v for k, v in environment().items() if k != "clocks"}, "measured": MEASURED}
    written = {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in full.items()}
    kept = _kept_rows(path, list(full))
    if key:
        kept = [old for old in kept if any(old[k] != written[k] for k in key)]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(full))
    writer.writeheader()
    writer.writerows([*kept, written])
    write_text(path, table.getvalue())  # A run that is stopped while it writes keeps what it has measured.


def _kept_rows(path: Path, columns: list[str]) -> list[dict[str, str]]:
    """Rows of a CSV, none if there is no such file.

    Raises:
        ValueError: If it has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        found, rows = list(reader.fieldnames or ()), list(reader)
    if found != columns:
        raise ValueError(f"{path} has the columns {found}, not {columns}: rows of another benchmark or version")
    return rows


def need_gpu() -> None:
    """Ends the process with a message if there is no GPU."""
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU")
