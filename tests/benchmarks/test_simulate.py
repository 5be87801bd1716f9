"""The model of scaling keeps to the laws that any such model has to obey."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import simulate
from simulate import measured
from simulate_model import BUSY, SHAPES, Cluster, Plan, memory, scaling, step


def test_one_gpu_sends_nothing():
    found = step(SHAPES[0], Cluster(1, 50), Plan())
    assert (found.words, found.gradients, found.rest, found.gib) == (0, 0, 0, 0)
    assert found.total == found.compute


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("gather", ["packed_step", "packed_layer", "bf16", "ddp"])
def test_a_slower_link_or_more_gpus_never_help(shape, gather):
    plan = Plan(gather=gather)
    by_size = [scaling(shape, Cluster(gpus, 50), plan) for gpus in (1, 8, 64, 1024)]
    assert by_size == sorted(by_size, reverse=True)
    assert by_size[1] <= 1 / BUSY
    assert scaling(shape, Cluster(64, 50), plan) <= scaling(shape, Cluster(64, 400), plan)


def test_bytes_on_the_wire():
    """An eighth of a rank's bytes are its own. Gradients take 2 bytes. Dense bfloat16 gathers each weight twice."""
    shape, eight = SHAPES[2], Cluster(8, 400)
    own, gib = 7 / 8, 2**30
    packed = step(shape, eight, Plan()).gib
    assert packed == pytest.approx(own * ((0.25 + 2) * shape.ternary + (4 + 2) * shape.rest) / gib)
    dense = step(shape, eight, Plan(gather="bf16")).gib
    assert dense == pytest.approx(own * (6 * shape.ternary + 4 * shape.rest) / gib)


@pytest.mark.parametrize("gpus", [2, 8])
def test_one_host_needs_no_link_to_others(gpus):
    """The rate inside is the bus bandwidth of an all-reduce: 2 (n - 1) / n of its bytes over its time."""
    found = Cluster(gpus, 1).all_reduce(1e12)
    assert found == Cluster(gpus, 400).all_reduce(1e12)
    assert found == pytest.approx(2 * (gpus - 1) / gpus * 1e12 / 312e9, rel=1e-4)


@pytest.mark.parametrize(("gpus", "least"), [(9, 1), (12, 4), (16, 8), (20, 4), (24, 8)])
def test_the_smallest_host_has_the_fewest_links(gpus, least):
    """In an all-gather a host receives what the other hosts have, over the links of its own GPUs."""
    cluster = Cluster(gpus, 50)
    seconds = 1e12 * (gpus - least) / gpus / least / 6.25e9
    assert cluster.ring(1e12, gpus, cluster.hosts) == pytest.approx(seconds, rel=1e-4)
    assert cluster.all_reduce(1e12) == pytest.approx(2 * seconds, rel=1e-4)


def test_rows_without_a_run_on_one_gpu_are_left_out(tmp_path, monkeypatch):
    rows = simulate.RESULTS.read_text().splitlines()
    row = next(row for row in rows if row.startswith("qwen2.5-1.5b,ddp,2,"))
    names = rows[0].split(",")
    values = dict(zip(names, row.split(","), strict=True)) | {"scaling": ""}
    (tmp_path / "scaling.csv").write_text("\n".join([rows[0], row, ",".join(values[name] for name in names)]) + "\n")
    monkeypatch.setattr(simulate, "RESULTS", tmp_path / "scaling.csv")
    assert [found.gather for found in measured()] == ["ddp"]


def test_states_are_shared_and_words_of_a_step_are_not():
    shape = SHAPES[2]
    two, four = memory(shape, 2, Plan()), memory(shape, 4, Plan())
    assert two["latent weights, float32, sharded"] == 2 * four["latent weights, float32, sharded"]
    words = "packed words, whole, for forward and backward"
    assert two[words] == four[words]
    assert memory(shape, 4, Plan(gather="packed_layer"))[words] < four[words] / 10


def test_the_model_is_near_the_measured_figures():
    rows = measured()
    assert {(row.shape.name, row.gather) for row in rows} >= {
        (a, b) for a in ("1.5B", "3B") for b in ("packed_step", "ddp", "bf16")
    }
    for row in rows:
        near = {"packed_step": 0.06, "ddp": 0.02, "bf16": 0.02}[row.gather]
        assert row.predicted() == pytest.approx(row.ms, rel=near), row
