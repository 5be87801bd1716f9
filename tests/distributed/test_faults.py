"""One rank of two fails. Every rank ends soon, with the cause that the failing rank had, and no checkpoint is lost."""

from __future__ import annotations

import json

import pytest

from sbn_lightning.checkpoints.resume import why_unreadable

pytestmark = pytest.mark.timeout(900)  # The first of these tests runs the jobs of all.
# What fails, the rank, what each rank says, and the last step that is saved.
FAULTS = {
    "killed": (1, ("rank 1: gone without a word for 2 seconds; was it killed?", ""), 2),
    "memory": (1, ("rank 1: OutOfMemoryError: CUDA out of memory", "OutOfMemoryError: CUDA out of memory"), 2),
    "disk": (0, ("No space left on device", "rank 0: DataError: cannot write the checkpoint"), 1),
    "shard": (1, ("DataError: cannot write the checkpoint",) * 2, 1),
    "recipe": (1, ("rank 1 has another recipe than rank 0: trainer.max_steps=6, not 5",) * 2, 0),
}


def jobs_of_ranks(folder, tokens):
    return [
        {"ranks": 2, "function": "fail", "folder": folder / kind, "options": {"kind": kind, "rank": rank}}
        for kind, (rank, _, _) in FAULTS.items()
    ]


@pytest.mark.parametrize("kind", FAULTS)
def test_all_ranks_end_with_the_cause_of_the_one_that_failed(kind, forked_runs):
    failed = forked_runs / "test_faults"
    rank, told, saved = FAULTS[kind]
    done = json.loads((failed / kind / "done.json").read_text())
    logs = [(failed / kind / f"rank{i}.log").read_text() for i in range(2)]
    assert done["seconds"] < 60
    assert done["statuses"] == [-9 if kind == "killed" and i == rank else 1 for i in range(2)], logs
    for text, log in zip(told, logs, strict=True):
        assert text in log
    steps = sorted(failed.glob(f"{kind}/step=*.ckpt"))
    assert [file.stem for file in steps if why_unreadable(file) == ""] == [f"step={i}" for i in range(1, saved + 1)]
    assert len(steps) == saved + (kind == "shard")  # The folder that could not be written tells that it is not whole.
