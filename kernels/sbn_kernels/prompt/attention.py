"""Causal attention of new tokens to all tokens of their sequences, for prompts and for parts of prompts.

torch's kernels for this cannot be launched early, and need 5 microseconds beside their products. Its kernel for tokens
behind others in a cache takes their number from the host, so a CUDA graph serves one place. Here the numbers of rows
and tokens come from the device.

A program computes 64 queries of a head. Few programs take keys in blocks of 128, which has the least latency. Such a
program takes more than half of a multiprocessor's shared memory, so a multiprocessor has one of them. Where two fitted,
a prompt took longer. The likely reason is that programs which are launched early gather on the multiprocessors that
become free first. Many programs take blocks of 64, so that two fit. On an H200 and 12 heads of 128, 512 tokens take 8.7
microseconds and 2,048 tokens 36.5; torch's kernel takes 12.2 and 45.0. 2,048 tokens behind 6,144 others take 228, and
385 with torch's kernel.

With the same size of blocks, a token's result depends on the tokens before it, and not on the part or the padding.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sbn_kernels.common.checks import refuse_gradients
from sbn_kernels.common.integers import ceil_div
from sbn_kernels.common.overlap import begin
from sbn_kernels.runtime.capability import Needs, multiprocessors, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

# Blocks were chosen on a Hopper GPU. Later GPUs have other amounts of shared memory, and the kernel was not run there.
NEEDS = Needs("attend", only=(9, 0), interpreter=True)
_QUERIES = 64
# The size of a head -> the keys of a block -> the number of blocks that are on their way. For heads of 64 and blocks of
# 128 keys, four blocks keep a second program off a multiprocessor. A prompt of 512 tokens at 0.5B took 1.26 ms with
# four blocks, and 1.37 ms with two in the same run.
_STAGES = {128: {128: 2, 64: 3}, 64: {128: 4, 64: 3}}
HEAD_SIZES = tuple(_STAGES)


@triton.jit(do_not_specialize=["length"])
def attend_kernel(
    keys, values, q_pointer, rows_pointer, before_pointer, y_pointer,
    length, slots, q_sequence, q_head, q_token,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """QUERIES tokens of one head a program. The programs with most keys come first.

    ``keys`` and ``values`` are tensor descriptors of [rows * key heads * slots, SIZE], blocks of [KEYS, SIZE].
    """
    SCALE: tl.constexpr = 1.4426950408889634 / SIZE**0.5  # exp(x) = exp2(x * log2(e))
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence = tl.program_id(2)
    row = tl.load(rows_pointer + sequence).to(tl.int32)
    before = tl.load(before_pointer + sequence).to(tl.int32)
    begin(EARLY)
    token = block * QUERIES + tl.arange(0, QUERIES)
    feature = tl.arange(0, SIZE)
    wide = token.to(tl.int64)[:, None]
    q_at = q_pointer + sequence.to(tl.int64) * q_sequence + head.to(tl.int64) * q_head
    q = tl.load(q_at + wide * q_token + feature[None, :], mask=token[:, None] < length, other=0.0)
    place = before + token
    end = before + tl.minimum(length, (block + 1) * QUERIES)
    first_slot = (row * (HEADS // GROUP) + head // GROUP) * slots
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, SIZE], tl.float32)
    for first in range(0, end, KEYS):
        # A block may reach beyond the last key, into slots with zeros or other tokens. The mask drops their scores.
        k = keys.load([first_slot + first, 0])
        scores = tl.dot(q, tl.trans(k))
        seen = (first + tl.arange(0, KEYS))[None, :] <= place[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1) * SCALE)
        weights = tl.exp2(scores * SCALE - higher[:, None])
        shrink = tl.exp2(largest - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        v = values.load([first_slot + first, 0])
        acc = tl.dot(weights.to(v.dtype), v, acc)
        largest = higher
    y = (acc / total[:, None]).to(y_pointer.dtype.element_ty)
    to = y_pointer + (sequence.to(tl.int64) * length * HEADS + head) * SIZE
    tl.store(to + wide * (HEADS * SIZE) + feature[None, :], y, mask=token[:, None] < length)


_attend = {
    (size, keys): Launcher(attend_kernel, enable_fp_fusion=True, overlaps=True, num_stages=stages)
    for size, of_keys in _STAGES.items()
    for keys, stages in of_keys.items()
}


@kernel_op("attend")
def _op(q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, before: Tensor) -> Tensor:
    require(NEEDS, q)
    batch, heads, length, size = q.shape
    kv_heads, slots = keys.shape[1:3]
    y = torch.empty((batch, length, heads, size), dtype=q.dtype, device=q.device)
    grid = (heads, ceil_div(length, _QUERIES), batch)
    processors = multiprocessors(q.device.index) if q.is_cuda else 5  # Tests in the interpreter then see both blocks.
    block = 128 if math.prod(grid) < 2 * processors else 64
    _attend[size, block](
        grid,
        (q, rows, before, y),
        (length, slots, *q.stride()[:3]),
        (heads, heads // kv_heads, size, _QUERIES, block),
        descriptors=tuple(
            TensorDescriptor.from_tensor(cache.view(-1, size), [block, size]) for cache in (keys, values)
        ),
    )
    return y


@kernel_fake("attend")
def _(q: Tensor) -> Tensor:
    batch, heads, length, size = q.shape
    return torch.empty((batch, length, heads, size), dtype=q.dtype, device=q.device)


def attend(q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, before: Tensor) -> Tensor:
    """Computes attention of new tokens to all tokens of their sequences up to themselves.

    Args:
        q: The queries, rotated by position, bfloat16 or float16 ``[batch, heads, tokens, head_size]``. The last
            dimension is contiguous.
        keys: A cache that holds the keys of all tokens, the new ones included, ``[rows, kv_heads, slots, head_size]``,
            contiguous, in the dtype of ``q``. Its values are finite everywhere.
        values: The cache of values.
        rows: The row of the cache of each sequence, int64 ``[batch]``.
        before: The number of tokens before the new ones in each sequence, int64 ``[batch]``.

    Returns:
        ``[batch, tokens, heads, head_size]``.

    Raises:
        ValueError: If an argument does not fit, or wants a gradient.
        UnsupportedError: If the GPU is not a Hopper GPU.
    """
    batch, heads, length, size = q.shape
    if size not in HEAD_SIZES or q.stride(3) != 1 or heads % keys.shape[1] or not 1 <= length <= keys.shape[2]:
        raise ValueError(f"{length} queries of {heads} heads of {size} do not fit keys {list(keys.shape)}")
    if keys.shape != values.shape or keys.shape[3] != size or not keys.dtype == values.dtype == q.dtype:
        raise ValueError(f"keys {keys.dtype} {list(keys.shape)}, values {values.dtype} {list(values.shape)}, {q.dtype}")
    if q.dtype not in (torch.bfloat16, torch.float16) or not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(f"keys and values must be contiguous, and bfloat16 or float16, not {q.dtype}")
    if any(each.shape != (batch,) or each.dtype != torch.int64 for each in (rows, before)):
        raise ValueError(f"rows and numbers of tokens must be int64 [{batch}]")
    refuse_gradients(q, keys, values)
    y: Tensor = torch.ops.sbn_kernels.attend(q, keys, values, rows, before)
    return y
