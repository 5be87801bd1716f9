"""Every row of ``benchmarks/scaling.py`` with several ranks trains, and trains the same model as DDP."""

from __future__ import annotations

import importlib
import importlib.util
import json

import pytest

from tests.benchmarks.test_benchmarks import BENCHMARKS
from tests.distributed.forked_runs import statuses

pytestmark = pytest.mark.timeout(900)  # The first of these tests runs the jobs of all.
ROWS = {
    "ternary": ["ddp", "ddp bfloat16", "ddp in 25 mb", "ddp lightning"],
    "dense": ["bf16 ddp", "bf16 fsdp2"],
}
ROWS["ternary"] += ["fsdp2 packed", "fsdp2 packed float32", "fsdp2 step", "fsdp2 layer", "fsdp2 latent"]
if importlib.util.find_spec("torchao"):
    ROWS["float8"] = ["float8 ddp", "float8 fsdp2"]


def jobs_of_ranks(folder, tokens):
    return [
        {"ranks": 2, "function": "scaling_rows", "folder": folder / kind, "options": {"strategies": strategies}}
        for kind, strategies in ROWS.items()
    ]


def test_no_row_is_left_out(monkeypatch):
    """But those whose kernels run on GPUs alone."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = {name for name in importlib.import_module("scaling").STRATEGIES if "one" not in name.split()}
    names = {name for name in names if not name.endswith(("ctas", "waiting", "graphs", "100 mb"))}
    assert names - {"float8 ddp", "float8 fsdp2"} == {*ROWS["ternary"], *ROWS["dense"]}


@pytest.mark.parametrize("kind", ROWS)
def test_rows(forked_runs, kind):
    folder = forked_runs / "test_benchmark_rows" / kind
    assert not any(statuses(folder)), (folder / "rank0.log").read_text()[-3000:]
    rows, others = (json.loads((folder / f"rows{rank}.json").read_text()) for rank in range(2))
    assert rows == others
    for name, row in rows.items():
        assert row["away"] < (0.1 if kind == "float8" else 0.01), name
        assert row["wire_mib"] > 0, name
    if kind == "dense":  # Half as many bytes as in float32, three times: two gathers, and a reduce-scatter.
        assert rows["bf16 fsdp2"]["wire_mib"] < 0.75 * rows["bf16 ddp"]["wire_mib"]
    if kind == "ternary":
        assert rows["fsdp2 packed"]["wire_mib"] < 0.8 * rows["ddp"]["wire_mib"] < rows["fsdp2 latent"]["wire_mib"]
