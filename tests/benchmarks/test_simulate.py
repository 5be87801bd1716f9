"""The model of scaling keeps to the laws that any such model has to obey."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

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
