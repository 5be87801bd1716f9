"""The strategies ``sbn_ddp`` and ``sbn_fsdp2`` for Lightning Fabric."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed.gradient_mean import GradientMean, replicate
from sbn_lightning.distributed.gradients import group_for_gradients
from sbn_lightning.distributed.meeting import TIMEOUT, prepare_to_meet
from sbn_lightning.distributed.sharding import Gather, Reduce, between_micro_batches, shard


class FabricReplicatedStrategy(DDPStrategy):
    """DDP whose gradients are averaged where they lie: ``Fabric(strategy="sbn_ddp")``.

    Buffers, masks among them, are broadcast once, at the start. On one GPU nothing is averaged. With several models,
    ``fabric.backward`` needs the argument ``model``.

    Args:
        reduce_dtype: The dtype in which gradients travel, float32 or bfloat16.
        timeout: How long a collective may take before the rank gives up; None for torch's own limit.
        max_ctas: The most multiprocessors that NCCL takes while it sends gradients; None for NCCL's own choice.
        **options: The other options of Fabric's ``DDPStrategy``, without those of torch's ``DistributedDataParallel``.

    Raises:
        ConfigError: If there is an option of torch's class.
    """

    def __init__(
        self,
        reduce_dtype: torch.dtype = torch.float32,
        timeout: timedelta | None = TIMEOUT,
        max_ctas: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(timeout=timeout, **options)
        if self._ddp_kwargs:
            raise ConfigError(f"{', '.join(self._ddp_kwargs)}: options of torch's DDP need strategy='ddp'")
        self.reduce_dtype, self.max_ctas = reduce_dtype, max_ctas
        self._group: dist.ProcessGroup | None = None
        self._means: WeakKeyDictionary[nn.Module, GradientMean] = WeakKeyDictionary()
        self._backward_sync_control = _WithoutMean(self._means)

    @override
    def setup_environment(self) -> None:
        prepare_to_meet(self._timeout)
        super().setup_environment()

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        if self.world_size > 1:
            if self._group is None:  # One group for all models.
                self._group = group_for_gradients(cast(dist.ProcessGroup, dist.group.WORLD), self.max_ctas)
            self._means[module] = replicate(module, self._group, self.reduce_dtype)
        return module

    @override
    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        if module is None and len(self._means) > 1:
            raise ConfigError("sbn_ddp averages the gradients of one model: call fabric.backward(loss, model=model)")
        model = next(iter(self._means), None) if module is None else module
        mean = None if model is None else self._means.get(model)
        with nullcontext() if model is None or mean is None else mean.backward(model):
            super().backward(tensor, module, *args, **kwargs)


class _WithoutMean(_BackwardSyncControl):
    """What ``fabric.no_backward_sync`` does under :class:`FabricReplicatedStrategy`."""

    def __init__(self, means: WeakKeyDictionary[nn.Module, GradientMean]) -> None:
        self._means = means

    @override
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        mean = self._means.get(module) if enabled else None
        return nullcontext() if mean is None else mean.held()


class FabricShardedStrategy(ModelParallelStrategy):
    """Shards latent weights, gradients and optimiser states over all GPUs: ``Fabric(strategy="sbn_fsdp2")``.

    The optimiser must be made from the module that ``fabric.setup_module`` returns, because sharding replaces
    parameters. ``fabric.setup(module, optimizer)`` is an error. The module must have an attribute ``blocks``, its
    transformer blocks in the order in which they run, and may have a method ``loss`` besides ``forward``.

    In ``fabric.no_backward_sync`` embedding and head stay whole after a backward. With ``reduce="step"`` gradients of
    ternary layers stay whole, too. All other gradients are reduced in each backward, so they take no memory.

    Args:
        reduce_dtype: The dtype in which gradients travel, float32 or bfloat16.
        gather: What the ranks gather of ternary layers, see :func:`~sbn_lightning.distributed.sharding.shard`.
        replicate: The number of groups of ranks that hold the same rows.
        timeout: How long a collective may take before the rank gives up; None for torch's own limit.
        reduce: When gradients of ternary layers travel, see there. With ``"step"`` all micro-batches of an optimiser
            step but the last must run in ``fabric.no_backward_sync``.
        max_ctas: The most multiprocessors that NCCL takes while it sends gradients; None for NCCL's own choice.
        **options: The other options of Fabric's ``ModelParallelStrategy``.
    """

    def __init__(
        self,
        reduce_dtype: torch.dtype = torch.float32,
        gather: Gather = "packed_step",
        replicate: int = 1,
        timeout: timedelta | None = TIMEOUT,
        reduce: Reduce = "micro_batch",
        max_ctas: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(self._shard, timeout=timeout, **options)
        self.sharding: dict[str, Any] = {
            "reduce_dtype": reduce_dtype,
            "gather": gather,
            "replicate": replicate,
            "reduce": reduce,
            "max_ctas": max_ctas,
        }
        self._backward_sync_control = _BetweenMicroBatches(reduce)
        self._io: CheckpointIO = TorchCheckpointIO()

    def _shard(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        shard(module, mesh, **self.sharding)
        return module

    @override
    def setup_module_and_optimizers(self, *_: Any, **__: Any) -> Any:
        """Refuse ``fabric.setup(module, optimizer)``. The optimiser would change weights that the model has no more."""
        raise ConfigError(
            "sbn_fsdp2 replaces the parameters of the module, so make the optimizer afterwards: "
            "model = fabric.setup_module(module), and then "
            "optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters()))"
        )

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        """What writes the whole checkpoint of rank 0."""
        return self._io

    @checkpoint_io.setter
    @override
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._io = io

    @override
    def setup_environment(self) -> None:
        self._tensor_parallel_size = 1
        self._data_parallel_size = self.num_nodes * self.num_processes
        prepare_to_meet(self._timeout)
        super().setup_environment()


class _BetweenMicroBatches(_BackwardSyncControl):
    """What ``fabric.no_backward_sync`` does under :class:`FabricShardedStrategy`."""

    def __init__(self, reduce: Reduce) -> None:
        self._reduce = reduce

    @override
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return between_micro_batches(module, self._reduce) if enabled else nullcontext()


STRATEGY_REGISTRY.register(
    "sbn_ddp", FabricReplicatedStrategy, description="DDP that averages gradients where they lie"
)
STRATEGY_REGISTRY.register(
    "sbn_fsdp2", FabricShardedStrategy, description="FSDP2 with latent weights sharded by rows and 2-bit codes sent"
)
