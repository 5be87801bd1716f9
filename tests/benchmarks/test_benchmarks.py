"""The parts of the benchmarks that a CPU can run: their rows, and a small model through the generation benchmark."""

import argparse
import csv
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ENVIRONMENT = {"gpu": "none", "torch": "2", "triton": "3", "driver": "1", "clocks": "0"}


class WallClockEvent:
    """A ``torch.cuda.Event`` for a machine without a GPU."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: "WallClockEvent") -> float:
        return 1e3 * (later.at - self.at)


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    common = importlib.import_module("common")
    monkeypatch.setattr(common, "environment", lambda: ENVIRONMENT)
    monkeypatch.setattr(common, "RESULTS", tmp_path)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_replaced_by_key() -> None:
    common = importlib.import_module("common")
    path = common.fresh_results("made_up")
    for name, batch, ms in (("a, b", 1, 1 / 3), ("a, b", 4, 2.0), ("c", 1, 3.0)):
        common.append(path, {"name": name, "batch": batch, "ms": ms, "note": ""}, ("name", "batch"))
    before = path.read_bytes()
    assert common.fresh_results("made_up", keep=True, columns=("name", "batch", "ms", "note")).read_bytes() == before
    common.append(path, {"name": "a, b", "batch": 1, "ms": 9.0, "note": ""}, ("name", "batch"))
    assert [(row["name"], row["batch"], row["ms"]) for row in read(path)] == [
        ("a, b", "4", "2"),
        ("c", "1", "3"),
        ("a, b", "1", "9"),
    ]
    common.append(path, {"name": "c", "batch": 1, "ms": 4.0, "note": ""})
    assert len(read(path)) == 4
    before = path.read_bytes()
    with pytest.raises(ValueError, match="another benchmark or version"):
        common.append(path, {"name": "c", "ms": 4.0})
    with pytest.raises(ValueError, match="another benchmark or version"):
        common.fresh_results("made_up", keep=True, columns=("name", "ms"))
    assert path.read_bytes() == before
    assert not common.fresh_results("made_up").exists()


@pytest.fixture
def generation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark with tiny models on a CPU."""
    module = importlib.import_module("generation")
    tiny = {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ffn": 64}
    monkeypatch.setitem(module.QWEN2_5_SHAPES, "qwen2.5-0.5b", tiny)
    small = {
        "VARIANTS": {k: (*v[:2], "reference") for k, v in module.VARIANTS.items()},
        "DEVICE": torch.device("cpu"),
        "PREFILL_LENGTH": 16,
        "SHORT_LENGTH": 8,
        "COPIED": 1 << 16,
    }
    for part in (module, *map(importlib.import_module, ("generation_table", "generation_transformers"))):
        for name in small.keys() & vars(part).keys():
            monkeypatch.setattr(part, name, small[name])
    monkeypatch.setattr(torch.cuda, "Event", WallClockEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return module


ARGUMENTS = argparse.Namespace(phases=["prefill", "decode"], batches=[1, 6], context=8, steps=8, compile=False)


def test_generation_rows(generation: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    generation.exact_gate()
    table = generation.Table(tmp_path / "rows.csv", "qwen2.5-0.5b")
    generation.ours(table, "bf16 dense", ARGUMENTS)
    rounded, one_kernel = "2:4, 8-bit head", [name for name in generation.VARIANTS if generation.PERSISTENT in name]
    assert len(one_kernel) == 2
    for variant in ("2:4", rounded, *one_kernel):  # One kernel needs a GPU, and says so.
        generation.ours(table, variant, ARGUMENTS)
    generation.huggingface(table, ARGUMENTS)
    rows = read(table.path)
    assert tuple(rows[0])[: len(generation.COLUMNS)] == generation.COLUMNS
    prefill, short = [("prefill", "1"), ("prefill", "6")], [("prefill 512", "1")]
    decode = [("decode", "1"), ("decode", "6")]
    expected = {"bf16 dense": prefill + short + decode, "2:4": prefill + short + decode}
    expected |= {rounded: decode} | {variant: [] for variant in one_kernel}
    peers = importlib.import_module("generation_transformers")
    expected |= {peers.TRANSFORMERS: prefill + decode, peers.TRANSFORMERS_BEST: decode}
    for variant, cells in expected.items():
        assert [(row["what"], row["batch"]) for row in rows if row["variant"] == variant] == cells, variant
    assert all((float(row["bandwidth"]) > 0) if row["what"] == "decode" else not row["bandwidth"] for row in rows)
    assert all(row["vs_bf16"] for row in rows)
    assert not table.missing
    for row in rows:
        tokens = int(row["batch"]) * {"prefill": 16, "prefill 512": 8}.get(row["what"], 1)
        assert float(row["tokens_s"]) == pytest.approx(1e3 * tokens / float(row["ms"]), rel=1e-4)


def test_generation_without_bf16_has_no_ratio(generation: ModuleType, tmp_path: Path) -> None:
    table = generation.Table(tmp_path / "rows.csv", "qwen2.5-0.5b")
    generation.ours(table, "2:4", argparse.Namespace(**vars(ARGUMENTS) | {"phases": ["decode"]}))
    assert [(row["batch"], row["vs_bf16"]) for row in read(table.path)] == [("1", ""), ("6", "")]


def test_a_batch_that_fails_does_not_end_the_run(
    generation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode_ms(model: object, batch: int, context: int, steps: int, step: str) -> float:
        if batch == 1:
            raise torch.OutOfMemoryError("out of memory\nmuch more of it")
        return 2.0

    monkeypatch.setattr(generation, "decode_ms", decode_ms)
    table = generation.Table(tmp_path / "rows.csv", "qwen2.5-0.5b")
    generation.ours(table, "bf16 dense", argparse.Namespace(**vars(ARGUMENTS) | {"phases": ["decode"]}))
    assert [row["batch"] for row in read(table.path)] == ["6"]
    assert table.missing == ["qwen2.5-0.5b, bf16 dense, decode, batch 1"]


def test_drawn_tokens_rows(generation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = importlib.import_module("drawn_tokens")
    small = {"DEVICE": torch.device("cpu"), "CONTEXT": 8, "CHECKED_STEPS": 2, "WINDOW": 1, "WINDOWS": 1}
    for name, value in small.items():
        monkeypatch.setattr(drawn, name, value)
    path, model = tmp_path / "rows.csv", generation.build("qwen2.5-0.5b", "2:4", 64)
    drawn.measure(path, "qwen2.5-0.5b", model, "graph", 2, list(drawn.CHOICES))
    rows = read(path)
    assert [row["choice"] for row in rows] == list(drawn.CHOICES)
    alone = float(rows[0]["ms"])
    for row in rows[1:]:
        assert float(row["choice_us"]) == pytest.approx(1e3 * (float(row["ms"]) - alone), rel=1e-3, abs=1.0)
    own = drawn.Decoder.step_next
    monkeypatch.setattr(drawn.Decoder, "step_next", lambda self, tokens: (own(self, tokens) + 1) % 151936)
    with pytest.raises(AssertionError, match="greedy, token 0: the graph gives"):
        drawn.measure(path, "qwen2.5-0.5b", model, "graph", 2, ["greedy"])


def test_first_token_rows(generation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The times of a process in this one; and a row of what a process says."""
    first_token = importlib.import_module("first_token")
    monkeypatch.setattr(first_token, "VARIANTS", {"2:4": ("ternary", "2:4", "reference")})
    times = first_token.run("qwen2.5-0.5b", "2:4", 8, device="cpu")
    assert set(times) == {"start_up_s", "cold_ms", "graph_ms", "warm_ms"}
    assert all(value > 0 for value in times.values())
    said = argparse.Namespace(stdout=f"a warning\n{json.dumps(times)}\n")
    monkeypatch.setattr(first_token.subprocess, "run", lambda command, **options: said)
    first_token.measure(["qwen2.5-0.5b"], ["2:4"], 8)
    (row,) = read(tmp_path / "first_token.csv")
    assert tuple(row)[: len(first_token.COLUMNS)] == first_token.COLUMNS
    assert float(row["cold_ms"]) == pytest.approx(times["cold_ms"], rel=1e-4)


def test_summary_of_generation(tmp_path: Path) -> None:
    """Add rows to the CSV of the repository: the table has every batch of both phases in order, with the newest row."""
    render = importlib.import_module("render")
    shown = ("bf16 dense", "2:4", "6:8", "transformers generate")
    rows = [row for row in read(BENCHMARKS / "results" / "generation.csv") if row["variant"] in shown]

    def add(what: str, batch: int, variant: str, rate: float, ratio: str, measured: str = "2099") -> None:
        cell = {"model": "qwen9", "what": what, "batch": str(batch), "variant": variant}
        rows.append({**rows[0], **cell, "tokens_s": str(rate), "vs_bf16": ratio, "measured": measured})

    for batch in (64, 16, 4, 1):
        add("decode", batch, "transformers generate", 100 * batch, "0.1")
        add("decode", batch, "bf16 dense", 1000 * batch, "1")
        add("prefill", batch, "2:4", 2000 * batch, "2")
    add("prefill", 64, "bf16 dense", 64000, "1")
    add("prefill", 64, "transformers generate", 32000, "")
    add("decode", 1, "bf16 dense", 7, "1", measured="2026")  # an older row that comes later in the file
    path = tmp_path / "generation.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = render.summarize(path)
    assert text.splitlines()[2] == "| tokens/s | bf16 dense | 2:4 | 6:8 | transformers generate |"
    assert "\n".join(line for line in text.splitlines() if "qwen9" in line) == (
        "| qwen9, prefill, batch 1 |  | 2,000 (2.00x) |  |  |\n"
        "| qwen9, prefill, batch 4 |  | 8,000 (2.00x) |  |  |\n"
        "| qwen9, prefill, batch 16 |  | 32,000 (2.00x) |  |  |\n"
        "| qwen9, prefill, batch 64 | 64,000 | 128,000 (2.00x) |  | 32,000 |\n"
        "| qwen9, decode, batch 1 | 1,000 |  |  | 100 (0.10x) |\n"
        "| qwen9, decode, batch 4 | 4,000 |  |  | 400 (0.10x) |\n"
        "| qwen9, decode, batch 16 | 16,000 |  |  | 1,600 (0.10x) |\n"
        "| qwen9, decode, batch 64 | 64,000 |  |  | 6,400 (0.10x) |"
    )
    assert len(text.splitlines()) == 4 + len({(row["model"], row["what"], row["batch"]) for row in rows})


def line(run: int, count: int, milliseconds: float, masks: bool = True, rank: int = 0) -> str:
    """What a process of the scaling benchmark prints for a row."""
    row = {"run": run, "rank": rank, "accumulate": count, "ms": milliseconds, "peak_gib": 1.0, "wire_mib": 5.0}
    return json.dumps(row | {"same_masks": masks})


def test_scaling_rows(tmp_path: Path) -> None:
    """The batch has a default; rows name the link if there is one; a ratio needs the slowest GPU alone."""
    scaling = importlib.import_module("scaling")
    options = {"run": None, "sequences": None, "accumulate": None, "gradients": ["int8"]}
    shapes = ["qwen2.5-0.5b", "qwen2.5-3b"]
    args = argparse.Namespace(**options, shapes=shapes, strategies=["ddp", "one", "fsdp2 packed"])
    runs = scaling.runs_of(args)
    assert [(run.sequences, run.counts) for run in runs] == [(8, [2])] * 6
    printed = ["Trainer stopped", line(1, 2, 500.0), line(1, 2, 480.0, rank=1)]
    printed += [line(4, 2, 100.0), line(4, 2, 100.0)]  # No row of run 4: the other GPU has not ended.
    printed += [json.dumps({"link_gb_per_s": 300.0}), line(0, 2, 500.0), line(2, 2, 1.0, False)]
    table = scaling.Table(tmp_path / "scaling.csv", 2)
    for text in printed:
        table.take(runs, text)
    assert table.measured == [(runs[i], 2) for i in (1, 0, 2)]
    rows = read(table.path)
    assert [(row["strategy"], row["tokens_per_s"], row["scaling"], row["link_gb_per_s"]) for row in rows] == [
        ("one", "65536", "1", ""),
        ("ddp", "131072", "1", "300"),
    ]
    assert tuple(rows[0])[: len(scaling.COLUMNS)] == scaling.COLUMNS
    assert table.missing == [
        "qwen2.5-0.5b fsdp2 packed, int8 gradients, 2 micro-batches: ranks hold different masks",
    ]
    table.alone.clear()
    table.add(runs[0], json.loads(line(0, 8, 500.0)))
    assert [(row["strategy"], row["scaling"]) for row in read(table.path)] == [("one", "1"), ("ddp", "1"), ("ddp", "")]
    args.run = [["qwen2.5-3b", "bf16 one", "bf16", "2,1"]]
    assert scaling.runs_of(args) == [scaling.Run("qwen2.5-3b", "bf16 one", "bf16", 8, [2, 1])]


@pytest.mark.parametrize(
    ("begun", "ended", "failed", "left"),
    [
        ([(1, 0), (1, 1), (4, 0)], [], 1, [0, 2, 3, 4, 5]),  # The other GPU was ahead.
        ([(1, 0), (1, 1), (4, 0)], [0], 4, [0, 1, 2, 3, 5]),  # The GPU that failed was ahead.
        ([(1, 0), (1, 1), (4, 0)], [0], None, [0, 2, 3, 4, 5]),  # The time was up.
        ([(1, 0), (1, 1), (0, 0)], [0, 1], 0, [2, 3, 4, 5]),
        ([(1, 0), (1, 1), (0, 0)], [0, 1], None, [2, 3, 4, 5]),
        ([], [], None, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_what_scaling_goes_on_with(
    begun: list[tuple[int, int]], ended: list[int], failed: int | None, left: list[int], tmp_path: Path
) -> None:
    """A run that failed is not tried again. What other GPUs ran meanwhile is tried again, on all GPUs."""
    scaling = importlib.import_module("scaling")
    options = {"run": None, "sequences": None, "accumulate": [2], "gradients": ["int8"]}
    strategies = ["ddp", "one", "fsdp2 packed"]
    runs = scaling.runs_of(argparse.Namespace(**options, shapes=["qwen2.5-0.5b", "qwen2.5-3b"], strategies=strategies))
    table = scaling.Table(tmp_path / "scaling.csv", 2)
    for run, rank in begun:
        table.take(runs, json.dumps({"run": run, "rank": rank, "began": True}))
    for rank in ended:
        table.take(runs, line(1, 2, 500.0, rank=rank))
    if failed is not None:
        table.take(runs, json.dumps({"run": failed, "failed": True}))
    again = table.left(runs)
    assert [runs.index(run) for run in again] == left
    if runs[1] in again:  # What a GPU measured beside processes that failed does not count.
        table.take(again, line(again.index(runs[1]), 2, 400.0, rank=1))
        assert not table.measured
    assert table.left(again) == again  # Nothing began.


def test_the_steps_of_a_scaling_run() -> None:
    """Lightning counts batches from the start, so a step may only begin at a multiple of its micro-batches."""
    rank = importlib.import_module("scaling_rank")
    for counts in ([2], [2, 8, 1], [2, 1, 8], [4], [1], [16, 1]):
        steps = rank.plan(counts, 4, wire=True, profile=True)
        before = 0
        for step in steps:
            assert before % step.batches == 0
            before += step.batches
        assert {step.batches for step in steps if step.what == "timed"} == set(counts)
        assert [step.batches for step in steps if step.what == "profile"] == [counts[0]] * 3
        assert steps[0].what == "warm"
    shortest = [rank.Step(2, "warm")] * 2 + [rank.Step(2, "timed")] * 2 + [rank.Step(8, "timed")]
    assert rank.plan([2, 8], 2, wire=False, profile=False) == shortest


def test_a_run_that_fails_or_takes_too_long_leaves_no_process() -> None:
    """A process that sleeps on would take longer than a test may."""
    ranks = importlib.import_module("processes").Ranks
    code = "import os, sys, time; print(os.environ['LOCAL_RANK'], flush=True); "
    fails = code + "sys.exit(3) if os.environ['LOCAL_RANK'] == '1' else time.sleep(600)"
    assert ranks([sys.executable, "-c", fails], 2, {}).finish(30)[1] == "exit status 3"
    assert ranks([sys.executable, "-c", code + "time.sleep(600)"], 2, {}).finish(3)[1] == "killed after 3 seconds"
    lines: list[str] = []
    printed, failure = ranks([sys.executable, "-c", code], 2, {}).finish(30, lines.append)
    assert (sorted(printed.split()), failure) == (sorted(lines), "") == (["0", "1"], "")


def test_a_process_that_nobody_waits_for_does_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    processes = importlib.import_module("processes")
    monkeypatch.setenv(processes.TURN, str(tmp_path / "removed" / "turn"))
    with pytest.raises(SystemExit, match="the process that has started this one has ended"):
        processes.wait_for_turn()


def test_all_rows_of_scaling() -> None:
    scaling = importlib.import_module("scaling")
    args = argparse.Namespace(
        run=None, sequences=None, accumulate=[1, 2, 8], gradients=["bf16", "int8"], shapes=list(scaling.BATCHES),
        strategies=list(scaling.STRATEGIES),
    )  # fmt: skip
    found = scaling.runs_of(args)
    ours = [name for name in scaling.STRATEGIES if not name.startswith(("bf16", "float8"))]
    assert len({run[:3] for run in found}) == len(found) == 3 * (2 * len(ours) + len(scaling.STRATEGIES) - len(ours))
    assert all(run.counts == [1, 2, 8] for run in found)
