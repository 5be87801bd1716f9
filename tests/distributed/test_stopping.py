"""A SIGTERM to one rank stops all ranks at the same micro-batch."""

from __future__ import annotations

import json

import pytest

from tests.distributed.forked_runs import statuses

pytestmark = pytest.mark.timeout(900)  # The first of these tests runs the jobs of all.


def jobs_of_ranks(folder, tokens):
    return [
        {"ranks": 2, "function": "stopped", "folder": folder / str(rank), "options": {"rank": rank}} for rank in (0, 1)
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_stop_together(rank, forked_runs):
    folder = forked_runs / "test_stopping" / str(rank)
    assert statuses(folder) == [0, 0], (folder / "rank0.log").read_text()
    first, second = (json.loads((folder / f"rank{i}.json").read_text()) for i in (0, 1))
    assert first == second
    assert first["batches"] in ([0, 1, 2], [0, 1, 2, 3])  # The other rank may be in the next micro-batch already.
    assert first["ended"] == "SIGTERMException"
