"""Runs under ``sbn_fsdp2`` on other numbers of ranks: checkpoints of two ranks, and hybrid sharding on four."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.forked_runs import statuses

pytestmark = pytest.mark.timeout(900)  # The first of these tests runs the jobs of all.
STEPS, SAVED = 4, 2
ONWARD = {
    "one": (1, "whole", {}),
    "three": (3, "whole", {"gather": "packed_layer"}),
    "four": (4, "whole", {"replicate": 2}),
    "one of shards": (1, "shards", {"save_distributed_checkpoint": True}),
    "three of shards": (3, "shards", {"save_distributed_checkpoint": True}),
    "four of shards": (4, "shards", {"save_distributed_checkpoint": True, "gather": "packed_layer"}),
    "two of background": (2, "background", {"save_distributed_checkpoint": True}),
}


def jobs_of_ranks(folder, tokens):
    jobs = []
    shards = {"save_distributed_checkpoint": True}
    ways = (("whole", {}), ("shards", shards), ("background", shards | {"save_in_background": True}))
    for name, options in ways:
        job = {"ranks": 2, "function": "resume", "folder": folder / name}
        jobs.append(job | {"options": {"name": "all", "steps": STEPS, **options}})
    for name, (ranks, before, options) in ONWARD.items():
        checkpoint = {"checkpoint": str(folder / before / f"step={SAVED}.ckpt")}
        job = {"ranks": ranks, "function": "resume", "folder": folder / name}
        jobs.append(job | {"options": {"name": "rest", "steps": STEPS, **checkpoint, **options}})
    jobs.append({"ranks": 4, "function": "hybrid", "folder": folder / "hybrid"})
    return (
        jobs
        + [{"ranks": 2, "function": name, "folder": folder / name} for name in ("wire", "validated", "distilled")]
        + [{"ranks": 2, "function": "background", "folder": folder / "slow"}]
    )


@pytest.fixture
def folder(forked_runs):
    """The folder with the losses of all runs."""
    return forked_runs / "test_other_ranks"


@pytest.mark.parametrize("name", ONWARD)
def test_a_run_on_two_ranks_goes_on_on_another_number(name, folder):
    ranks, before, _ = ONWARD[name]
    expected = torch.load(folder / before / "all.rank0.pt")
    assert len(expected) == STEPS
    for rank in range(ranks):
        assert torch.load(folder / name / f"rest.rank{rank}.pt") == pytest.approx(expected[SAVED:], rel=1e-5)


def test_hybrid_sharding_on_four_ranks_equals_one_process(folder):
    """The replicas hold the same rows; gradients go to the rows' owners and then across the replicas."""
    assert statuses(folder / "hybrid") == [0] * 4, (folder / "hybrid/rank0.log").read_text()


def test_bytes_on_the_wire_are_counted_as_they_are_sent(folder):
    assert statuses(folder / "wire") == [0] * 2, (folder / "wire/rank0.log").read_text()


def test_a_validation_before_a_training_changes_nothing(folder):
    """What FSDP2 gathers into in the inference mode of a validation could not be used in training."""
    assert statuses(folder / "validated") == [0] * 2, (folder / "validated/rank0.log").read_text()


def test_distilled_students_on_two_ranks_equal_one_process(folder):
    """Each rank has the whole teacher. Rank 1 has no answers in the runs on answers alone."""
    assert statuses(folder / "distilled") == [0] * 2, (folder / "distilled/rank0.log").read_text()


def test_training_goes_on_while_a_checkpoint_is_written(folder):
    """The checkpoint before it stays until the new one is complete. A full disk is an error on all ranks."""
    assert statuses(folder / "slow") == [0] * 2, (folder / "slow/rank0.log").read_text()
