"""CUDA graphs of the step on several ranks, as far as CPU processes go: the same to the last bit as without graphs."""

from __future__ import annotations

import pytest

from tests.distributed.forked_runs import statuses

JOBS = ("graphed", "graphed_sharded", "graphed_fabric", "graphed_bare")


def jobs_of_ranks(folder, tokens):
    return [{"ranks": 2, "function": name, "folder": folder / name} for name in JOBS]


@pytest.mark.timeout(900)  # The first of these tests runs the jobs of all.
@pytest.mark.parametrize("job", JOBS)
def test_a_replay_sends_gradients_as_a_backward_does(job, forked_runs):
    folder = forked_runs / "test_graphs_of_ranks" / job
    assert statuses(folder) == [0, 0], [(folder / f"rank{rank}.log").read_text() for rank in (0, 1)]
