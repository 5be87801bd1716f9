"""Ternary layers whose latent weights are sharded by rows, and whose codes every rank holds whole.

FSDP2 gathers a parameter in full precision for every forward and every backward. A ternary layer does not need this:
its products read codes, which take 2 bits for each weight and change once in an optimiser step. So training works like
this:

* Latent weights, gradients and optimiser states are sharded by rows (``DTensor``, ``Shard(0)``), and FSDP2 leaves them
  alone (``ignored_params``). FSDP2 still shards embeddings, norms and the head.
* Each rank computes the mask and the codes of its own rows. gamma is a mean over the whole weight, so the ranks
  exchange the terms of that mean (with kernels, one float for each row). Every rank then sums all terms in the order in
  which one process would sum them. So gamma, masks and codes equal those of one process to the last bit.
* Codes and masks travel once in an optimiser step, at 2 bits for each weight
  (:mod:`~sbn_lightning.distributed.rows`). They stay whole on every rank until the next step, so neither the backward
  nor further micro-batches gather anything.
* Gradients are reduce-scattered as the backward computes them (:mod:`~sbn_lightning.distributed.gradients`).

The layers do not know about any of this. Their backend is wrapped in :class:`PackedRows`, which is a backend itself.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sbn_lightning.backends.reference import Backend, Keep
from sbn_lightning.backends.rows import Over, row_maker
from sbn_lightning.distributed.gradients import GradientScatter, stand_in
from sbn_lightning.distributed.rows import RowCut, decode, encode, gather_rows
from sbn_lightning.layers.sparse_bit_linear import ternary_layers
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern, pack_mask, unpack_mask
from sbn_lightning.sparsity.ternary import expand_scale


class PackedRows:
    """A backend for a layer whose latent weight is sharded by rows.

    Args:
        inner: The backend that computes: the reference or the integer kernels.
        cut: The rows of the layer that each rank has.
        group: The ranks that share the rows.
        leaf: The tensor that takes the place of the latent weight in autograd
            (:func:`~sbn_lightning.distributed.gradients.stand_in`).
    """

    def __init__(self, inner: Backend, cut: RowCut, group: dist.ProcessGroup, leaf: Tensor) -> None:
        self.inner, self.cut, self.group, self.leaf = inner, cut, group, leaf
        self.maker = row_maker(inner)

    @property
    def name(self) -> str:
        return self.inner.name

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["inner"], name)

    @property
    def seed(self) -> Tensor | None:
        """The inner backend's seed for stochastic rounding."""
        return getattr(self.inner, "seed", None)

    @seed.setter
    def seed(self, seed: Tensor) -> None:
        self.inner.seed = seed  # type: ignore[attr-defined]

    def rows(self, weight: Tensor) -> Tensor:
        """Return this rank's rows of a weight. The weight is either sharded or whole on every rank."""
        return local_rows(weight) if isinstance(weight, DTensor) else self.cut.mine(weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedRows:
        # A copy is for evaluation only, for example an average of weights. So its leaf sends no gradient anywhere.
        return PackedRows(deepcopy(self.inner, memo), self.cut, self.group, self.leaf.detach())

    def fresh_mask(self, scores: Tensor, pattern: NMPattern, keep: Keep) -> Tensor:
        return gather_rows(self._fresh_rows(scores, pattern, keep), self.cut, self.group)

    def _fresh_rows(self, scores: Tensor, pattern: NMPattern, keep: Keep) -> Tensor:
        if self.cut.count == 0:
            return scores.new_empty(0, -(-scores.shape[1] // 8), dtype=torch.uint8)
        return self.inner.fresh_mask(scores, pattern, self._keep(keep))

    def prepare(self, latent: Tensor, mask_bits: Tensor | None, keep: Keep, sparsity: SparsityConfig) -> Any:
        """Prepare the weight like any backend, but from the latent weights of this rank's rows alone.

        Args:
            latent: The latent weights of this rank's rows, ``[cut.count, in_features]``.
            mask_bits: The whole packed mask; None for a fresh mask.
            keep: How many weights a fresh mask keeps in a group, for all rows.
            sparsity: The options of the layer.
        """
        columns, over = latent.shape[1], sparsity.gamma_over
        mine = None if mask_bits is None else self.cut.mine(mask_bits)
        if mine is None and over in ("kept", "masked"):
            mine = self._fresh_rows(latent, sparsity.nm, keep)
        gamma = self._gamma(
            latent, None if over in ("dense", "nonzero") else mine, "dense" if over == "nonzero" else over, sparsity
        )
        codes, mask = self._codes(latent, mine, keep, gamma, sparsity)
        if over == "nonzero":
            gamma = self._gamma(latent, pack_mask(codes != 0), "kept", sparsity)
        whole_codes, whole_bits = decode(gather_rows(encode(codes, mask), self.cut, self.group), columns)
        row_scale = expand_scale(gamma, sparsity.split_sizes, self.cut.rows)
        bits = whole_bits if mask_bits is None else mask_bits
        return self.maker.assemble(whole_codes, row_scale, bits, keep, sparsity)

    def linear(
        self,
        x: Tensor,
        latent: Tensor,
        prepared: Any,
        gradient_mask: Tensor | None,
        activation_bits: int | None,
        swiglu: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        return self.inner.linear(x, self.leaf, prepared, gradient_mask, activation_bits, swiglu, dtype)

    def _keep(self, keep: Keep) -> Keep:
        return self.cut.mine(keep) if isinstance(keep, Tensor) else keep

    def _gamma(self, rows: Tensor, mask_bits: Tensor | None, over: Over, sparsity: SparsityConfig) -> Tensor:
        """Compute gamma of each part of the whole weight, with the bits that one process would get."""
        terms = self.maker.gamma_terms(rows, mask_bits, over)
        whole = [gather_rows(term, self.cut, self.group) for term in terms]
        return self.maker.gamma(whole, over, rows.shape[1], sparsity)

    def _codes(
        self, rows: Tensor, mask_bits: Tensor | None, keep: Keep, gamma: Tensor, sparsity: SparsityConfig
    ) -> tuple[Tensor, Tensor]:
        """Compute the codes, int8, and the mask, bool, of this rank's rows."""
        columns = rows.shape[1]
        if self.cut.count == 0:
            return rows.new_empty(0, columns, dtype=torch.int8), rows.new_empty(0, columns, dtype=torch.bool)
        parts = self.cut.parts(sparsity.split_sizes)
        codes, bits = self.maker.row_codes(rows, mask_bits, self._keep(keep), gamma, parts, sparsity)
        return codes, unpack_mask(bits, columns)


def local_rows(weight: Tensor) -> Tensor:
    """The rows of a sharded weight that this rank has, without their gradient."""
    return cast(DTensor, weight.detach()).to_local()


def shard_packed(
    module: nn.Module, mesh: DeviceMesh, *, reduce_dtype: torch.dtype = torch.float32
) -> set[nn.Parameter]:
    """Shard the latent weights of a model's ternary layers by rows. FSDP2 must leave these weights alone.

    Args:
        module: The whole model, with equal weights on all ranks; changed in place.
        mesh: The ranks. In a mesh of one dimension all ranks share the rows. A mesh of two dimensions is for hybrid
            sharding: the ranks of the first dimension hold the same rows, those of the second share the rows.
        reduce_dtype: The dtype in which gradients travel: float32 or bfloat16.

    Returns:
        The sharded weights, for ``fully_shard(..., ignored_params=)``.
    """
    sharding = mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[1]]  # type: ignore[index]
    replicate = None if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[0]].get_group()  # type: ignore[index]
    group = sharding.get_group()
    scatter = GradientScatter(group, replicate, mesh.size())
    weights = set()
    for layer in ternary_layers(module).values():
        latent = layer.weight.detach()
        cut = RowCut(layer.out_features, sharding.get_local_rank(), sharding.size())
        weight = nn.Parameter(
            distribute_tensor(latent, sharding, [Shard(0)], src_data_rank=None), layer.weight.requires_grad
        )
        rows, columns = latent.shape
        leaf = stand_in(rows, columns, reduce_dtype, local_rows(weight).device)
        scatter.attach(leaf, weight, cut)
        layer.weight = weight
        layer.wrap_backend(partial(PackedRows, cut=cut, group=group, leaf=leaf))
        weights.add(weight)
    return weights
