"""The device of a model under ``ShardedStrategy``, and one process under ``ReplicatedStrategy``."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

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
