"""torchrun starts the ranks of ``sbn fit`` again after one was killed, and the run goes on where it was saved."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.forked_runs import statuses

pytestmark = pytest.mark.timeout(900)  # The first of these tests runs the jobs of all.


def jobs_of_ranks(folder, tokens):
    return [{"ranks": 1, "function": "restart", "folder": folder / "killed", "options": {"tokens": str(tokens)}}]


def test_torchrun_goes_on_from_the_last_checkpoint(forked_runs):
    folder = forked_runs / "test_restart/killed"
    log = (folder / "rank0.log").read_text()
    assert statuses(folder) == [0], log
    (last,) = folder.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 4
    assert "training starts anew" in log  # the first time
    assert "ends because of rank 1: gone without a word" in log
    assert f"Restored all states from the checkpoint at {last.relative_to(folder)}" in log
