"""What sharded weights do not allow is refused in one line, with the way out."""

from __future__ import annotations

import gc
import resource
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sbn_lightning.callbacks import SparseEMAWeightAveraging
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.distributed import shard
from sbn_lightning.distributed.background import BackgroundSaver
from sbn_lightning.distributed.fabric_strategy import FabricReplicatedStrategy
from sbn_lightning.distributed.shard_files import save_shards
from sbn_lightning.distributed.strategies import ReplicatedStrategy, ShardedStrategy
from sbn_lightning.fabric.options import check_fabric_options
from sbn_lightning.layers import convert_linears
from tests.helpers import small_module


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_averages_of_shards(mesh):
    module = small_module(n_layers=1)
    shard(module.model, mesh)
    folders = SimpleNamespace(strategy=SimpleNamespace(_save_distributed_checkpoint=True))
    with pytest.raises(ConfigError, match=r"SparseEMAWeightAveraging.*set save_distributed_checkpoint=false"):
        SparseEMAWeightAveraging().on_fit_start(folders, module)


@pytest.mark.parametrize("replicate", [0, 2])
def test_groups_that_are_not_equal(replicate, mesh):
    model = small_module(n_layers=1).model
    with pytest.raises(ConfigError, match=f"replicate={replicate} does not divide the 1 ranks"):
        shard(model, mesh, replicate=replicate)


def test_a_file_is_not_written_in_the_background():
    with pytest.raises(ConfigError, match="for folders of shards: set save_distributed_checkpoint=true"):
        ShardedStrategy(save_in_background=True)


def test_a_checkpoint_that_cannot_be_begun(mesh, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write the checkpoint .*last\.ckpt: .*Not a directory"):
        BackgroundSaver().save({}, {}, tmp_path / "file" / "last.ckpt")


@pytest.mark.parametrize("in_background", [False, True])
def test_a_shard_that_the_disk_does_not_take(in_background, mesh, tmp_path):
    """torch speaks of positions in the file. The error has the reason of the system instead, and says what to do."""

    def save(shards, rest, path):
        saver = BackgroundSaver()
        saver.save(shards, rest, path)
        saver.finish()

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DataError, match=r"step=1\.ckpt: rank 0: File too large; .*: make room and continue with"):
            (save if in_background else save_shards)({"a": torch.zeros(50_000)}, {}, tmp_path / "step=1.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    save_shards({"a": torch.zeros(50_000)}, {"step": 1}, tmp_path / "step=1.ckpt")
    assert {path.name for path in (tmp_path / "step=1.ckpt").iterdir()} >= {".metadata", "__0_0.distcp", "meta.pt"}


def test_the_blocks_of_a_model(mesh):
    """A model says which its blocks are, or the caller does. Version 0.1.0 had the blocks before the mesh."""
    model = small_module(n_layers=1).model
    with pytest.raises(ConfigError, match="Linear has no attribute blocks: give its transformer blocks"):
        shard(torch.nn.Linear(2, 2), mesh)
    for blocks in (4, [4], torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})):
        with pytest.raises(ConfigError, match=f"must list the transformer blocks.*this is a {type(blocks).__name__}: "):
            shard(torch.nn.Linear(2, 2), mesh, blocks=blocks)
    with pytest.raises(ConfigError, match=r"takes a DeviceMesh \(init_device_mesh\), not list"):
        shard(model, [model.blocks[0]])
    with pytest.raises(ConfigError, match="takes everything else by name, for example blocks="):
        shard(model, mesh, model.blocks)
    with pytest.warns(DeprecationWarning, match=r"is now shard\(module, mesh\)"):
        shard(model, model.blocks, mesh, ("loss",))
    tokens = torch.arange(9).view(1, 9)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    assert model.blocks[0].mlp.down.weight.grad.full_tensor().any()


def test_nothing_holds_a_sharded_model_that_is_gone(mesh):
    model = small_module(n_layers=1).model
    shard(model, mesh)
    tokens = torch.arange(9).view(1, 9)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    weight = weakref.ref(model.blocks[0].mlp.down.weight)
    del model
    gc.collect()
    assert weight() is None


def test_a_model_that_is_sharded_already(mesh):
    """Options of a second call must not be ignored. Lightning calls configure_model again for each command."""
    model = small_module(n_layers=1).model
    shard(model, mesh, reduce_dtype=torch.bfloat16)
    shard(model, mesh, reduce_dtype=torch.bfloat16)
    message = "TernaryTransformer is sharded already, with reduce_dtype=torch.bfloat16, not torch.float32"
    with pytest.raises(ConfigError, match=message):
        shard(model, mesh)
    model = small_module(n_layers=1).model
    fully_shard(model, mesh=mesh)
    shard(model, mesh, gather="latent")
    with pytest.raises(ConfigError, match="with gather='latent', not 'packed_step'"):
        shard(model, mesh)


@pytest.mark.parametrize("gather", ["packed_step", "packed_layer", "latent"])
@pytest.mark.parametrize("kind", ["ternary", "masked"])
def test_a_transposed_weight(kind, gather, mesh):
    """Conv1D of GPT-2."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([conv1d(8, 16)])})
    convert_linears(model, "2:4", kind=kind, exclude=())
    with pytest.raises(ConfigError, match=r"blocks\.0 is a Conv1D.*: use the strategy sbn_ddp"):
        shard(model, mesh, blocks=model["blocks"], gather=gather)


def test_multiprocessors_of_a_collective(mesh):
    with pytest.raises(ConfigError, match="max_ctas=0 is below 1"):
        shard(small_module(n_layers=1).model, mesh, max_ctas=0)


def test_the_dtypes_of_gradients():
    assert ReplicatedStrategy("bfloat16")._ddp_comm_hook is None
    assert ReplicatedStrategy("bfloat16", bucket_cap_mb=25)._ddp_comm_hook is bf16_compress_hook
    for strategy in (ReplicatedStrategy, ShardedStrategy):
        with pytest.raises(ConfigError, match="reduce_dtype='half' is not 'float32' or 'bfloat16'"):
            strategy("half")
    with pytest.raises(ConfigError, match="reduce_dtype='bfloat16' and ddp_comm_hook both change gradients"):
        ReplicatedStrategy("bfloat16", ddp_comm_hook=bf16_compress_hook)
    config = {"strategy": ReplicatedStrategy("bfloat16", bucket_cap_mb=25), "val_check_interval": 1, "max_steps": 1}
    with pytest.raises(ConfigError, match="nor reduce_dtype of sbn_ddp beside options of torch's DDP"):
        check_fabric_options(config)


def test_a_group_for_the_gradients():
    with pytest.raises(ConfigError, match="max_ctas makes a process_group of its own"):
        ReplicatedStrategy(max_ctas=8, process_group=object())
    config = {"strategy": ReplicatedStrategy(max_ctas=8, bucket_cap_mb=9), "val_check_interval": 1, "max_steps": 1}
    with pytest.raises(ConfigError, match="the Fabric loop cannot honour max_ctas of sbn_ddp"):
        check_fabric_options(config)


def test_fabric_averages_gradients_as_the_trainer_does():
    for strategy in ("sbn_ddp", ReplicatedStrategy("bfloat16", max_ctas=8)):
        config = {"strategy": strategy, "val_check_interval": 1, "max_steps": 1, "plugins": None}
        check_fabric_options(config)
        made = config["strategy"]
        assert isinstance(made, FabricReplicatedStrategy)
        expected = (torch.float32, None) if strategy == "sbn_ddp" else (torch.bfloat16, 8)
        assert (made.reduce_dtype, made.max_ctas) == expected
    with pytest.raises(ConfigError, match="find_unused_parameters: options of torch's DDP need strategy='ddp'"):
        FabricReplicatedStrategy(find_unused_parameters=True)
