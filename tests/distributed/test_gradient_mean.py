"""``sbn_ddp`` averages gradients where they lie. The means are those of torch's DDP."""

from __future__ import annotations

import pytest

from sbn_lightning.distributed.strategies import ReplicatedStrategy
from tests.distributed.forked_runs import statuses

JOBS = ("mean", "fabric_mean")


def jobs_of_ranks(folder, tokens):
    return [{"ranks": 2, "function": name, "folder": folder / name} for name in JOBS]


@pytest.mark.timeout(900)  # The first of these tests runs the jobs of all.
@pytest.mark.parametrize("job", JOBS)
def test_means_equal_those_of_torch(job, forked_runs):
    folder = forked_runs / "test_gradient_mean" / job
    assert statuses(folder) == [0, 0], [(folder / f"rank{rank}.log").read_text() for rank in (0, 1)]


def test_an_option_of_torchs_class_lets_torch_do_it():
    assert not ReplicatedStrategy("bfloat16", process_group_backend="gloo", max_ctas=8).by_torch
    assert ReplicatedStrategy(find_unused_parameters=True).by_torch
    assert ReplicatedStrategy(ddp_comm_hook=print).by_torch
