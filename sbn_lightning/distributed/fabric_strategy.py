"""``FabricShardedStrategy``: the strategy ``sbn_fsdp2`` for Lightning Fabric."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from sbn_lightning.distributed.gradients import send_first
from sbn_lightning.distributed.meeting import TIMEOUT, meet_afresh
from sbn_lightning.distributed.sharding import Gather, Reduce, between_micro_batches, shard


class FabricShardedStrategy(ModelParallelStrategy):
    """Shards latent weights, gradients and optimiser states over all GPUs: ``Fabric(strategy="sbn_fsdp2")``.

    The optimiser must be made from the module that ``fabric.setup_module`` returns, because sharding replaces
    parameters. The module must have an attribute ``blocks``, its transformer blocks in the order in which they run, and
    may have a method ``loss`` besides ``forward``.

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
        send_first()
        meet_afresh(self._timeout or TIMEOUT)
        super().setup_environment()


class _BetweenMicroBatches(_BackwardSyncControl):
    """What ``fabric.no_backward_sync`` does under :class:`FabricShardedStrategy`."""

    def __init__(self, reduce: Reduce) -> None:
        self._reduce = reduce

    @override
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return between_micro_batches(module, self._reduce) if enabled else nullcontext()


STRATEGY_REGISTRY.register(
    "sbn_fsdp2", FabricShardedStrategy, description="FSDP2 with latent weights sharded by rows and 2-bit codes sent"
)
