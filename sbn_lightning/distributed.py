"""Masked layers on several processes.

DDP keeps a whole copy on every rank: masks are a deterministic function of weights that are equal, so there is nothing
to send. FSDP2 shards each weight by rows and leaves the packed masks (1/32 of a float32 weight) whole: a layer sees its
whole weight in a forward, and computes gamma and mask from it as a single process would. Rows are never cut, so a group
of M never spans two ranks.

A checkpoint keys optimiser states by the names of their parameters. torch numbers them by parameter group, and
``ModelParallelStrategy`` takes numbers for places in the model: with two groups it would give states to the wrong
parameters. Names mean the same under every strategy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sbn_lightning.errors import ConfigError
from sbn_lightning.layers import masked_layers


def check_strategy(strategy: Strategy) -> None:
    """Refuses strategies that flatten weights into one vector: groups of M and gamma would be lost.

    Raises:
        ConfigError: For FSDP1 and DeepSpeed, naming what works instead.
    """
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise ConfigError(
            f"{type(strategy).__name__} flattens weights, which cuts groups of M and hides each layer's gamma; "
            "use DDPStrategy, or ModelParallelStrategy (FSDP2) to shard"
        )


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


def name_optimizer_states(
    states: Sequence[dict[str, Any]], module: LightningModule, optimizers: Sequence[Optimizer]
) -> None:
    """Keys the optimiser states of a checkpoint by parameter names, so that they load under every strategy.

    Call it in ``on_save_checkpoint`` of a module with several parameter groups that is to go on under
    ``ModelParallelStrategy``: ``name_optimizer_states(checkpoint["optimizer_states"], self, self.trainer.optimizers)``.

    Args:
        states: ``checkpoint["optimizer_states"]``; changed in place. Those that have names are left as they are.
        module: The module whose parameters are trained.
        optimizers: Its optimisers, in the order of ``states``.
    """
    # torch leaves the wrappers of torch.compile out of such names.
    names = {parameter: name.replace("_orig_mod.", "") for name, parameter in module.named_parameters()}
    for optimizer, state in zip(optimizers, states, strict=True):
        if not all(isinstance(key, int) for key in state.get("state", ())) or "param_groups" not in state:
            continue  # named, or the empty one of a rank that does not save
        groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
        # ModelParallelStrategy has numbered them by place in the model, any other by place in the groups.
        numbered = list(chain.from_iterable(groups) if module.device_mesh is None else names.values())
        state["state"] = {numbered[key]: value for key, value in state["state"].items()}
        state["param_groups"] = [
            group | {"params": named} for group, named in zip(state["param_groups"], groups, strict=True)
        ]


def check_checkpoint(path: str | Path | None, strategy: Any) -> None:
    """Refuses what a strategy would not read, or read wrongly.

    Args:
        path: A checkpoint to continue from; None, and what is not there, is nobody's business here.
        strategy: Lightning's or Fabric's.

    Raises:
        ConfigError: For a sharded checkpoint without ``ModelParallelStrategy``; or for optimiser states without names
            with it (files of version 0.1.0, or of a module that does not call :func:`name_optimizer_states`).
    """
    if path is None:
        return
    path, sharding = Path(path), isinstance(strategy, ModelParallelStrategy)
    if path.is_dir() and not sharding:
        # To read it here would run what it contains: torch.distributed.checkpoint unpickles its metadata.
        raise ConfigError(
            f"{path} is a sharded checkpoint, which only ModelParallelStrategy reads; if you trust it, make one file "
            f"of it: sbn consolidate --checkpoint {path} --output {path.with_suffix('.whole.ckpt')}"
        )
    if path.is_file() and sharding:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        for state in checkpoint.get("optimizer_states", ()):
            numbers = list(chain.from_iterable(group["params"] for group in state["param_groups"]))
            if len(state["param_groups"]) > 1 and numbers == list(range(len(numbers))):
                raise ConfigError(
                    f"{path} numbers its optimiser states, and ModelParallelStrategy would give them to other "
                    "parameters: continue it for a step without that strategy first; what that saves has names"
                )
