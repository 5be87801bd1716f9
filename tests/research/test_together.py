"""Students that share a teacher learn what they would learn alone."""

import pytest
import torch

from research.pretrained.together import SharedTeacher
from research.pretrained.train import FILE
from research.queue import read_rows
from sbn_lightning.core.errors import ConfigError
from tests.distributed.forked_runs import statuses

pytestmark = pytest.mark.timeout(900)  # The first of these tests runs the jobs of all.
PATTERNS = ["2:4", "8:8"]


def jobs_of_ranks(folder, tokens):
    return [
        {"ranks": ranks, "function": "students", "folder": folder / name, "options": {"patterns": PATTERNS}}
        for name, ranks in (("alone", 1), ("together", 2))
    ]


def test_students_of_a_shared_teacher_are_those_of_teachers_of_their_own(forked_runs):
    found = {}
    for name in ("alone", "together"):
        folder = forked_runs / "test_together" / name
        assert not any(statuses(folder)), [log.read_text()[-1500:] for log in folder.glob("*.log")]
        rows = read_rows(folder / FILE)
        found[name] = {row["trial"]["name"]: row["held_out"] for row in rows if row["finished"]}
        stopped = {row["trial"]["name"]: row["tokens"] for row in rows if not row["finished"]}
    assert found["together"] == found["alone"]
    assert len(found["alone"]) == 2
    assert stopped == {"both 2:4": 2 * 16, "both 8:8": 2 * 16}  # Both stopped where one of them was late.


def test_students_with_different_seeds_are_refused(monkeypatch):
    """A student with another seed would learn from the teacher's states of other windows."""
    shared = object.__new__(SharedTeacher)
    shared.count = 2
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda found, mine: found.extend([mine, (3, 7, 1)]))
    with pytest.raises(ConfigError, match="step, number of steps and seed"):
        shared.check(3, 7, 0)
