"""Masked layers on several processes.

DDP keeps a whole copy on every rank: masks are a deterministic function of weights that are equal, so there is nothing
to send. FSDP2 shards each weight by rows and leaves the packed masks (1/32 of a float32 weight) whole: a layer sees its
whole weight in a forward, and computes gamma and mask from it as a single process would. Rows are never cut, so a group
of M never spans two ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.sparse_linear import masked_layers


def keep_masks_out_of_broadcasts(module: nn.Module) -> None:
    """Tells DDP not to broadcast masks: by default it sends every buffer from rank 0 before each forward."""
    names = [name for name, _ in module.named_buffers() if name.endswith("mask_bits")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def shard(module: nn.Module, blocks: nn.ModuleList, mesh: DeviceMesh, methods: Sequence[str] = ()) -> None:
    """Shards a model with FSDP2, block by block, then the rest.

    Args:
        module: The whole model; changed in place, once.
        blocks: Its transformer blocks: each is gathered when it runs.
        mesh: Lightning's mesh, with dimensions ``data_parallel`` and ``tensor_parallel``; only the first may be used.
        methods: Names of methods of ``module`` that compute, besides ``forward``: weights are gathered for them too.

    Raises:
        ConfigError: If ranks are left for tensor parallelism (Lightning's own default gives it all GPUs of a node;
            they would train apart, unnoticed), or a layer has fewer rows than there are ranks.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if isinstance(module, FSDPModule):
        return
    if mesh["tensor_parallel"].size() > 1:
        raise ConfigError(
            "this model is sharded by data parallelism alone: use ModelParallelStrategy("
            f"data_parallel_size={mesh.size()}, tensor_parallel_size=1)"
        )
    mesh = mesh["data_parallel"]
    for name, layer in masked_layers(module):
        if layer.out_features < mesh.size():
            raise ConfigError(f"{name} has {layer.out_features} rows, fewer than the {mesh.size()} ranks to shard over")
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for method in methods:
        register_fsdp_forward_method(module, method)
