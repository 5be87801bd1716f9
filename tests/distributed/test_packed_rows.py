"""Latent weights are sharded by rows. Every rank computes what one process computes, to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sbn_lightning.distributed.rows import RowCut, decode, encode
from sbn_lightning.sparsity.pattern import NMPattern, pack_mask, top_n_mask

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


def test_parts_of_a_fused_weight_that_a_cut_goes_through():
    sizes = (3, 1, 4)
    assert RowCut(8, 0, 3).parts(sizes) == [(0, 3)]
    assert RowCut(8, 1, 3).parts(sizes) == [(1, 1), (2, 2)]
    assert RowCut(8, 2, 3).parts(sizes) == [(2, 2)]
    assert RowCut(8, 0, 1).parts(None) == [(0, 8)]


@pytest.mark.parametrize("pattern", ["2:4", "6:8", "1:1", "2:3"])
def test_codes_and_mask_travel_in_two_bits(pattern):
    pattern = NMPattern.parse(pattern)
    weight = torch.randn(7, 4 * pattern.m + pattern.m)
    mask = top_n_mask(weight, pattern)
    codes = (weight.round().clamp(-1, 1) * mask).to(torch.int8)
    words = encode(codes, mask)
    assert words.shape == (7, -(-weight.shape[1] // 4))
    assert words.dtype == torch.uint8
    same_codes, bits = decode(words, weight.shape[1])
    assert torch.equal(same_codes, codes)
    assert torch.equal(bits, pack_mask(mask))


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
