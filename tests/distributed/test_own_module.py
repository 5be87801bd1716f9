"""A LightningModule of a user's own under ``sbn_fsdp2``: the strategy shards it, or says why not."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sbn_lightning import TernarySparseConversion, convert_linears
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed import shard
from sbn_lightning.distributed.own_module import check_sharded, shard_module
from sbn_lightning.distributed.strategies import ShardedStrategy
from tests.distributed.forked_runs import statuses
from tests.distributed.own_module_jobs import Own
from tests.helpers import quiet_trainer

pytestmark = pytest.mark.timeout(900)  # The first of these tests runs the jobs of all.
OPTIONS = ShardedStrategy().sharding


def jobs_of_ranks(folder, tokens):
    return [{"ranks": 2, "function": "own_module", "folder": folder}]


def test_two_ranks_train_one_model(forked_runs):
    folder = forked_runs / "test_own_module"
    assert not any(statuses(folder)), (folder / "rank0.log").read_text()[-3000:]


class Misspelt(Own):
    @property
    def blocks(self):
        return self.net.layer


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_what_cannot_be_sharded_by_itself(mesh):
    by_hand = Own(0)
    by_hand.automatic_optimization = False
    with pytest.raises(ConfigError, match=r"training_step calls the backward.*shard\(self\.net"):
        shard_module(by_hand, mesh, OPTIONS)
    with pytest.raises(ConfigError, match=r"Own does not say which these are: give the LightningModule .* blocks"):
        shard_module(Own(0), mesh, OPTIONS | {"gather": "packed_layer"})
    with pytest.raises(ConfigError, match=r"blocks of Misspelt gives no blocks: .*raises an AttributeError"):
        shard_module(Misspelt(0), mesh, OPTIONS)


def test_a_module_that_shards_itself_otherwise_than_the_strategy_says(mesh):
    """The strategy's options must not be ignored."""

    def refused(message, prepare, options=OPTIONS):
        module = Own(0)
        prepare(module)
        with pytest.raises(ConfigError, match=message):
            check_sharded(module, options)

    def whole(module, **options):
        convert_linears(module, "2:4")
        shard(module.net, mesh, blocks=module.net.layers, **options)

    def late(module):
        shard(module.net, mesh, blocks=())
        convert_linears(module, "2:4")

    def partly(module):
        module.head = nn.Linear(4, 4)
        whole(module)

    refused(
        r"without the options of sbn_fsdp2 \(reduce_dtype=.*shards by itself",
        lambda one: fully_shard(one.net, mesh=mesh),
    )
    refused("with gather='latent', and sbn_fsdp2 has gather='packed_step'", lambda one: whole(one, gather="latent"))
    refused("net.layers.0.1 and 1 more became ternary after Own was sharded", late)
    refused("averages the gradients of head.weight and 1 more, which Own has not sharded", partly)
    module = Own(0)
    whole(module)
    check_sharded(module, OPTIONS)


def test_a_model_that_nobody_shards():
    """Lightning's own strategy leaves it to the module, and would train one model on each rank."""
    callback, module = TernarySparseConversion("2:4"), Own(0)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    data_parallel = SimpleNamespace(size=lambda: 2)
    trainer = quiet_trainer([callback])
    callback.setup(trainer, module, "fit")
    with (
        mock.patch.object(ModelParallelStrategy, "device_mesh", {"data_parallel": data_parallel}),
        mock.patch.object(type(trainer), "strategy", strategy),
        pytest.raises(ConfigError, match="Own is not sharded, so each rank would train a model of its own"),
    ):
        callback.on_train_start(trainer, module)
