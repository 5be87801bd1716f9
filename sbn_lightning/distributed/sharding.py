"""Masked layers on several processes.

DDP keeps a whole copy of the model on every rank. The weights of all copies are equal, and a mask depends on its weight
alone, so no mask has to be sent. Sharding cuts each weight by rows and leaves the packed masks whole (1/32 of a float32
weight). No row is cut in two, so a group of M never spans two ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from inspect import unwrap
from types import MethodType
from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from sbn_lightning.core.errors import ConfigError, SBNError
from sbn_lightning.distributed.first_rank import send_from_first_rank
from sbn_lightning.distributed.packed import exchange_of, forget_backward, shard_packed
from sbn_lightning.layers.conv1d import SparseBitConv1D, SparseConv1D
from sbn_lightning.layers.mask_tracker import trust_weights
from sbn_lightning.layers.sparse_bit_linear import ternary_layers
from sbn_lightning.layers.sparse_linear import masked_layers, prepare_layers

Gather = Literal["packed_step", "packed_layer", "latent"]
Reduce = Literal["micro_batch", "step"]
LAYERS = "_layers_to_prepare"  # The attribute of a sharded model that lists its masked layers.
OPTIONS = "_sharding_options"  # The attribute of a sharded model that has the options it was sharded with.
SMALL = 2**20  # A block with more weights than that besides its ternary ones is gathered on its own.


def keep_masks_out_of_broadcasts(module: nn.Module) -> None:
    """Tell DDP not to broadcast masks. By default DDP sends every buffer from rank 0 before each forward."""
    names = [name for name, _ in module.named_buffers() if name.endswith("mask_bits")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def shard(
    module: nn.Module,
    mesh: DeviceMesh,
    *old: Any,
    blocks: Iterable[nn.Module] | None = None,
    methods: Sequence[str] | None = None,
    gather: Gather = "packed_step",
    reduce_dtype: torch.dtype = torch.float32,
    replicate: int = 1,
    reduce: Reduce = "micro_batch",
    max_ctas: int | None = None,
    policy: MixedPrecisionPolicy | None = None,
) -> None:
    """Shard a model over the ranks of a mesh, in plain PyTorch or under Lightning's ``ModelParallelStrategy``.

    Latent weights of ternary layers are sharded by rows, and the ranks exchange 2-bit codes once in an optimiser step
    (:mod:`sbn_lightning.distributed.packed`). FSDP2 shards all other parameters. It gathers embedding and head once in
    a micro-batch, and the norms and biases of all blocks with them. A collective for each block would make all ranks
    wait for a few bytes. A block with more than :data:`SMALL` such weights, for example with dense layers, is gathered
    on its own when the block runs.

    Args:
        module: The whole model, which is changed in place. A second call with the same options does nothing. All ranks
            begin with the weights and buffers of the first one. Parameters are replaced, so make the optimiser later.
            Do not replace layers later, because the model remembers which masked layers it has.
        mesh: The ranks. In a mesh of one dimension all ranks share the rows. In a mesh of two dimensions the ranks of
            the first hold the same rows, and those of the second share the rows. Lightning's mesh has the dimensions
            ``data_parallel`` and ``tensor_parallel``; the size of ``tensor_parallel`` must be 1.
        *old: The mesh and the methods, if the blocks came before the mesh, as in version 0.1.0.
        blocks: The transformer blocks of the model, in the order in which they run. None takes ``module.blocks``.
        methods: The names of the methods of ``module``, besides ``forward``, for which FSDP2 must gather weights. None
            takes ``loss`` and ``run``, if the model has such methods.
        gather: What the ranks gather of ternary layers. ``"packed_step"``: 2-bit codes, once in an optimiser step; all
            codes stay whole until the next. ``"packed_layer"``: 2-bit codes, before the forward and the backward of
            each block, and their memory is given back after it. ``"latent"``: FSDP2 shards latent weights as well, and
            gathers them in full precision.
        reduce_dtype: The dtype in which gradients travel, float32 or bfloat16.
        replicate: The number of groups of ranks that hold the same rows, for a mesh of one dimension or Lightning's.
            Neighbouring ranks are in one group. With the number of hosts, rows are shared within a host.
        reduce: When gradients of ternary layers travel. ``"micro_batch"``: in the backward of each micro-batch.
            ``"step"``: in the backward of the last micro-batch of an optimiser step. Each rank then keeps whole
            gradients, 4 bytes a weight. The earlier backwards have to run in :func:`gradients_stay`.
        max_ctas: The most multiprocessors that NCCL takes while it sends gradients of ternary layers; None for NCCL's
            own choice.
        policy: The dtypes in which FSDP2 gathers its parameters and reduces their gradients. None gathers parameters
            in their own dtype, and reduces gradients in ``reduce_dtype``.

    Raises:
        ConfigError: If ``mesh`` is no mesh, if ``gather``, ``reduce_dtype`` or ``reduce`` has another value, if the
            model has no attribute ``blocks`` and none are given, if ``blocks`` lists something else than modules, if
            ``reduce="step"`` meets ``gather="latent"``, if ``replicate`` does not divide the ranks or the mesh has two
            dimensions already, if the mesh has ranks for tensor parallelism, if a layer that FSDP2 shards has fewer
            rows than there are ranks, if a layer is a ``Conv1D`` of transformers (GPT-2), or if the model is sharded
            already with other options. (Lightning gives all GPUs of a node to tensor parallelism by default. Each of
            them would then train a model of its own, unnoticed.)
    """
    if not isinstance(mesh, DeviceMesh):
        if not old or not isinstance(old[0], DeviceMesh):
            raise ConfigError(f"shard(module, mesh) takes a DeviceMesh (init_device_mesh), not {type(mesh).__name__}")
        warnings.warn("shard(module, blocks, mesh) is now shard(module, mesh)", DeprecationWarning, stacklevel=2)
        blocks, mesh, methods = mesh, old[0], old[1] if len(old) > 1 else methods
    elif old:
        raise ConfigError("shard(module, mesh) takes everything else by name, for example blocks=...")
    if gather not in get_args(Gather):
        raise ConfigError(f"gather={gather!r} is not one of {', '.join(get_args(Gather))}")
    if reduce_dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"reduce_dtype={reduce_dtype} is not torch.float32 or torch.bfloat16")
    if reduce not in get_args(Reduce):
        raise ConfigError(f"reduce={reduce!r} is not one of {', '.join(get_args(Reduce))}")
    if reduce == "step" and gather == "latent":
        raise ConfigError('reduce="step" is for packed codes: set gather to packed_step or packed_layer')
    given: dict[str, Any] = {"reduce_dtype": reduce_dtype, "gather": gather, "replicate": replicate, "reduce": reduce}
    given["max_ctas"] = max_ctas
    if isinstance(module, FSDPModule):
        _check_again(module, given)
        return
    if blocks is None and (blocks := getattr(module, "blocks", None)) is None:
        raise ConfigError(f"{type(module).__name__} has no attribute blocks: give its transformer blocks, blocks=...")
    blocks = _modules(blocks)
    if methods is None:
        methods = [name for name in ("loss", "run") if hasattr(module, name)]
    if "tensor_parallel" in (mesh.mesh_dim_names or ()):
        if mesh["tensor_parallel"].size() > 1:
            raise ConfigError(
                "this model is sharded by data parallelism alone: use the strategy sbn_fsdp2, or ModelParallelStrategy("
                f"data_parallel_size={mesh.size()}, tensor_parallel_size=1)"
            )
        mesh = mesh["data_parallel"]
    for name, layer in masked_layers(module):
        if isinstance(layer, SparseBitConv1D | SparseConv1D):
            raise ConfigError(
                f"{name} is a Conv1D, whose weight is transposed, and sharding cuts weights by rows: use the strategy "
                "sbn_ddp"
            )
    if replicate != 1:
        mesh = _hybrid(mesh, replicate)
    send_from_first_rank(module, [mesh.get_group(i) for i in range(mesh.ndim)], mesh.device_type)
    layered = blocks if gather == "packed_layer" else ()
    ours: set[nn.Parameter] = set()
    if gather != "latent":
        options: dict[str, Any] = {"reduce_dtype": reduce_dtype, "reduce": reduce, "max_ctas": max_ctas}
        ours = shard_packed(module, mesh, layered=layered, **options)
    ranks = mesh.size(mesh.ndim - 1)
    for name, layer in masked_layers(module):
        if layer.weight not in ours and layer.out_features < ranks:
            raise ConfigError(f"{name} has {layer.out_features} rows, fewer than the {ranks} ranks to shard over")
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype) if policy is None else policy
    units = [block for block in blocks if not ours or _rest(block, ours) > SMALL]
    for part in (*units, module):
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=ours)
    for method in methods:
        register_fsdp_forward_method(module, method)
    if ours:
        prepare_first(module, methods)
    setattr(module, OPTIONS, given | {"methods": tuple(methods), "param_dtype": policy.param_dtype})


def _check_again(module: nn.Module, given: dict[str, Any]) -> None:
    """Check that a model which is sharded already is sharded as a second call of ``shard`` says."""
    # A model that fully_shard has sharded gathers latent weights.
    own = vars(module).get(OPTIONS) or given | {"gather": "latent"}
    if differing := [key for key, value in given.items() if own[key] != value]:
        values = ", ".join(f"{key}={own[key]!r}, not {given[key]!r}" for key in differing)
        raise ConfigError(f"{type(module).__name__.removeprefix('FSDP')} is sharded already, with {values}")


def _modules(blocks: Any) -> list[nn.Module]:
    found: list[Any] = list(blocks) if isinstance(blocks, Iterable) else [None]
    if not all(isinstance(block, nn.Module) for block in found):
        raise ConfigError(
            "blocks must list the transformer blocks of the model, which are modules, and this is a "
            f"{type(blocks).__name__}: give blocks=..., or give the attribute blocks of the model another name"
        )
    return found


def _rest(block: nn.Module, ours: set[nn.Parameter]) -> int:
    """The number of weights of a block that FSDP2 shards."""
    return sum(parameter.numel() for parameter in block.parameters() if parameter not in ours)


@contextmanager
def between_micro_batches(module: nn.Module, reduce: Reduce) -> Iterator[None]:
    """What a strategy does in each micro-batch of an optimiser step but the last.

    Args:
        module: The sharded model, or a module that contains one.
        reduce: When gradients of ternary layers travel, as in :func:`shard`.
    """
    with rest_stays_whole(module), gradients_stay(module) if reduce == "step" else nullcontext():
        yield


@contextmanager
def rest_stays_whole(module: nn.Module) -> Iterator[None]:
    """Leave what FSDP2 has gathered for the whole model in memory after a backward, for the next micro-batch.

    Args:
        module: The sharded model, or a module that contains one.
    """
    root = next((part for part in module.modules() if isinstance(part, FSDPModule)), None)
    if root is not None:
        root.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        if root is not None:
            root.set_reshard_after_backward(True, recurse=False)


@contextmanager
def gradients_stay(module: nn.Module) -> Iterator[None]:
    """Keep gradients of ternary layers whole on every rank after a backward. The next micro-batch adds its own.

    The first backward outside of this context sends the sums, and writes each rank's rows to ``weight.grad``. Until
    then ``zero_grad`` does not reach the gradients.

    Args:
        module: The sharded model, or a module that contains one, with ``reduce="step"``.
    """
    exchange = exchange_of(ternary_layers(module).values())
    scatter = None if exchange is None else exchange.scatter
    if scatter is None:
        yield
        return
    scatter.hold = True
    try:
        yield
    finally:
        scatter.hold = False


def _hybrid(mesh: DeviceMesh, replicate: int) -> DeviceMesh:
    """A mesh of two dimensions over the ranks of a mesh of one."""
    if mesh.ndim != 1:
        raise ConfigError(f"replicate={replicate} is for a mesh of one dimension, and this mesh has {mesh.ndim}")
    if replicate < 1 or mesh.size() % replicate != 0:
        raise ConfigError(f"replicate={replicate} does not divide the {mesh.size()} ranks into equal groups")
    shape = (replicate, mesh.size() // replicate)
    return init_device_mesh(mesh.device_type, shape, mesh_dim_names=("replicate", "shard"))


def prepare_first(module: nn.Module, methods: Sequence[str] = ()) -> None:
    """Make a model prepare all its layers together before each forward, and not one after the other.

    Args:
        module: The whole model; changed in place.
        methods: The names of the methods, besides ``forward``, that multiply with the layers.
    """
    module.register_forward_pre_hook(prepare_sharded, prepend=True)
    for name in methods:
        setattr(module, name, MethodType(_after_preparing(getattr(module, name).__func__), module))
    layers = [layer for _, layer in masked_layers(module)]
    setattr(module, LAYERS, layers)
    for layer in layers:
        layer.owner_prepares = True


@torch._dynamo.disable  # type: ignore[untyped-decorator]  # A graph cannot ask whether a weight has changed.
def prepare_sharded(module: nn.Module, *_: Any) -> None:
    """Prepare all layers of a model together, as a hook before its forward.

    Args:
        module: The whole model.
    """
    layers = getattr(module, LAYERS)
    exchange = exchange_of(layers)
    if exchange is None or not isinstance(module, FSDPModule):
        prepare_layers(module, layers)
        return
    recover(module)
    if torch.is_inference_mode_enabled():
        make_buffers(module)
    # The forward begins with the embedding. FSDP2 would start to gather it only when all layers are prepared.
    exchange.beside = partial(module.unshard, async_op=True)
    try:
        prepare_layers(module, layers)
    finally:
        exchange.beside = None


def reshard(module: nn.Module) -> None:
    """Give back what FSDP2 has gathered. A forward without a backward leaves embedding and head whole.

    Args:
        module: The sharded model, or a module that contains one. Other modules stay as they are.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def make_buffers(module: nn.Module) -> None:
    """Let FSDP2 make the tensors into which it gathers, once.

    FSDP2 makes these tensors in the first forward, and uses them again. Training could not use them if that forward ran
    in inference mode, as the forward of ``trainer.validate`` does.

    Args:
        module: The sharded model, or a module that contains one, on its device.
    """
    with torch.inference_mode(False), torch.no_grad():
        for part in module.modules():
            if isinstance(part, FSDPModule) and not getattr(part, "_has_buffers", False):
                part.unshard()
                part.reshard()
                part._has_buffers = True  # type: ignore[assignment]


def recover(module: FSDPModule) -> None:
    """Let a sharded model train on after a backward that has raised an error on all ranks.

    Autograd does not call the end of such a backward, so gradients are left on their way. They are lost. Call
    ``zero_grad`` as well. Every forward calls this function.

    Args:
        module: The whole model, sharded.

    Raises:
        SBNError: If FSDP2 cannot go on, because this version of torch has no ``reset_iter_state``.
    """
    state = getattr(module._get_fsdp_state(), "_state_ctx", None)
    if torch._C._current_graph_task_id() != -1 or not getattr(state, "post_backward_final_callback_queued", False):
        return
    if not hasattr(module, "reset_iter_state"):
        raise SBNError(
            f"a backward has raised an error, and FSDP2 of torch {torch.__version__} cannot go on after it: "
            "start again from the last checkpoint"
        )
    forget_backward(cast(nn.Module, module))
    module.reset_iter_state()


def _after_preparing(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(unwrap(method))  # Lightning looks one wrapper deep for the arguments of a step.
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        prepare_sharded(module)
        with trust_weights():  # Nothing inside looks at the weights a second time.
            return method(module, *args, **kwargs)

    return call
