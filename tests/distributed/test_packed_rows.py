"""Latent weights are sharded by rows. Every rank computes what one process computes, to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sbn_lightning.distributed.rows import RowCut

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_cut_is_that_of_a_dtensor(rows, ranks):
    whole = torch.arange(rows)
    cuts = [RowCut(rows, rank, ranks) for rank in range(ranks)]
    chunks = list(whole.chunk(ranks)) + [whole[:0]] * ranks  # torch.chunk returns no empty chunks
    for cut, chunk in zip(cuts, chunks, strict=False):
        assert torch.equal(cut.mine(whole), chunk)
        assert len(cut.pad(cut.mine(whole))) == cut.padded
    assert sum(cut.count for cut in cuts) == rows


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_equals_one_process(ranks, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "tests.distributed.packed_worker", str(ranks), str(tmp_path / "meeting")]
    workers = [subprocess.Popen([*command, str(rank)], env=environment, cwd=ROOT) for rank in range(ranks)]
    try:
        assert [worker.wait(240) for worker in workers] == [0] * ranks
    finally:
        for worker in workers:
            worker.kill()
