"""``ShardedStrategy`` and the device of a model."""

from __future__ import annotations

from unittest import mock

import torch
from torch import nn

from sbn_lightning.distributed.strategies import ShardedStrategy
from sbn_lightning.training.metrics import Perplexity


def test_the_states_of_metrics_go_to_the_device_of_a_model_that_is_there_already():
    """FSDP2 moves parameters and buffers alone, and a validation adds a loss on the GPU to the state of a metric."""
    strategy, device = ShardedStrategy(), torch.device("meta")
    strategy._model = nn.ModuleDict({"layer": nn.Linear(2, 2, device=device), "metric": Perplexity()})
    with mock.patch.object(ShardedStrategy, "root_device", device):
        strategy.model_to_device()
    assert strategy._model["metric"].total.device == device
