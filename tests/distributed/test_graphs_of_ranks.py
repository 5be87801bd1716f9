"""CUDA graphs of the step on several ranks, as far as CPU processes go: the same to the last bit as without graphs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed import shard
from sbn_lightning.distributed.gradient_mean import GradientMean, means_of, replicate
from sbn_lightning.distributed.gradients import GradientScatter
from sbn_lightning.layers import SparseLinear
from sbn_lightning.training import graphs
from sbn_lightning.training.graphs import GraphedLoss
from tests.distributed.forked_runs import assert_two_ended, jobs_on_two_ranks
from tests.helpers import small_module

JOBS = ("graphed", "graphed_sharded", "graphed_fabric", "graphed_bare")


def jobs_of_ranks(folder, tokens):
    return jobs_on_two_ranks(folder, JOBS)


@pytest.mark.timeout(900)  # The first of these tests runs the jobs of all.
@pytest.mark.parametrize("job", JOBS)
def test_a_replay_sends_gradients_as_a_backward_does(job, forked_runs):
    assert_two_ended(forked_runs / "test_graphs_of_ranks" / job)


@pytest.fixture
def mesh(tmp_path, monkeypatch):
    """A mesh of this process alone, in which a recording is a call."""
    monkeypatch.setattr(graphs, "record", lambda function, pool: function())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


TOKENS = torch.arange(9).view(1, 9)


def loss_of(model):
    return lambda rows: model.loss(rows[:, :-1], rows[:, 1:])


@pytest.mark.parametrize("sharded", [False, True])
def test_a_recording_that_fails_leaves_no_gradients_on_their_way(sharded, mesh, monkeypatch):
    """Without graphs the model trains on."""
    model, expected = (small_module(n_layers=1, pattern="2:4").model for _ in range(2))
    loss_of(expected)(TOKENS).backward()
    if sharded:
        shard(model, mesh)
    else:
        mean = replicate(model, mesh.get_group(), torch.float32)

    def fail(self):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with monkeypatch.context() as patch:
        patch.setattr(GradientScatter if sharded else GradientMean, "_finish", fail)
        with pytest.raises(ConfigError, match="cannot be recorded as a CUDA graph"):
            GraphedLoss(warm_up=0)(model, loss_of(model), TOKENS)
    loss = loss_of(model)(TOKENS)
    if sharded:
        loss.backward()
    else:
        with mean.backward(model):
            loss.backward()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one.grad.full_tensor() if sharded else one.grad, other.grad)


def test_a_parameter_that_a_recorded_backward_does_not_reach_is_named(mesh):
    model = small_module(n_layers=1, pattern="2:4").model
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    mean = replicate(model, mesh.get_group(), torch.float32)
    with pytest.raises(ConfigError, match="unused took no part in the loss"):
        GraphedLoss(warm_up=0)(model, loss_of(model), TOKENS)
    model.unused.requires_grad_(False)
    with mean.backward(model):
        loss_of(model)(TOKENS).backward()


def test_the_means_of_a_model_whose_first_parameter_was_frozen(mesh):
    model, other = (small_module(n_layers=1).model for _ in range(2))
    model.embed.weight.requires_grad_(False)
    mean, _ = (replicate(one, mesh.get_group(), torch.float32) for one in (model, other))
    model.embed.weight.requires_grad_(True)
    assert means_of(model) == [mean]


def test_layers_without_codes_are_refused(mesh):
    """FSDP2 gathers their weights, from which each forward makes the mask."""
    model = small_module(n_layers=1).model
    model.blocks[0].mlp.down = SparseLinear(64, 32, bias=False, pattern="2:4")
    shard(model, mesh)
    with pytest.raises(ConfigError, match="the layers of a sharded model must be ternary"):
        GraphedLoss()(model, loss_of(model), TOKENS)
