"""The strategies ``sbn_ddp`` and ``sbn_fsdp2``, which of Lightning's keep groups of M whole, and what they can read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy as FabricModelParallelStrategy
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from sbn_kernels.runtime.sharing import beside_collectives
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric
from typing_extensions import override

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed.background import BackgroundSaver
from sbn_lightning.distributed.gradient_mean import GradientMean, replicate
from sbn_lightning.distributed.gradients import group_for_gradients
from sbn_lightning.distributed.launching import PatientLauncher
from sbn_lightning.distributed.meeting import TIMEOUT, prepare_to_meet
from sbn_lightning.distributed.own_module import check_sharded, configured, is_sharded, shard_module
from sbn_lightning.distributed.shard_files import save_shards
from sbn_lightning.distributed.sharding import Gather, Reduce, between_micro_batches, make_buffers, reshard
from sbn_lightning.distributed.stopping import stop_together


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that flatten all weights into one vector, because groups of M and gamma would be lost.

    Args:
        strategy: The strategy of a Trainer.

    Raises:
        ConfigError: If the strategy is FSDP1 or DeepSpeed. The message says which strategies work.
    """
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise ConfigError(
            f"{type(strategy).__name__} flattens weights, which cuts groups of M and hides each layer's gamma; "
            "use the strategy sbn_ddp, or sbn_fsdp2 to shard"
        )


def check_checkpoint(path: str | Path | None, strategy: Any) -> None:
    """Refuse a checkpoint that a strategy cannot read, or would read wrongly.

    Args:
        path: The checkpoint to continue from. Nothing is checked if the path is None or does not exist.
        strategy: The strategy of a Trainer or of a Fabric.

    Raises:
        ConfigError: If the checkpoint is sharded and the strategy is not ``ModelParallelStrategy``. Also if the
            strategy is ``ModelParallelStrategy`` and the optimiser states have several parameter groups and no names,
            as in files of version 0.1.0 or of a module that does not call :func:`name_optimizer_states`.
    """
    if path is None:
        return
    path, sharding = Path(path), isinstance(strategy, (ModelParallelStrategy, FabricModelParallelStrategy))
    if path.is_dir() and not isinstance(strategy, ModelParallelStrategy):
        # The checkpoint is not read here, because torch.distributed.checkpoint unpickles its metadata. Unpickling can
        # run code that the file contains.
        raise ConfigError(
            f"{path} is a sharded checkpoint: continue it with a Trainer whose strategy is sbn_fsdp2, on any number of "
            "processes; or, if you trust the checkpoint, make one file: "
            f"sbn consolidate --checkpoint {path} --output {path.with_suffix('.whole.ckpt')}"
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


def _check_reduce_dtype(name: str) -> None:
    if name not in ("float32", "bfloat16"):
        raise ConfigError(f"reduce_dtype={name!r} is not 'float32' or 'bfloat16'")


class _Together(Strategy):
    """How the ranks of this package's strategies start, meet and stop."""

    _timeout: timedelta | None

    @override
    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if type(self._launcher) is _SubprocessScriptLauncher:
            given = self._launcher
            self._launcher = PatientLauncher(given.cluster_environment, given.num_processes, given.num_nodes)

    @override
    def setup_environment(self) -> None:
        prepare_to_meet(self._timeout)
        super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        stop_together(trainer)
        super().setup(trainer)


class ShardedStrategy(_Together, ModelParallelStrategy):
    """Shards latent weights, gradients and optimiser states over all GPUs: ``trainer.strategy: sbn_fsdp2``.

    This strategy uses all GPUs for data parallelism. ``ModelParallelStrategy`` would give all GPUs of a node to tensor
    parallelism by default, which these models do not use.

    A LightningModule of your own is sharded as a whole when its layers are converted. It needs no ``configure_model``.
    Its attribute ``blocks`` lists its transformer blocks. A module that optimises by hand has to shard its networks
    itself (:mod:`~sbn_lightning.distributed.own_module`).

    Args:
        reduce_dtype: The dtype in which gradients travel.
        gather: What the ranks gather of ternary layers. ``"packed_step"``: 2-bit codes, once in an optimiser step. All
            codes then stay whole on every rank until the next step. ``"packed_layer"``: 2-bit codes, before the forward
            and the backward of each block. Their memory is given back when the block has run. ``"latent"``: FSDP2
            gathers latent weights, 4 bytes each, in every forward and backward.
        replicate: The number of groups of ranks that hold the same rows (hybrid sharding). With the number of hosts,
            rows are shared within a host, and only gradients travel between hosts.
        save_distributed_checkpoint: Whether every rank saves its own shard, so that a checkpoint is a folder. If False,
            a checkpoint is one file that every strategy reads.
        timeout: How long a collective may take before the rank gives up.
        save_in_background: Whether training goes on while a checkpoint is written, see
            :mod:`~sbn_lightning.distributed.background`. Needs ``save_distributed_checkpoint``.
        max_ctas: The most multiprocessors that NCCL takes while it sends gradients beside the backward; None for NCCL's
            own choice.
        reduce: When gradients of ternary layers travel. ``"micro_batch"``: in each backward. ``"step"``: once in an
            optimiser step. Each rank keeps whole gradients until then, 4 bytes a weight.
        **options: The other options of ``ModelParallelStrategy``.

    Raises:
        ConfigError: If ``reduce_dtype``, ``gather`` or ``reduce`` has another value, or if ``save_in_background`` meets
            checkpoints of one file.
    """

    def __init__(
        self,
        reduce_dtype: Literal["float32", "bfloat16"] = "float32",
        gather: Gather = "packed_step",
        replicate: int = 1,
        save_distributed_checkpoint: bool = False,
        timeout: timedelta = TIMEOUT,
        reduce: Reduce = "micro_batch",
        save_in_background: bool = False,
        max_ctas: int | None = None,
        **options: Any,
    ) -> None:
        _check_reduce_dtype(reduce_dtype)
        if gather not in get_args(Gather):
            raise ConfigError(f"gather={gather!r} is not one of {', '.join(get_args(Gather))}")
        if reduce not in get_args(Reduce):
            raise ConfigError(f"reduce={reduce!r} is not one of {', '.join(get_args(Reduce))}")
        if save_in_background and not save_distributed_checkpoint:
            raise ConfigError("save_in_background is for folders of shards: set save_distributed_checkpoint=true")
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, timeout=timeout, **options)
        self._in_background = save_in_background
        self._saver: BackgroundSaver | None = None
        self.sharding: dict[str, Any] = {
            "reduce_dtype": getattr(torch, reduce_dtype),
            "gather": gather,
            "replicate": replicate,
            "reduce": reduce,
            "max_ctas": max_ctas,
        }

    @override
    def setup_environment(self) -> None:
        self._tensor_parallel_size = 1
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        # A validation may have left weights gathered, and the optimiser must get the rows.
        reshard(module)
        if is_sharded(module):
            check_sharded(module, self.sharding)
        else:
            shard_module(module, self.device_mesh, self.sharding)
        with configured(module):
            super().setup(trainer)
        make_buffers(module)
        if self._in_background and self._saver is None:
            self._saver = BackgroundSaver()

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        # torch cannot move a sharded weight that something holds a weak reference to, not even to where the weight is.
        if any(tensor.device != self.root_device for tensor in chain(self.model.parameters(), self.model.buffers())):
            super().model_to_device()
            return
        for part in self.model.modules():
            if isinstance(part, Metric):  # FSDP2 has moved parameters and buffers. The states of a metric are neither.
                part.to(self.root_device)

    @override
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning enters this for each micro-batch but the last of an optimiser step."""
        assert self.model is not None
        with between_micro_batches(self.model, self.sharding["reduce"]):
            yield

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._saver is not None:
            self._saver.check()
        return super().optimizer_step(*args, **kwargs)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None or not self._save_distributed_checkpoint or "://" in str(filepath):
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        shards = {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
        shards["state_dict"] = checkpoint.pop("state_dict")
        write = save_shards if self._saver is None else self._saver.save
        write(shards, checkpoint, Path(self.broadcast(filepath)))

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        self.after_checkpoint(partial(super().remove_checkpoint, filepath))

    def after_checkpoint(self, action: Callable[[], object]) -> None:
        """Call a function when the last checkpoint is complete. With ``save_in_background`` this may be later."""
        if self._saver is None:
            action()
        else:
            self._saver.later(action)

    def finish_checkpoint(self) -> None:
        """Wait until the last checkpoint is written. Without ``save_in_background`` it always is.

        Raises:
            DataError: If the checkpoint could not be written.
        """
        if self._saver is not None:
            self._saver.finish()

    @override
    def teardown(self) -> None:
        try:
            self.finish_checkpoint()
        finally:
            super().teardown()


class ReplicatedStrategy(_Together, DDPStrategy):
    """Lightning's ``DDPStrategy`` with gradients that are averaged where they lie: ``trainer.strategy: sbn_ddp``.

    Gradients are not copied into other buffers (:class:`~sbn_lightning.distributed.gradient_mean.GradientMean`). Masks
    are not broadcast: every rank computes the same ones. On one GPU nothing is averaged. The ranks agree on a SIGTERM
    without their GPUs (:mod:`~sbn_lightning.distributed.stopping`).

    Args:
        reduce_dtype: The dtype in which gradients travel. With ``"bfloat16"`` half as many bytes travel, and the sum
            over the ranks is rounded to bfloat16.
        timeout: How long a collective may take before the rank gives up.
        max_ctas: The most multiprocessors that NCCL takes while it sends gradients beside the backward; None for NCCL's
            own choice.
        broadcast_buffers: Whether buffers, except masks, are broadcast in each forward. True needs torch's class.
        gradient_as_bucket_view: Whether gradients lie in the buffers that travel, where torch's class averages them.
            False needs torch's class.
        **options: The other options of ``DDPStrategy``. With an option of torch's ``DistributedDataParallel``, such as
            ``find_unused_parameters``, or with a ``ddp_comm_hook``, torch's class averages the gradients. An option
            that has torch's default counts as not given, because a recipe gives all options.

    Attributes:
        by_torch: Whether torch's class averages the gradients.

    Raises:
        ConfigError: If ``reduce_dtype`` has another value, or is ``"bfloat16"`` beside a ``ddp_comm_hook``, or if there
            are both ``max_ctas`` and a ``process_group``.
    """

    def __init__(
        self,
        reduce_dtype: Literal["float32", "bfloat16"] = "float32",
        timeout: timedelta = TIMEOUT,
        max_ctas: int | None = None,
        broadcast_buffers: bool = False,
        gradient_as_bucket_view: bool = True,
        **options: Any,
    ) -> None:
        _check_reduce_dtype(reduce_dtype)
        if reduce_dtype == "bfloat16" and options.get("ddp_comm_hook") is not None:
            raise ConfigError(
                "reduce_dtype='bfloat16' and ddp_comm_hook both change gradients: leave one of the two out"
            )
        known = signature(DistributedDataParallel).parameters
        own = ("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper", "model_averaging_period")
        defaults = dict.fromkeys(own) | {name: one.default for name, one in known.items()}
        options = {name: value for name, value in options.items() if name not in defaults or value != defaults[name]}
        if max_ctas is not None and "process_group" in options:
            raise ConfigError("max_ctas makes a process_group of its own: leave one of the two out")
        self.by_torch = broadcast_buffers or not gradient_as_bucket_view or any(name in defaults for name in options)
        if self.by_torch and reduce_dtype == "bfloat16":
            options["ddp_comm_hook"] = bf16_compress_hook
        # Newer versions of torch have the first name, and deprecate the second one.
        broadcast = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options = {broadcast: broadcast_buffers, "gradient_as_bucket_view": gradient_as_bucket_view} | options
        super().__init__(timeout=timeout, **options)
        self.max_ctas = max_ctas
        self.reduce_dtype: torch.dtype = getattr(torch, reduce_dtype)
        self._mean: GradientMean | None = None

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self.max_ctas is not None and "process_group" not in self._ddp_kwargs:  # One group for all fits.
            group = group_for_gradients(cast(dist.ProcessGroup, dist.group.WORLD), self.max_ctas)
            self._ddp_kwargs["process_group"] = group
            if self._ddp_comm_hook is bf16_compress_hook:
                self._ddp_comm_state = group

    @override
    def configure_ddp(self) -> None:
        self._let_go()
        if self.world_size == 1:
            return  # There is nothing to average.
        if self.by_torch:
            super().configure_ddp()
            return
        assert self.lightning_module is not None
        group = cast(dist.ProcessGroup, self._ddp_kwargs.get("process_group") or dist.group.WORLD)
        self._mean = replicate(self.lightning_module, group, self.reduce_dtype)

    @override
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning enters this for each micro-batch but the last of an optimiser step."""
        with super().block_backward_sync() if self._mean is None else self._mean.held():
            yield

    @override
    def teardown(self) -> None:
        self._let_go()
        super().teardown()

    def _let_go(self) -> None:
        if self._mean is not None:
            self._mean.detach()
            self._mean = None

    @override
    def _setup_model(self, model: Module) -> DistributedDataParallel:
        # Lightning makes DDP on a stream of its own. Then gradients would be added up on that stream, and the backward
        # would go from stream to stream for each parameter.
        return DistributedDataParallel(model, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._mean is not None:
            assert self.lightning_module is not None
            averages: AbstractContextManager[None] = self._mean.backward(self.lightning_module)
        else:
            sends = isinstance(self.model, DistributedDataParallel) and self.model.require_backward_grad_sync
            averages = beside_collectives() if sends else nullcontext()
        with averages:
            result: Tensor = super().backward(closure_loss, *args, **kwargs)
            return result


StrategyRegistry.register(
    "sbn_ddp", ReplicatedStrategy, description="DDP without broadcasts of masks, and without waits for the GPU"
)
StrategyRegistry.register(
    "sbn_fsdp2", ShardedStrategy, description="FSDP2 with latent weights sharded by rows and 2-bit codes on the wire"
)
