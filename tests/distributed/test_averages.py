"""Averaged weights under the sharded strategy are those of one process."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.forked_runs import statuses

pytestmark = pytest.mark.timeout(900)  # The first of these tests runs the jobs of all.
# The number of ranks, and the run that is continued from its third step.
RUNS = {"alone": (1, None), "sharded": (2, None), "sharded on": (2, "alone"), "alone on": (1, "sharded")}


def jobs_of_ranks(folder, tokens):
    return [
        {
            "ranks": ranks,
            "function": "averaged",
            "folder": folder / name,
            "options": {"first": None if first is None else str(folder / first)},
        }
        for name, (ranks, first) in RUNS.items()
    ]


@pytest.fixture(scope="module")
def seen(forked_runs):
    folder = forked_runs / "test_averages"
    for name in RUNS:
        assert not any(statuses(folder / name)), (folder / name / "rank0.log").read_text()[-2000:]
    return {name: torch.load(folder / name / "rank0.pt", weights_only=True) for name in RUNS}


@pytest.mark.parametrize("name", list(RUNS)[1:])
def test_validations_see_the_average_and_training_does_not(name, seen):
    alone, other = seen["alone"], seen[name]
    for key in ("losses", "validations"):
        assert other[key] == pytest.approx(alone[key][-len(other[key]) :], rel=1e-6)
    for masks, expected in zip(other["masks"], alone["masks"][-len(other["masks"]) :], strict=True):
        assert all(torch.equal(mask, one) for mask, one in zip(masks, expected, strict=True))
    assert [len(seen[run]["validations"]) for run in RUNS] == [2, 2, 1, 1]


@pytest.mark.parametrize("file", ["step=3.ckpt", "end.ckpt"])
def test_a_checkpoint_has_the_average_and_the_trained_weights(file, seen, forked_runs):
    alone, sharded = (
        torch.load(forked_runs / "test_averages" / name / file, weights_only=False) for name in ("alone", "sharded")
    )
    assert sharded["averaging_state"] == alone["averaging_state"]
    for key in ("state_dict", "current_model_state"):
        assert list(sharded[key]) == list(alone[key])
        for name, value in alone[key].items():
            torch.testing.assert_close(sharded[key][name], value, rtol=1e-5, atol=1e-5)
    differs = [not torch.equal(value, sharded["current_model_state"][k]) for k, value in sharded["state_dict"].items()]
    assert any(differs) == (file != "end.ckpt")  # After training the model has the average.
