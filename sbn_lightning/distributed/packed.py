"""Ternary layers whose latent weights are sharded by rows, and whose codes every rank makes whole.

FSDP2 gathers a parameter in full precision for every forward and every backward. A ternary layer does not need this:
its products read codes, which take 2 bits for each weight and change once in an optimiser step. So training works like
this:

* Latent weights, gradients and optimiser states are sharded by rows (``DTensor``, ``Shard(0)``), and FSDP2 leaves them
  alone (``ignored_params``). FSDP2 still shards embeddings, norms and the head.
* Each rank computes the mask and the codes of its own rows. gamma is a mean over the whole weight, so the ranks
  exchange the terms of that mean (with kernels, one float for each row). Every rank then sums all terms in the order in
  which one process would sum them. So gamma, masks and codes equal those of one process to the last bit.
* Codes and masks travel once in an optimiser step, at 2 bits for each weight, those of all layers together
  (:mod:`~sbn_lightning.distributed.exchange`). With ``packed_step`` they stay whole on every rank until the next step,
  so neither the backward nor further micro-batches gather anything. With ``packed_layer`` they are whole only while
  their block computes (:mod:`~sbn_lightning.distributed.units`).
* Gradients are reduce-scattered as the backward computes them (:mod:`~sbn_lightning.distributed.gradients`).
* Learned scales are whole on every rank (``DTensor``, ``Replicate()``).

The layers do not know about any of this. Their backend is wrapped in :class:`PackedRows`, which is a backend itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sbn_lightning.backends.base import Backend, Keep, Operands
from sbn_lightning.backends.rows import row_maker
from sbn_lightning.distributed.exchange import Exchange, Request
from sbn_lightning.distributed.gradients import GradientScatter, group_for_gradients, stand_in
from sbn_lightning.distributed.rows import RowCut, gather_rows
from sbn_lightning.distributed.units import Unit
from sbn_lightning.layers.sparse_bit_linear import ternary_layers
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern


class PackedRows(Backend):
    """A backend for a layer whose latent weight is sharded by rows.

    Args:
        inner: The backend that computes: the reference or the integer kernels.
        cut: The rows of the layer that each rank has.
        exchange: The exchange with the ranks that share the rows.
        leaf: The tensor that takes the place of the latent weight in autograd
            (:func:`~sbn_lightning.distributed.gradients.stand_in`).
        scale_leaf: The tensor that takes the place of the learned scales in autograd; None if there are none.
        unit: The layers that are whole only while their block computes; None if codes stay whole.

    Attributes:
        together: The function that prepares many layers with one exchange.
    """

    leaf: Tensor

    def __init__(
        self,
        inner: Backend,
        cut: RowCut,
        exchange: Exchange,
        leaf: Tensor,
        unit: Unit | None,
        scale_leaf: Tensor | None = None,
    ) -> None:
        self.inner, self.cut, self.exchange, self.leaf, self.unit = inner, cut, exchange, leaf, unit
        self.scale_leaf = scale_leaf
        self.takes_pairs, self.takes_quantized = inner.takes_pairs, inner.takes_quantized
        self.maker = row_maker(inner)
        self.together = exchange.prepare

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def seed(self) -> Tensor | None:  # type: ignore[override]
        """The inner backend's seed for stochastic rounding."""
        return self.inner.seed

    @seed.setter
    def seed(self, seed: Tensor | None) -> None:
        self.inner.seed = seed

    def rows(self, weight: Tensor) -> Tensor:
        """Return this rank's rows of a weight. The weight is either sharded or whole on every rank."""
        return local_rows(weight) if isinstance(weight, DTensor) else self.cut.mine(weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedRows:
        # A copy is for evaluation only, for example an average of weights. So its leaf sends no gradient anywhere.
        unit = None if self.unit is None else deepcopy(self.unit, memo)
        scale_leaf = None if self.scale_leaf is None else self.scale_leaf.detach()
        return PackedRows(deepcopy(self.inner, memo), self.cut, self.exchange, self.leaf.detach(), unit, scale_leaf)

    def fresh_mask(self, scores: Tensor, pattern: NMPattern, keep: Keep) -> Tensor:
        own = self.cut.mine(keep) if isinstance(keep, Tensor) else keep
        return gather_rows(self.fresh_rows(scores, pattern, own), self.cut, self.exchange.group)

    def fresh_rows(self, scores: Tensor, pattern: NMPattern, keep: Keep) -> Tensor:
        """Make the packed mask of this rank's rows. ``keep`` has one number for all or for each of these rows."""
        if self.cut.count == 0:
            return scores.new_empty(0, -(-scores.shape[1] // 8), dtype=torch.uint8)
        return self.inner.fresh_mask(scores, pattern, keep)

    def prepare(self, latent: Tensor, mask_bits: Tensor | None, keep: Keep, sparsity: SparsityConfig) -> Any:
        """Prepare the weight like any backend, but from the latent weights of this rank's rows alone.

        Args:
            latent: The latent weights of this rank's rows, ``[cut.count, in_features]``.
            mask_bits: The whole packed mask; None for a fresh mask.
            keep: How many weights a fresh mask keeps in a group, for all rows.
            sparsity: The options of the layer.
        """
        [prepared] = self.exchange.prepare([(self, latent, mask_bits, keep, sparsity)])
        return prepared

    def take(self, request: Request, words: Tensor, whole: Tensor, row_scale: Tensor) -> Any:
        """Make what :meth:`linear` takes, from the words of all ranks.

        Args:
            request: What the layer asked for.
            words: The words of this rank's rows.
            whole: The words of all ranks, ``[ranks, padded, ...]``.
            row_scale: gamma of each row of the whole weight.
        """
        prepared = self.assemble(request, whole, row_scale, request.mask_bits)
        if self.unit is not None:
            self.unit.hold(request, words, row_scale, prepared)
        return prepared

    def assemble(self, request: Request, whole: Tensor, row_scale: Tensor, mask_bits: Tensor | None) -> Any:
        """Make what :meth:`linear` takes. ``mask_bits`` is the packed mask, or None to take it out of the words."""
        columns = request.latent.shape[1]
        return self.maker.assemble(whole, row_scale, mask_bits, request.keep, request.sparsity, columns)

    def without_codes(self, prepared: Any) -> Any:
        """The prepared weight without its codes, if the products of the inner backend do not read the codes."""
        prepared = self.inner.without_codes(prepared)
        if self.unit is not None:
            self.unit.replace(self, prepared)
        return prepared

    def with_codes(self, prepared: Any, in_features: int) -> Any:
        """The prepared weight with its codes: :meth:`without_codes` drops them, ``packed_layer`` between blocks."""
        if self.unit is None:
            return self.inner.with_codes(prepared, in_features)
        # The unit knows gamma. The layer may have multiplied gamma by a learned factor.
        return self.unit.weight(self)._replace(row_scale=prepared.row_scale)

    def whole_latent(self, weight: Tensor) -> Tensor:
        """Gather the latent weight of all ranks, for a layer that is partly rounded. It has no gradient."""
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        return whole.detach()

    def linear(self, *operands: Any, **options: Any) -> Tensor:
        """Multiply as the inner backend does. The layer gives its leaf in place of the latent weight."""
        return self.inner.linear(*operands, **options)

    def joins_gated(self, backend: PackedRows) -> bool:
        return type(backend.inner) is type(self.inner) and self.inner.joins_gated(backend.inner)

    def gated(self, x: Tensor, first: Operands, last: Operands, backend: PackedRows, *options: Any) -> Tensor | None:
        return self.inner.gated(x, first, last, backend.inner, *options)

    def gated_pair(
        self, x: Tensor, layers: tuple[Operands, ...], backends: tuple[PackedRows, ...], dtype: torch.dtype
    ) -> Tensor | None:
        if any(type(backend.inner) is not type(self.inner) for backend in backends):
            return None
        return self.inner.gated_pair(x, layers, tuple(backend.inner for backend in backends), dtype)

    def gated_product(self, gate_up: Tensor) -> Tensor | None:
        return self.inner.gated_product(gate_up)

    def joins_norm(self, x: Tensor, bits: int, norm: nn.Module) -> bool:
        return self.inner.joins_norm(x, bits, norm)

    def norm_and_quantize(self, *arguments: Any) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        return self.inner.norm_and_quantize(*arguments)

    def turns_heads(self, x: Tensor, cos: Tensor) -> bool:
        return self.inner.turns_heads(x, cos)

    def turned_heads(self, *arguments: Any) -> tuple[Tensor, ...]:
        return self.inner.turned_heads(*arguments)


def exchange_of(layers: Iterable[Any]) -> Exchange | None:
    """The exchange of the sharded layers among some layers; None if there are none."""
    backends = (getattr(layer, "backend", None) for layer in layers)
    return next((backend.exchange for backend in backends if isinstance(backend, PackedRows)), None)


def forget_backward(module: nn.Module) -> None:
    """Throw away what a backward that has raised an error has left in a sharded model."""
    backends = [layer.backend for layer in ternary_layers(module).values()]
    for backend in backends:
        if isinstance(backend, PackedRows):
            if backend.unit is not None:
                backend.unit.reset()
            if backend.exchange.scatter is not None:
                backend.exchange.scatter.reset()


def local_rows(weight: Tensor) -> Tensor:
    """The rows of a sharded weight that this rank has, without their gradient."""
    return cast(DTensor, weight.detach()).to_local()


def shard_packed(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    reduce_dtype: torch.dtype = torch.float32,
    layered: Iterable[nn.Module] = (),
    reduce: str = "micro_batch",
    max_ctas: int | None = None,
) -> set[nn.Parameter]:
    """Shard the latent weights of a model's ternary layers by rows. FSDP2 must leave these weights alone.

    Args:
        module: The whole model, with equal weights on all ranks; changed in place.
        mesh: The ranks. In a mesh of one dimension all ranks share the rows. A mesh of two dimensions is for hybrid
            sharding: the ranks of the first dimension hold the same rows, those of the second share the rows.
        reduce_dtype: The dtype in which gradients travel: float32 or bfloat16.
        layered: The blocks, in the order in which they run, whose codes are whole only while the block computes. The
            codes of all other layers stay whole.
        reduce: When gradients travel, as in :func:`~sbn_lightning.distributed.sharding.shard`. With ``"step"``
            gradients are added up in float32 before they travel.
        max_ctas: The most multiprocessors that NCCL takes while it sends gradients; None for NCCL's own choice.

    Returns:
        The sharded weights and the learned scales, for ``fully_shard(..., ignored_params=)``.
    """
    sharding = mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[1]]  # type: ignore[index]
    replicate = None if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[0]].get_group()  # type: ignore[index]
    exchange = Exchange(sharding.get_group())
    group = group_for_gradients(exchange.group, max_ctas)
    scatter = exchange.scatter = GradientScatter(group, replicate, mesh.size(), reduce_dtype)
    units = _units(layered, exchange)
    # FSDP2 places its parameters over the whole mesh, too. A norm of all gradients needs one mesh.
    placements = [Shard(0)] if mesh.ndim == 1 else [Replicate(), Shard(0)]
    weights = set()
    for layer in ternary_layers(module).values():
        if hasattr(layer, "experts"):
            continue  # The layer has a product for each expert, and PackedRows has one for the whole weight.
        latent = layer.weight.detach()
        cut = RowCut(layer.out_features, sharding.get_local_rank(), sharding.size())
        weight = nn.Parameter(
            distribute_tensor(latent, mesh, placements, src_data_rank=None), layer.weight.requires_grad
        )
        rows, columns = latent.shape
        dtype = torch.float32 if reduce == "step" else reduce_dtype
        leaf = stand_in(rows, columns, dtype, local_rows(weight).device)
        scatter.attach(leaf, weight, cut)
        layer.weight = weight
        weights.add(weight)
        scale_leaf = None
        if layer.learnable_scales:
            replicas = [Replicate()] * mesh.ndim
            scale = distribute_tensor(layer.log_scale.detach(), mesh, replicas, src_data_rank=None)
            # The model may still be on the host. Its parameters are on the devices of the mesh from here on.
            scale_leaf = torch.zeros_like(scale.to_local(), requires_grad=True)
            layer.log_scale = nn.Parameter(scale, layer.log_scale.requires_grad)
            scatter.attach_replicated(scale_leaf, layer.log_scale)
            weights.add(layer.log_scale)
        options: dict[str, Any] = {"cut": cut, "exchange": exchange, "leaf": leaf, "scale_leaf": scale_leaf}
        layer.wrap_backend(partial(PackedRows, unit=units.get(layer), **options))
    return weights


def _units(blocks: Iterable[nn.Module], exchange: Exchange) -> dict[nn.Module, Unit]:
    """Make a unit for each block, and return the unit of each ternary layer in the blocks."""
    units: dict[nn.Module, Unit] = {}
    before = None
    for block in blocks:
        unit = Unit(exchange)
        unit.attach(block, before)
        units |= dict.fromkeys(ternary_layers(block).values(), unit)
        before = unit
    return units
