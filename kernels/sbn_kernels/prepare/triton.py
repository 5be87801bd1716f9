"""Prepares a weight once an optimiser step: latent weight -> gamma, mask, ternary codes, packed words, statistics.

Formulas (Sparse-BitNet, arXiv 2603.05168), for each part of a fused weight::

    mask  = the N largest |W| of each M consecutive weights, the lower index first on a tie
    gamma = max(mean|W|, 1e-5), over all weights of the part (other means: see ``gamma_over``)
    T     = clamp(round(W / gamma), -1, 1) * mask
    gamma = max(mean|W| where T != 0, 1e-5) after that, if ``gamma_over`` is ``"nonzero"``

Two passes read the weight: one sums, the other does everything else. Between them, one small launch a part computes
gamma. Sums are taken in a fixed order (float32 within a row, float64 across rows), so the result is the same in every
run. A group size that is no power of two, and gamma over the kept weights of a fresh mask, cost one more pass, which
computes the mask bits first. gamma over non-zero codes costs one more pass at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sbn_kernels.common.buffers import empty_vector
from sbn_kernels.common.checks import FLOAT_DTYPES, refuse_gradients
from sbn_kernels.common.integers import ceil_div, next_power_of_2
from sbn_kernels.common.packing import LAYOUTS, packed_shape
from sbn_kernels.prepare.device import (
    TILE_COLUMNS,
    TILE_ROWS,
    gamma_kernel,
    mask_kernel,
    prepare_kernel,
    row_sums_kernel,
)
from sbn_kernels.runtime.capability import Needs, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

GammaOver = Literal["dense", "kept", "masked", "nonzero"]
_FAST_GROUPS = (1, 2, 4, 8, 16, 32)
NEEDS = Needs("prepare", least=(0, 0), interpreter=True)


_row_sums = Launcher(row_sums_kernel, enable_fp_fusion=True)
_gamma = Launcher(gamma_kernel, enable_fp_fusion=True)
_mask_bits = Launcher(mask_kernel, enable_fp_fusion=True)
_prepare = Launcher(prepare_kernel, enable_fp_fusion=True)


class PreparedWeight(NamedTuple):
    """What a layer needs of its weight until the next optimiser step. Tensors that were not asked for are empty.

    Attributes:
        gamma: float32 ``[splits]``.
        row_scale: float32 ``[out]``: gamma of each row.
        mask_bits: uint8 ``[out, ceil(in / 8)]``, lowest bit first.
        codes: int8 ``[out, in]`` in {-1, 0, 1}.
        packed: int32, see :mod:`sbn_kernels.common.packing`.
        stats: int64 ``[4]``: mask bits that differ from the old mask; weights that round to zero by themselves; other
            weights that the mask sets to zero; weights that the mask keeps.
    """

    gamma: Tensor
    row_scale: Tensor
    mask_bits: Tensor
    codes: Tensor
    packed: Tensor
    stats: Tensor


def _outputs(
    weight: Tensor, parts: int, layout: str, want_mask: bool, want_codes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    out, columns = weight.shape
    device = weight.device
    return (
        torch.empty(parts, dtype=torch.float32, device=device),
        empty_vector(out, device),
        torch.empty((out, ceil_div(columns, 8)) if want_mask else (0, 0), dtype=torch.uint8, device=device),
        torch.empty((out, columns) if want_codes else (0, 0), dtype=torch.int8, device=device),
        torch.empty(packed_shape(out, columns) if layout != "none" else (0, 0, 0), dtype=torch.int32, device=device),
        torch.zeros(4, dtype=torch.int64, device=device),
    )


def _fresh_bits(weight: Tensor, n: int, m: int, keep: Tensor | None) -> Tensor:
    """Computes mask bits for any group size, with rows padded to whole int32 words."""
    out, columns = weight.shape
    padded = next_power_of_2(m)
    groups = columns // m
    block = max(8, 512 // padded)
    bits = torch.zeros((out, ceil_div(columns, 32) * 4), dtype=torch.uint8, device=weight.device)
    _mask_bits(
        (out, ceil_div(groups, block), 1),
        (weight, weight if keep is None else keep, bits.view(torch.int32)),
        (out, columns, groups, weight.stride(0), bits.shape[1]),
        (n, m, padded, keep is not None, block),
    )
    return bits


def sums_of_rows(
    weight: Tensor, mask: Tensor | None, row_scale: Tensor | None = None, count: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Sums |W| of each row over the weights that count, and counts them if ``count``.

    A weight counts if the mask (if given) keeps it and ``row_scale`` (if given) does not round it to zero.
    """
    out, columns = weight.shape
    sums = torch.empty(out, dtype=torch.float32, device=weight.device)
    counts = torch.empty(out, dtype=torch.int32, device=weight.device) if count else None
    inputs = [weight if tensor is None else tensor for tensor in (mask, row_scale)]
    _row_sums(
        (out, 1, 1),
        (weight, *inputs, sums, sums if counts is None else counts),
        (columns, weight.stride(0), 0 if mask is None else mask.stride(0)),
        (mask is not None, row_scale is not None, count, min(4096, next_power_of_2(columns))),
    )
    return sums, counts


def write_gamma(
    sums: Tensor | None, counts: Tensor | None, split_sizes: Sequence[int], columns: int, gammas: Tensor, scale: Tensor
) -> None:
    """Writes gamma of each part to ``gammas``, and gamma of each row to ``scale``.

    gamma is the sum over the rows of a part, divided by the counts, or by the number of weights without counts. Without
    sums, ``gammas`` holds gamma already.
    """
    tensors = [gammas if tensor is None else tensor for tensor in (sums, counts)]
    first = 0
    for part, size in enumerate(split_sizes):
        constants = (counts is not None, sums is None, 1024)
        _gamma((1, 1, 1), (*tensors, gammas, scale), (part, first, size, columns), constants, 8)
        first += size


@kernel_op("prepare_weight")
def _prepare_weight(
    weight: Tensor,
    n: int,
    m: int,
    split_sizes: list[int],
    mask_bits: Tensor | None,
    old_mask_bits: Tensor | None,
    keep: Tensor | None,
    gamma: Tensor | None,
    gamma_over: str,
    layout: str,
    want_mask: bool,
    want_codes: bool,
    want_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    require(NEEDS, weight)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    out, columns = weight.shape
    outputs = _outputs(weight, len(split_sizes), layout, want_mask, want_codes)
    gammas, row_scale, bits, codes, packed, stats = outputs
    given = mask_bits
    dense = n == m and keep is None
    if given is None and not dense and (m not in _FAST_GROUPS or gamma_over in ("kept", "masked")):
        given = _fresh_bits(weight, n, m, keep)
    sums, counts = None, None
    if gamma is not None:
        gammas.copy_(gamma)
    else:
        mask = given if gamma_over in ("kept", "masked") else None
        sums, counts = sums_of_rows(weight, mask, count=gamma_over == "kept" and mask is not None)
    write_gamma(sums, counts, split_sizes, columns, gammas, row_scale)
    nonzero = gamma_over == "nonzero" and gamma is None
    if nonzero and given is None and not dense and not want_mask:
        bits = torch.empty((out, ceil_div(columns, 8)), dtype=torch.uint8, device=weight.device)
    group = m if given is None and not dense else 4
    rows_padded = packed_shape(out, columns)[0] * 128 if layout != "none" else out
    inputs = [weight if tensor is None else tensor for tensor in (given, old_mask_bits, keep)]
    strides = [0 if tensor is None else tensor.stride(0) for tensor in (given, old_mask_bits)]
    pattern = (group if dense else min(n, group), group)
    masks = (given is not None, keep is not None and given is None, old_mask_bits is not None)
    wanted = (bits.numel() > 0, want_codes, LAYOUTS.index(layout), want_stats)
    _prepare(
        (ceil_div(rows_padded, TILE_ROWS), ceil_div(columns, TILE_COLUMNS), 1),
        (weight, row_scale, *inputs, bits, codes, packed, stats),
        (out, columns, packed.shape[1], weight.stride(0), *strides, bits.shape[1]),
        (*pattern, *masks, *wanted, TILE_ROWS, TILE_COLUMNS),
        8,
    )
    if nonzero:
        mask = given if given is not None else None if dense else bits
        sums, counts = sums_of_rows(weight, mask, row_scale, count=True)
        write_gamma(sums, counts, split_sizes, columns, gammas, row_scale)
    return outputs


@kernel_fake("prepare_weight")
def _(
    weight: Tensor, split_sizes: list[int], layout: str, want_mask: bool, want_codes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _outputs(weight, len(split_sizes), layout, want_mask, want_codes)


def prepare_weight(
    weight: Tensor,
    n: int,
    m: int,
    split_sizes: Sequence[int] | None = None,
    *,
    mask_bits: Tensor | None = None,
    old_mask_bits: Tensor | None = None,
    keep: Tensor | None = None,
    gamma: Tensor | None = None,
    gamma_over: GammaOver = "dense",
    layout: str = "none",
    want_mask: bool = True,
    want_codes: bool = True,
    want_stats: bool = False,
) -> PreparedWeight:
    """Prepares a latent weight for the products.

    Args:
        weight: Latent weight ``[out, in]``, float32, bfloat16 or float16.
        n: The number of weights left in a group; ``n == m`` is dense.
        m: The number of weights of a group along ``in``, 1 to 32; ``in % m == 0``.
        split_sizes: The rows of each part of a fused weight, one gamma each; None: one part.
        mask_bits: The mask to use instead of a fresh one, uint8 ``[out, ceil(in / 8)]``.
        old_mask_bits: The mask that the statistics count changes against.
        keep: The number of weights left in each group of a row, int32 ``[out]``, instead of ``n``.
        gamma: The scales to use, float32 ``[splits]``, whatever ``gamma_over`` says; for a sharded weight, for example.
        gamma_over: The weights whose mean magnitude is gamma. ``"dense"``: all. ``"kept"``: those that the mask keeps.
            ``"masked"``: all, where masked weights count as zero. ``"nonzero"``: the codes use the mean over all
            weights, and gamma is the mean over the weights whose code is not zero.
        layout: ``"none"``, ``"dense"`` or ``"sparse24"`` (the mask must keep at most 2 of every 4).
        want_mask: Whether to return mask bits.
        want_codes: Whether to return int8 codes.
        want_stats: Whether to count the statistics, which costs a little time.

    Returns:
        See :class:`PreparedWeight`.

    Raises:
        ValueError: If an argument does not fit. The contents of a given mask are not checked, because that would stall
            the GPU: a group that keeps more than 2 of 4 loses weights in layout ``sparse24``.
        UnsupportedError: If there is no GPU.
    """
    refuse_gradients(weight, gamma)
    if weight.dim() != 2 or weight.dtype not in FLOAT_DTYPES or weight.numel() == 0:
        shape = list(weight.shape)
        raise ValueError(f"weight must be float32, bfloat16 or float16 [out, in], not {weight.dtype} {shape}")
    out, columns = weight.shape
    if not 1 <= n <= m <= 32:
        raise ValueError(f"pattern {n}:{m}: N:M needs 1 <= N <= M <= 32")
    if columns % m:
        raise ValueError(f"in_features={columns} is not a multiple of M={m}")
    sizes = [out] if split_sizes is None else list(split_sizes)
    if sum(sizes) != out or min(sizes) < 1:
        raise ValueError(f"split_sizes {sizes} do not add up to {out} rows")
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if layout == "sparse24" and mask_bits is None and (m != 4 or n > 2 or keep is not None):
        raise ValueError(f"layout sparse24 holds 2:4 weights; {n}:{m} needs layout dense (or a 2:4 mask given)")
    if gamma_over not in get_args(GammaOver):
        raise ValueError(f"gamma_over {gamma_over!r} is not one of {', '.join(get_args(GammaOver))}")
    for name, bits in (("mask_bits", mask_bits), ("old_mask_bits", old_mask_bits)):
        want = (out, ceil_div(columns, 8))
        if bits is not None and (bits.shape != want or bits.dtype != torch.uint8 or bits.stride(1) != 1):
            raise ValueError(f"{name} must be uint8 {list(want)}, not {bits.dtype} {list(bits.shape)}")
    if keep is not None and (keep.shape != (out,) or keep.dtype != torch.int32):
        raise ValueError(f"keep must be int32 [{out}], not {keep.dtype} {list(keep.shape)}")
    if gamma is not None and (gamma.shape != (len(sizes),) or gamma.dtype != torch.float32):
        raise ValueError(f"gamma must be float32 [{len(sizes)}], not {gamma.dtype} {list(gamma.shape)}")
    keep, gamma = (None if vector is None else vector.contiguous() for vector in (keep, gamma))
    given = (mask_bits, old_mask_bits, keep, gamma, gamma_over)
    wanted = (layout, want_mask, want_codes, want_stats)
    return PreparedWeight(*torch.ops.sbn_kernels.prepare_weight(weight, n, m, sizes, *given, *wanted))
