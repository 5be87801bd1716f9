"""The device of a model under ``ShardedStrategy``, one process under ``ReplicatedStrategy``, and their launcher."""

from __future__ import annotations

import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from sbn_lightning.callbacks import RankWatch
from sbn_lightning.distributed.launching import Observer, PatientLauncher, patience
from sbn_lightning.distributed.strategies import ReplicatedStrategy, ShardedStrategy
from sbn_lightning.training.metrics import Perplexity


def test_the_states_of_metrics_go_to_the_device_of_a_model_that_is_there_already():
    """FSDP2 moves parameters and buffers alone, and a validation adds a loss on the GPU to the state of a metric."""
    strategy, device = ShardedStrategy(), torch.device("meta")
    strategy._model = nn.ModuleDict({"layer": nn.Linear(2, 2, device=device), "metric": Perplexity()})
    with mock.patch.object(ShardedStrategy, "root_device", device):
        strategy.model_to_device()
    assert strategy._model["metric"].total.device == device


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_process_has_no_ddp_around_its_model(ranks):
    with (
        mock.patch.object(ReplicatedStrategy, "world_size", ranks),
        mock.patch.object(DDPStrategy, "configure_ddp") as configure,
    ):
        ReplicatedStrategy(static_graph=True).configure_ddp()
        if ranks == 1:
            ReplicatedStrategy().configure_ddp()  # It does not ask for a process group, which is not there.
    assert configure.call_count == ranks - 1


@pytest.mark.parametrize("strategy", ["sbn_ddp", "sbn_fsdp2"])
def test_ranks_have_time_to_say_why_they_end(strategy):
    options = {"accelerator": "cpu", "devices": 2, "strategy": strategy, "logger": False}
    trainer = Trainer(callbacks=[RankWatch(silence=20, grace=5)], **options)
    assert isinstance(trainer.strategy.launcher, PatientLauncher)
    assert patience(trainer) == 35
    assert patience(Trainer(**options)) == 0  # Nothing would end the other ranks.


@pytest.mark.parametrize("status", [0, 1])
def test_ranks_that_do_not_end_by_themselves_are_killed(status, monkeypatch):
    done = []
    monkeypatch.setattr(time, "sleep", done.append)
    monkeypatch.setattr(Observer, "_terminate_all", lambda self: done.append("killed"))
    processes = [subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"]) for code in (0, status)]
    for process in processes:
        process.wait()
    assert Observer(processes, 35.0)._run()
    assert done == ([35.0, "killed"] if status else [])
