"""``WholeParameters``: the parameters of a sharded model, whole and at addresses that stay, for CUDA graphs.

A CUDA graph reads and writes the addresses that it has recorded, and a replay runs no Python. FSDP2 gathers parameters
in hooks, which are Python, and into memory that it frees again. So FSDP2 takes no part in the micro-batches that are
replayed:

* Each parameter that FSDP2 shards (embedding, norms, head) has a whole copy, which is a leaf of autograd. The ranks
  gather into the copies once in an optimiser step, while the ternary layers are prepared.
* While the loss and its backward run, the modules have the copies, and the hooks of FSDP2 are off.
* The gradients of the copies are reduced like those of ternary layers (:mod:`~sbn_lightning.distributed.gradients`).
  The collectives start in hooks of autograd, so the graph of a backward contains the collectives.

Optimiser, checkpoints and validation see the sharded parameters, as without graphs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed.gradients import PIECE
from sbn_lightning.distributed.packed import exchange_of
from sbn_lightning.distributed.rows import FlatGather, RowCut, all_gather
from sbn_lightning.distributed.sharding import OPTIONS, prepare_sharded
from sbn_lightning.layers.mask_tracker import optimizer_steps, version
from sbn_lightning.layers.masked_linear import masked_layers, prepare_layers

WANTED = {"gather": "packed_step", "reduce": "micro_batch", "param_dtype": None}


class _Copy(NamedTuple):
    """A parameter that FSDP2 shards, and its whole copy."""

    sharded: nn.Parameter
    whole: nn.Parameter
    cut: RowCut


class WholeParameters:
    """Whole copies of what FSDP2 shards in a model.

    Args:
        model: The model, sharded by :func:`~sbn_lightning.distributed.sharding.shard`, or a module that contains it.

    Raises:
        ConfigError: If the model was sharded in another way than with the strategy's own ``gather`` and ``reduce``, or
            if FSDP2 has gathered it for the method that runs.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for _, layer in masked_layers(model)]
        self._parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
        exchange = exchange_of(layers)
        others = any(exchange_of([layer]) is None for layer in layers)
        for options in [vars(part)[OPTIONS] for part in self._parts if OPTIONS in vars(part)] or [{}]:
            if exchange is None or others or any(options[key] != value for key, value in WANTED.items()):
                raise ConfigError(
                    "cuda_graphs: the layers of a sharded model must be ternary, without experts, and sharded with "
                    "gather: packed_step, reduce: micro_batch and parameters in their own dtype; set model.cuda_graphs "
                    "to false"
                )
        assert exchange is not None
        assert exchange.scatter is not None
        self._exchange, self._scatter = exchange, exchange.scatter
        self.reshard()
        if any(parameter.requires_grad and not isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise ConfigError(
                "cuda_graphs: FSDP2 has gathered the model for the method that runs, and a graph cannot hold gathered "
                "parameters: use the strategy sbn_ddp, or replay in a method for which shard() does not gather "
                "(methods=...)"
            )
        ours = {id(parameter) for layer in layers for parameter in (layer.weight, getattr(layer, "log_scale", None))}
        copies: dict[int, _Copy] = {}  # Embedding and head may be one parameter.
        self._places: list[tuple[dict[str, nn.Parameter | None], str, _Copy]] = []
        for part in model.modules():
            for name, parameter in part._parameters.items():
                if isinstance(parameter, DTensor) and id(parameter) not in ours:
                    if id(parameter) not in copies:
                        copies[id(parameter)] = self._copy(cast(nn.Parameter, parameter))
                    self._places.append((part._parameters, name, copies[id(parameter)]))
        self._copies = list(copies.values())
        self._seen: tuple[Any, ...] | None = None
        self._coming: list[tuple[FlatGather, list[_Copy]] | dist.Work] = []

    def _copy(self, parameter: nn.Parameter) -> _Copy:
        group = self._exchange.group
        cut = RowCut(parameter.shape[0], dist.get_rank(group), dist.get_world_size(group))
        memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=local(parameter).device)
        whole = nn.Parameter(memory, parameter.requires_grad)
        if whole.requires_grad:
            self._scatter.attach(whole, parameter, cut)
        return _Copy(parameter, whole, cut)

    def reshard(self) -> None:
        """Free the parameters that FSDP2 has gathered, for example in a validation."""
        for part in self._parts:
            part.reshard()

    def prepare(self, model: nn.Module) -> None:
        """Prepare the ternary layers, and gather the copies, if weights have changed. All ranks call this together.

        Args:
            model: The model.
        """
        self._scatter.recover()
        self._exchange.beside = self._start  # The copies travel while the words of the layers are unpacked.
        try:
            prepare_layers(model)
        finally:
            self._exchange.beside = None
        self._start()
        self._take()

    def _start(self) -> None:
        """Start to gather the copies, if an optimiser took a step or something wrote to a shard."""
        shards = [local(copy.sharded).detach() for copy in self._copies]
        seen = optimizer_steps(), tuple(map(version, shards))
        if not shards or seen == self._seen:
            return
        self._seen = seen
        small: list[tuple[Tensor, _Copy]] = []
        for mine, copy in zip(shards, self._copies, strict=True):
            if copy.whole.nbytes < PIECE or copy.cut.rows % copy.cut.ranks:
                small.append((mine, copy))
                continue
            work = all_gather(copy.whole.detach(), mine.contiguous(), group=self._exchange.group, async_op=True)
            self._coming.append(cast(dist.Work, work))
            torch.autograd.graph.increment_version(copy.whole)
        if small:
            tensors, copies = zip(*small, strict=True)
            gather = FlatGather(tensors, [copy.cut for copy in copies], self._exchange.group)
            self._coming.append((gather, list(copies)))

    @torch.no_grad()
    def _take(self) -> None:
        """Wait for what travels. On a GPU the stream waits, and not the host."""
        coming, self._coming = self._coming, []
        for one in coming:
            if isinstance(one, dist.Work):
                one.wait()
                continue
            gather, copies = one
            for whole, copy in zip(gather.wait(), copies, strict=True):
                copy.whole.copy_(whole.flatten(0, 1)[: copy.cut.rows])

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record a backward in this context. After an error no gradients are left that wait or travel."""
        try:
            yield
        except BaseException:
            self._scatter.reset(recorded=True)
            raise

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the modules their whole copies, and turn the hooks of FSDP2 off."""
        hooks = [self._without_hooks(part) for part in self._parts]
        for parameters, name, copy in self._places:
            parameters[name] = copy.whole
        try:
            yield
        finally:
            for parameters, name, copy in self._places:
                parameters[name] = copy.sharded
            for part, attributes in zip(self._parts, hooks, strict=True):
                vars(part).update(attributes)

    def _without_hooks(self, part: FSDPModule) -> dict[str, Any]:
        """Take the hooks of FSDP2 and of ``shard`` off a module. Returns the attributes as they were."""
        state, attributes = part._get_fsdp_state(), vars(part)
        methods = attributes.get(OPTIONS, {}).get("methods", ())
        before = {name: attributes.pop(name) for name in methods if name in attributes}
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            before[kind] = hooks = attributes[kind]
            own = (hook for hook in hooks.items() if not _is_sharding_hook(hook[1], state))
            attributes[kind] = OrderedDict(own)
        return before


def _is_sharding_hook(hook: Any, state: Any) -> bool:
    return hook is prepare_sharded or getattr(hook, "__self__", None) is state


def whole_parameters(model: nn.Module) -> WholeParameters | None:
    """Make whole copies of what FSDP2 shards in a model; None if FSDP2 shards nothing."""
    return WholeParameters(model) if any(isinstance(part, FSDPModule) for part in model.modules()) else None


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor: the rows of a sharded one, and otherwise the tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
