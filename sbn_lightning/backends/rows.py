"""A ternary weight whose rows are on several ranks: what each backend computes from its own rows, and from all rows.

One process makes a ternary weight in one call, :meth:`~sbn_lightning.backends.base.Backend.prepare`. Ranks that
hold some rows each need the same work in pieces, with an exchange between the pieces:

1. ``terms``: what gamma is a mean of, for some rows;
2. ``row_scales``: gamma of each row of many weights, from the terms of all ranks, with the same bits as in one process;
3. ``words``: codes and mask of some rows, packed at 2 bits a weight;
4. ``assemble``: what ``linear`` takes, from the words of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from sbn_kernels.exchange.reference import decode_reference, encode_reference
from torch import Tensor

from sbn_lightning.backends.base import Backend, Keep, TernaryWeight
from sbn_lightning.backends.reference import ReferenceBackend
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import pack_mask, top_n_mask, unpack_mask
from sbn_lightning.sparsity.ternary import expand_scale, ternary_codes, weight_scale

if TYPE_CHECKING:
    from sbn_lightning.backends.integer import KernelBackend

Over = Literal["dense", "kept", "masked"]


@dataclass(frozen=True)
class Terms:
    """The terms of gamma of one weight, from all ranks.

    Attributes:
        parts: The tensors of :meth:`RowMaker.terms`, each ``[ranks, rows of a rank, ...]``. They are views of one
            buffer, which holds the terms of many weights.
        buffer: That buffer, uint8 ``[ranks, bytes of a rank]``.
        rows: The number of rows of the whole weight. The last ranks may have sent rows that do not count.
        over: The weights that gamma is a mean over.
        in_features: The number of weights in a row.
        split_sizes: The rows of each part of a fused weight; None means one part.
    """

    parts: tuple[Tensor, ...]
    buffer: Tensor
    rows: int
    over: Over
    in_features: int
    split_sizes: tuple[int, ...] | None


class RowMaker(Protocol):
    """How a backend makes a ternary weight whose rows are on several ranks."""

    def terms(self, rows: Tensor, mask_bits: Tensor | None, over: Over, row_scale: Tensor | None) -> tuple[Tensor, ...]:
        """Computes what gamma is a mean of, for some rows.

        Args:
            rows: Latent weights ``[rows, in_features]``; there may be none.
            mask_bits: The packed mask of these rows; None if every weight counts.
            over: The weights that gamma is a mean over.
            row_scale: gamma of each row. Weights that round to zero with this gamma do not count. None leaves no
                weight out for that reason.

        Returns:
            Tensors whose first dimension is ``rows``. Concatenated over the ranks, they are the tensors of all rows.
        """

    def row_scales(self, weights: Sequence[Terms]) -> list[Tensor]:
        """Computes gamma of each row, ``[rows]`` for each weight, from the terms of all ranks."""

    def words(
        self, rows: Tensor, mask_bits: Tensor | None, keep: Keep, row_scale: Tensor, sparsity: SparsityConfig
    ) -> Tensor:
        """Computes codes and mask of some rows, packed: uint8 ``[rows, ceil(in_features / 4)]``.

        Args:
            rows: Latent weights ``[rows, in_features]``; there may be none.
            mask_bits: The packed mask of these rows; None for a fresh one.
            keep: The number of weights that a fresh mask leaves in each group, for all or for each of these rows.
            row_scale: gamma of each of these rows.
            sparsity: The options of the layer.
        """

    def assemble(
        self, words: Tensor, row_scale: Tensor, mask_bits: Tensor | None, keep: Keep, sparsity: SparsityConfig,
        in_features: int,
    ) -> Any:  # fmt: skip
        """Makes what ``linear`` takes.

        Args:
            words: The words of all ranks, uint8 ``[ranks, rows of a rank, ceil(in_features / 4)]``.
            row_scale: gamma of each row of the whole weight, ``[out_features]``.
            mask_bits: The packed mask of all rows; None takes the mask out of the words.
            keep: The most weights that the mask keeps in a group, for all rows or for each.
            sparsity: The options of the layer.
            in_features: The number of weights in a row.
        """


class ReferenceRows:
    """Rows in plain PyTorch.

    The reference's gamma is one mean over the whole weight, and the last bits of a sum depend on the order of all its
    terms. So the ranks exchange the weights themselves, 4 bytes each. Kernels sum by row and exchange one float a row.
    """

    def terms(self, rows: Tensor, mask_bits: Tensor | None, over: Over, row_scale: Tensor | None) -> tuple[Tensor, ...]:
        if row_scale is not None:
            mask = None if mask_bits is None else unpack_mask(mask_bits, rows.shape[1])
            mask_bits = pack_mask(ternary_codes(rows, row_scale, mask) != 0)
        return (rows,) if mask_bits is None else (rows, mask_bits)

    def row_scales(self, weights: Sequence[Terms]) -> list[Tensor]:
        scales = []
        for weight in weights:
            whole = [part.flatten(0, 1)[: weight.rows] for part in weight.parts]
            mask = unpack_mask(whole[1], weight.in_features) if len(whole) > 1 else None
            gamma = weight_scale(whole[0], weight.split_sizes, over=weight.over, mask=mask)
            scales.append(expand_scale(gamma, weight.split_sizes, weight.rows))
        return scales

    def words(
        self, rows: Tensor, mask_bits: Tensor | None, keep: Keep, row_scale: Tensor, sparsity: SparsityConfig
    ) -> Tensor:
        mask = top_n_mask(rows, sparsity.nm, keep) if mask_bits is None else unpack_mask(mask_bits, rows.shape[1])
        return encode_reference(ternary_codes(rows, row_scale, mask), mask)

    def assemble(
        self, words: Tensor, row_scale: Tensor, mask_bits: Tensor | None, keep: Keep, sparsity: SparsityConfig,
        in_features: int,
    ) -> TernaryWeight:  # fmt: skip
        codes, mask = decode_reference(words.flatten(0, 1)[: len(row_scale)], in_features)
        return TernaryWeight(codes, row_scale, pack_mask(mask) if mask_bits is None else mask_bits)


class KernelRows:
    """Rows on a GPU. gamma of all layers takes one launch, and each layer one launch before and one after the exchange.

    Args:
        backend: The backend of the layer.
    """

    def __init__(self, backend: KernelBackend) -> None:
        self.backend = backend

    def terms(self, rows: Tensor, mask_bits: Tensor | None, over: Over, row_scale: Tensor | None) -> tuple[Tensor, ...]:
        from sbn_kernels.prepare.rows import row_sums

        sums, counts = row_sums(rows, mask_bits, row_scale, count=over == "kept")
        return (sums,) if counts is None else (sums, counts)

    def row_scales(self, weights: Sequence[Terms]) -> list[Tensor]:
        from sbn_kernels.exchange.triton import gamma_of_parts

        buffer = weights[0].buffer.view(torch.float32)
        numbers: list[tuple[int, ...]] = []
        starts, length = [], 0
        for weight in weights:
            places = [(part.data_ptr() - buffer.data_ptr()) // 4 for part in weight.parts]
            padded, first = weight.parts[0].shape[1], 0
            counts = places[1] if len(places) > 1 else -1
            for size in weight.split_sizes or (weight.rows,):
                numbers.append((places[0], counts, padded, first, size, weight.in_features, length))
                first += size
            starts.append(length)
            length += -(-weight.rows // 4) * 4  # Kernels read row scales in pieces of 16 bytes.
        _, scale = gamma_of_parts(buffer, _table(tuple(numbers), buffer.device), length)
        return [scale[start : start + weight.rows] for start, weight in zip(starts, weights, strict=True)]

    def words(
        self, rows: Tensor, mask_bits: Tensor | None, keep: Keep, row_scale: Tensor, sparsity: SparsityConfig
    ) -> Tensor:
        from sbn_kernels.exchange.triton import GROUPS_IN_REGISTERS, encode_rows

        n, m = keep if isinstance(keep, int) else 0, sparsity.nm.m
        in_registers = isinstance(keep, int) and (n == m or m in GROUPS_IN_REGISTERS)
        if mask_bits is None and len(rows) > 0 and not in_registers:
            mask_bits = self.backend.fresh_mask(rows, sparsity.nm, keep)
        return encode_rows(rows, row_scale, n, m, mask_bits)

    def assemble(
        self, words: Tensor, row_scale: Tensor, mask_bits: Tensor | None, keep: Keep, sparsity: SparsityConfig,
        in_features: int,
    ) -> Any:  # fmt: skip
        return self.backend.from_words(words, row_scale, mask_bits, keep, sparsity, in_features)


_tables: dict[tuple[tuple[tuple[int, ...], ...], torch.device], Tensor] = {}


def _table(numbers: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The table of :func:`~sbn_kernels.exchange.triton.gamma_of_parts`. Copying it to a GPU would stall every step."""
    found = _tables.get((numbers, device))
    if found is None:
        if len(_tables) >= 64:  # Models come and go in a long process.
            _tables.clear()
        found = _tables[numbers, device] = torch.tensor(numbers, dtype=torch.int32, device=device)
    return found


def row_maker(backend: Backend) -> RowMaker:
    """How ``backend`` makes a ternary weight whose rows are elsewhere."""
    if isinstance(backend, ReferenceBackend):
        return ReferenceRows()
    return KernelRows(cast("KernelBackend", backend))
