"""A ternary weight whose rows are on several ranks: what each backend computes from its own rows, and from all rows.

One process makes a ternary weight in one call, :meth:`~sbn_lightning.backends.reference.Backend.prepare`. Ranks that
hold some rows each need the same work in pieces, with an exchange between the pieces:

1. ``gamma_terms``: what gamma is a mean of, for some rows;
2. ``gamma``: gamma of each part, from the terms of all rows, with the same bits as in one process;
3. ``row_codes``: codes and mask of some rows;
4. ``assemble``: what ``linear`` takes, from the codes and the mask of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from torch import Tensor

from sbn_lightning.backends.reference import Backend, Keep, ReferenceBackend, TernaryWeight
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import pack_mask, top_n_mask, unpack_mask
from sbn_lightning.sparsity.ternary import ternary_codes, weight_scale

if TYPE_CHECKING:
    from sbn_lightning.backends.integer import KernelBackend

Over = Literal["dense", "kept", "masked"]
Parts = Sequence[tuple[int, int]]
"""The parts of a fused weight that some rows belong to: pairs of a part's number and how many of the rows it has."""


class RowMaker(Protocol):
    """How a backend makes a ternary weight whose rows are elsewhere."""

    def gamma_terms(self, rows: Tensor, mask_bits: Tensor | None, over: Over) -> tuple[Tensor, ...]:
        """What gamma is computed from, for some rows.

        Args:
            rows: Latent weights ``[rows, in_features]``; there may be none.
            mask_bits: The packed mask of these rows; None where ``over`` is ``"dense"``.
            over: The weights that gamma is a mean over.

        Returns:
            Tensors whose first dimension is ``rows``. Concatenated over the ranks, they are the tensors of all rows.
        """

    def gamma(self, terms: Sequence[Tensor], over: Over, in_features: int, sparsity: SparsityConfig) -> Tensor:
        """gamma of each part, ``[parts]``, from the terms of all rows of a weight."""

    def row_codes(
        self, rows: Tensor, mask_bits: Tensor | None, keep: Keep, gamma: Tensor, parts: Parts, sparsity: SparsityConfig
    ) -> tuple[Tensor, Tensor]:
        """int8 codes and packed mask of some rows, of which there is at least one.

        Args:
            rows: Latent weights ``[rows, in_features]``.
            mask_bits: The packed mask of these rows; None for a fresh one.
            keep: What a fresh mask keeps in each group: one number, or one for each of these rows.
            gamma: gamma of all parts of the weight.
            parts: The parts that these rows belong to.
            sparsity: The options of the layer.
        """

    def assemble(
        self, codes: Tensor, row_scale: Tensor, mask_bits: Tensor, keep: Keep, sparsity: SparsityConfig
    ) -> Any:
        """What ``linear`` takes.

        Args:
            codes: int8 ``[out, in]``, all rows.
            row_scale: gamma of each row, ``[out]``.
            mask_bits: The packed mask of all rows.
            keep: What a fresh mask keeps in each group, or the most that the given mask keeps.
            sparsity: The options of the layer.
        """


class ReferenceRows:
    """Rows in plain PyTorch.

    The reference's gamma is one mean over the whole weight, and the last bits of a sum depend on the order of all its
    terms. So the ranks exchange the weights themselves, 4 bytes each. Kernels sum by row and exchange one float a row.
    """

    def gamma_terms(self, rows: Tensor, mask_bits: Tensor | None, over: Over) -> tuple[Tensor, ...]:
        return (rows,) if mask_bits is None else (rows, mask_bits)

    def gamma(self, terms: Sequence[Tensor], over: Over, in_features: int, sparsity: SparsityConfig) -> Tensor:
        mask = None if over == "dense" else unpack_mask(terms[1], in_features)
        return weight_scale(terms[0], sparsity.split_sizes, over=over, mask=mask)

    def row_codes(
        self, rows: Tensor, mask_bits: Tensor | None, keep: Keep, gamma: Tensor, parts: Parts, sparsity: SparsityConfig
    ) -> tuple[Tensor, Tensor]:
        if mask_bits is None:
            mask_bits = pack_mask(top_n_mask(rows, sparsity.nm, keep))
        row_scale = torch.cat([gamma[part].expand(count) for part, count in parts])
        return ternary_codes(rows, row_scale, unpack_mask(mask_bits, rows.shape[1])), mask_bits

    def assemble(
        self, codes: Tensor, row_scale: Tensor, mask_bits: Tensor, keep: Keep, sparsity: SparsityConfig
    ) -> Any:
        return TernaryWeight(codes, row_scale, mask_bits)


class KernelRows:
    """Rows on a GPU: gamma from one float a row, codes and packed words by the kernels of weight preparation."""

    def __init__(self, backend: KernelBackend) -> None:
        self.backend = backend

    def gamma_terms(self, rows: Tensor, mask_bits: Tensor | None, over: Over) -> tuple[Tensor, ...]:
        from sbn_kernels.prepare.rows import row_sums

        sums, counts = row_sums(rows, mask_bits, count=over == "kept")
        return (sums,) if counts is None else (sums, counts)

    def gamma(self, terms: Sequence[Tensor], over: Over, in_features: int, sparsity: SparsityConfig) -> Tensor:
        from sbn_kernels.prepare.rows import gamma_of_rows

        counts = terms[1] if over == "kept" else None
        return gamma_of_rows(terms[0], counts, sparsity.split_sizes or (len(terms[0]),), in_features)

    def row_codes(
        self, rows: Tensor, mask_bits: Tensor | None, keep: Keep, gamma: Tensor, parts: Parts, sparsity: SparsityConfig
    ) -> tuple[Tensor, Tensor]:
        import sbn_kernels as sk

        n, of_rows = (keep, None) if isinstance(keep, int) else (sparsity.nm.n, keep.to(torch.int32))
        weight = sk.prepare_weight(
            rows,
            n,
            sparsity.nm.m,
            [count for _, count in parts],
            mask_bits=mask_bits,
            keep=of_rows if mask_bits is None else None,
            gamma=torch.cat([gamma[part : part + 1] for part, _ in parts]),
            want_mask=mask_bits is None,
        )
        return weight.codes, weight.mask_bits if mask_bits is None else mask_bits

    def assemble(
        self, codes: Tensor, row_scale: Tensor, mask_bits: Tensor, keep: Keep, sparsity: SparsityConfig
    ) -> Any:
        return self.backend.from_codes(codes, row_scale, mask_bits, keep, sparsity)


def row_maker(backend: Backend) -> RowMaker:
    """How ``backend`` makes a ternary weight whose rows are elsewhere."""
    if isinstance(backend, ReferenceBackend):
        return ReferenceRows()
    return KernelRows(cast("KernelBackend", backend))
