"""Latent weights are sharded by rows. Every rank computes what one process computes, to the last bit."""

from __future__ import annotations

import pytest
import torch

from sbn_lightning.backends.base import Backend
from sbn_lightning.distributed.packed import PackedRows
from sbn_lightning.distributed.rows import RowCut
from tests.distributed.forked_runs import statuses

pytestmark = pytest.mark.timeout(900)  # The first of these tests runs the jobs of all.
CHECKS = [("layers", 2), ("layers", 3), ("models", 2), ("models", 3), ("models", 4), ("codes", 2), ("scales", 2)]


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


def test_a_sharded_layer_passes_on_what_its_backend_offers():
    offers = {name for name, value in vars(Backend).items() if callable(value) or isinstance(value, property)}
    # No graph records a gather, experts are not sharded, and layers that read the same tokens stay apart.
    declined = {"records", "from_codes", "several"}
    assert {name for name in offers if not name.startswith("_")} - set(vars(PackedRows)) == declined


def jobs_of_ranks(folder, tokens):
    return [
        {"ranks": ranks, "function": "packed", "folder": folder / f"{what}{ranks}", "options": {"what": what}}
        for what, ranks in CHECKS
    ]


@pytest.mark.parametrize(("what", "ranks"), CHECKS)
def test_every_rank_equals_one_process(what, ranks, forked_runs):
    folder = forked_runs / "test_packed_rows" / f"{what}{ranks}"
    assert statuses(folder) == [0] * ranks, (folder / "rank0.log").read_text()
