"""Steps of several micro-batches under FSDP2 on two processes."""

import json

import pytest

from sbn_lightning import UnshardedAccumulation
from tests.distributed.steps_worker import LAYER, NON_FINITE

pytestmark = pytest.mark.timeout(900)  # The first of these tests runs the jobs of all.
ELSEWHERE, EARLIER = "in optimiser step 1 on another process; there is", "; it came with an earlier micro-batch"
NAMED = f"; it begins in {LAYER}: its output is not finite"
ERRORS = {
    "first of one": (EARLIER, ELSEWHERE),
    "last of one": (NAMED, ELSEWHERE),
    "first of one, last of the other": (EARLIER, NAMED),
    "first of both": (EARLIER, EARLIER),
}


def jobs_of_ranks(folder, tokens):
    return [{"ranks": 2, "function": "spoilt", "folder": folder}]


@pytest.fixture
def seen(forked_runs):
    """What each rank saw."""
    folder = forked_runs / "test_accumulated_steps"
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", NON_FINITE)
def test_a_nan_on_one_rank_stops_all_and_each_says_what_it_knows(name, seen):
    for rank, expected in zip(seen, ERRORS[name], strict=True):
        assert expected in rank[name]


def test_the_callback_of_version_0_1_0_says_what_to_use():
    with pytest.warns(DeprecationWarning, match="sbn_fsdp2"):
        UnshardedAccumulation()
