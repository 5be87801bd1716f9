"""Biases, rotation and cache of a prompt's queries, keys and values in one pass; :mod:`.reference` has the formulas.

Queries, keys and values are changed in place, in the result of their product, and attention reads all three where they
are. A compiled block takes three kernels for this, and writes all of them anew.

The kernel writes into tensors that it is given, so it is a plain function and no torch operator.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.common.integers import next_power_of_2
from sbn_kernels.common.overlap import begin
from sbn_kernels.runtime.capability import Needs, require
from sbn_kernels.runtime.devices import check_one_device
from sbn_kernels.runtime.launch import Launcher

NEEDS = Needs("prompt", least=(0, 0), interpreter=True)
_NAMES = ("qkv", "bias", "cos", "sin", "keys", "values", "rows", "before")


@triton.jit
def rotate_and_store_kernel(
    qkv_pointer, bias_pointer, cos_pointer, sin_pointer, keys_pointer, values_pointer, rows_pointer, before_pointer,
    length, slots,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, ALL: tl.constexpr, HALF: tl.constexpr, BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One token of one sequence a program. ``ALL`` is the number of heads, rounded up to a power of two."""
    token = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    row = tl.load(rows_pointer + sequence)
    position = token + tl.load(before_pointer + sequence)
    begin(EARLY)
    head = tl.arange(0, ALL)[:, None]
    feature = tl.arange(0, HALF)[None, :]
    count: tl.constexpr = HEADS + 2 * KV_HEADS
    inside = (head < count) & (feature < HALF)
    at = head * (2 * HALF) + feature
    here = qkv_pointer + (sequence * length + token) * (count * 2 * HALF) + at
    first = tl.load(here, mask=inside, other=0.0)
    second = tl.load(here + HALF, mask=inside, other=0.0)
    kind = first.dtype
    if BIAS:
        first = (first.to(tl.float32) + tl.load(bias_pointer + at, mask=inside, other=0.0).to(tl.float32)).to(kind)
        other = tl.load(bias_pointer + at + HALF, mask=inside, other=0.0)
        second = (second.to(tl.float32) + other.to(tl.float32)).to(kind)
    turns = head < HEADS + KV_HEADS
    angle = position * (2 * HALF) + feature
    cos0, cos1 = tl.load(cos_pointer + angle), tl.load(cos_pointer + angle + HALF)
    sin0, sin1 = tl.load(sin_pointer + angle), tl.load(sin_pointer + angle + HALF)
    a, b = first.to(tl.float32), second.to(tl.float32)
    first = tl.where(turns, (a * cos0 + b * sin0).to(kind), first)
    second = tl.where(turns, (b * cos1 + a * sin1).to(kind), second)
    tl.store(here, first, mask=inside)
    tl.store(here + HALF, second, mask=inside)
    kv_head = head - HEADS
    to_keys = (kv_head >= 0) & (kv_head < KV_HEADS) & (feature < HALF)
    slot = ((row * KV_HEADS + kv_head) * slots + position) * (2 * HALF) + feature
    tl.store(keys_pointer + slot, first, mask=to_keys)
    tl.store(keys_pointer + slot + HALF, second, mask=to_keys)
    kv_head = kv_head - KV_HEADS
    to_values = (kv_head >= 0) & inside
    slot = ((row * KV_HEADS + kv_head) * slots + position) * (2 * HALF) + feature
    tl.store(values_pointer + slot, first, mask=to_values)
    tl.store(values_pointer + slot + HALF, second, mask=to_values)


_rotate = Launcher(rotate_and_store_kernel, enable_fp_fusion=False, overlaps=True)


def rotate_and_store(
    qkv: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    heads: int,
    before: Tensor,
) -> Tensor:
    """Adds the bias to queries, keys and values, rotates queries and keys, and writes keys and values to a cache.

    Args:
        qkv: Queries, keys and values of each token, ``[batch, tokens, (heads + 2 kv_heads) * head_size]``, contiguous.
            They are changed in place.
        bias: The bias of the product, or None.
        cos: The cosines of the rotation, float32 ``[positions, head_size]``.
        sin: The sines, with the opposite sign in the first half of a head.
        keys: The keys of the cache, ``[rows, kv_heads, slots, head_size]``, contiguous.
        values: The values of the cache.
        rows: The row of the cache of each sequence, int64 ``[batch]``.
        heads: The number of query heads.
        before: The number of tokens that each sequence has in the cache already, int64 ``[batch]``. These and the new
            tokens must fit the tables and the slots, which is not checked.

    Returns:
        ``qkv``.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If there is no GPU.
    """
    batch, length, width = qkv.shape
    kv_heads, slots, size = keys.shape[1:]
    count = heads + 2 * kv_heads
    if width != count * size or size != next_power_of_2(size) or length > min(slots, cos.shape[0]):
        raise ValueError(f"{width} values of {length} tokens do not fit {count} heads of {size} and {slots} slots")
    if any(each.shape != (batch,) or each.dtype != torch.int64 for each in (rows, before)):
        raise ValueError(f"rows and numbers of tokens must be int64 [{batch}]")
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"the bias must be [{width}] or None, not {list(bias.shape)}")
    if not (qkv.is_contiguous() and keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("queries, keys and values and their caches must be contiguous")
    tensors = (qkv, bias, cos, sin, keys, values, rows, before)
    check_one_device("rotate_and_store", _NAMES, tensors)
    require(NEEDS, qkv)
    with torch.cuda.device_of(qkv):
        _rotate(
            (length, batch, 1),
            (qkv, qkv if bias is None else bias, *tensors[2:]),
            (length, slots),
            (heads, kv_heads, next_power_of_2(count), size // 2, bias is not None),
            4,
        )
    return qkv
