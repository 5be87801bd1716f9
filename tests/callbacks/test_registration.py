"""A new callback needs one file and one entry in a table. The test follows a toy from a recipe to the checkpoint."""

import sys
from pathlib import Path

import pytest
import torch
import yaml

from sbn_lightning import callbacks
from sbn_lightning.callbacks.base import StepCallback, require_masked_layers
from sbn_lightning.cli import main
from tests.cli.test_cli import RECIPE, error_of, small


class ZeroCounter(StepCallback):
    """Count masked weights after every ``every``-th optimiser step.

    Args:
        every: The number of optimiser steps between counts.
    """

    needs_masked_layers = True

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.every = every
        self.counts: list[int] = []

    def on_step(self, trainer, module, step):
        if step % self.every == 0:
            layers = require_masked_layers(self, module).values()
            self.counts.append(sum(int((~layer.mask).sum()) for layer in layers))

    def state_dict(self):
        return {"counts": self.counts}

    def load_state_dict(self, state_dict):
        self.counts = list(state_dict["counts"])


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sbn"])
    monkeypatch.setitem(callbacks.RECIPE_GROUPS, "zero_counter", ZeroCounter)


@pytest.mark.parametrize("loop", ["fit", "fabric"])
def test_a_registered_callback_has_a_key_in_recipes_and_its_state_in_checkpoints(tokens, loop):
    Path("count.yaml").write_text(yaml.safe_dump({"zero_counter": {"every": 2}}))
    words = [loop, "--config", str(RECIPE), "--config", "count.yaml", *small(tokens, "--trainer.max_steps=3")]
    assert main(words) == 0
    saved = torch.load("logs/sparse_pretrain/version_0/checkpoints/last.ckpt", weights_only=True)["callbacks"]
    zeros, later = saved["ZeroCounter"]["counts"]  # before training, and after step 2
    assert zeros == later > 0


def test_its_errors_are_one_line_and_a_dense_model_goes_without(tokens, capsys):
    words = ["fit", "--config", str(RECIPE), *small(tokens)]
    assert "did you mean zero_counter.every?" in error_of(capsys, main([*words, "--zero_counter.evry=2"]))
    assert main([*words, "--model.config.linear=dense"]) == 0
    saved = torch.load("logs/sparse_pretrain/version_0/checkpoints/last.ckpt", weights_only=True)["callbacks"]
    assert "ZeroCounter" not in saved
