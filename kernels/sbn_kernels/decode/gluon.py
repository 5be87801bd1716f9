"""Device code of the decode product in Gluon: packed weights straight from memory into ``mma.sync``.

Needs Triton >= 3.9; imported only there. A warp owns 16 rows and every ``GROUPS``-th k128 step. The packed layouts hold
the fragments of operand A in the order of threads, so a step is one 16-byte load a thread, a few ``prmt``, and for each
8 tokens 4 ``mma.m16n8k32`` (or 2 ``mma.sp.m16n8k64``). Weights never touch shared memory, and the fragments of the
tokens come through L1. The warps of a program split K and add their sums at the end; the sums are integers, so the
order does not matter and the result is exact. The weights of PREFETCH steps are requested before the first of them is
used, which keeps the memory pipeline full.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sbn_kernels.common.decode_ptx import unpack_word
from sbn_kernels.common.hopper_pipeline import tied


@gluon.constexpr_function
def _dense_step(outs, ins):
    """PTX: four m16n8k32 for each 8 tokens; for each 8 tokens, x holds the 8 words of the K positions of a thread."""
    (acc,) = outs
    _, words, x = ins
    lines = ["{"]
    for j in range(4):
        lines += unpack_word(f"a{j}", words[j])
        for n in range(len(acc) // 4):
            c = "{" + ",".join(acc[4 * n : 4 * n + 4]) + "}"
            b = "{" + ",".join(x[8 * n + 2 * j : 8 * n + 2 * j + 2]) + "}"
            a = f"{{a{j}0,a{j}1,a{j}2,a{j}3}}"
            lines.append(f"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {c}, {a}, {b}, {c};")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _sparse_step(outs, ins):
    """PTX: two mma.sp m16n8k64 for each 8 tokens; words are (codes, positions) twice."""
    (acc,) = outs
    _, words, x = ins
    lines = ["{"]
    for j in range(2):
        lines += unpack_word(f"a{j}", words[2 * j])
        for n in range(len(acc) // 4):
            c = "{" + ",".join(acc[4 * n : 4 * n + 4]) + "}"
            b = "{" + ",".join(x[8 * n + 4 * j : 8 * n + 4 * j + 4]) + "}"
            a = f"{{a{j}0,a{j}1,a{j}2,a{j}3}}"
            lines.append(
                "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
                f"{c}, {a}, {b}, {c}, {words[2 * j + 1]}, 0x0;"
            )
    return "\n".join([*lines, "}"])


@gluon.jit(do_not_specialize=("tokens", "features", "k_steps", "x_stride"))
def decode_kernel(
    x_pointer, packed_pointer, y_pointer, scale_pointer, row_scale_pointer, bias_pointer,
    tokens, features, k_steps, x_stride,
    NT: gl.constexpr, GROUPS: gl.constexpr, PREFETCH: gl.constexpr, SPARSE: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """16 rows a program and all tokens, at most 8 NT; ``x_pointer`` is int32, ``x_stride`` counts words of 4 values."""
    WORDS: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [GROUPS, 1, 1], [2, 1, 0])
    TOKENS: gl.constexpr = gl.BlockedLayout([1, 1, 8 * NT], [1, 32, 1], [GROUPS, 1, 1], [2, 1, 0])
    ACC: gl.constexpr = gl.BlockedLayout([1, 1, 4 * NT], [1, 32, 1], [GROUPS, 1, 1], [2, 1, 0])
    TIES: gl.constexpr = tied(4 * NT, 4 + 8 * NT)
    tile = gl.program_id(0)
    base = packed_pointer + (tile // 8).to(gl.int64) * k_steps * 1024 + (tile % 8) * 128
    # [warp, lane, word]
    warp_w = gl.arange(0, GROUPS, gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))[:, None, None]
    lane_w = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))[None, :, None]
    word_w = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, None, :]
    warp_x = gl.arange(0, GROUPS, gl.SliceLayout(1, gl.SliceLayout(2, TOKENS)))[:, None, None]
    lane_x = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, TOKENS)))[None, :, None]
    item_x = gl.arange(0, 8 * NT, gl.SliceLayout(0, gl.SliceLayout(1, TOKENS)))[None, None, :]
    token = lane_x // 4 + 8 * (item_x // 8)
    inner = 4 * (item_x % 8) + lane_x % 4
    x_where = x_pointer + token.to(gl.int64) * x_stride + inner
    acc = gl.zeros([GROUPS, 32, 4 * NT], gl.int32, ACC)
    for start in range(0, k_steps, GROUPS * PREFETCH):
        words = ()
        for p in gl.static_range(PREFETCH):
            # beyond the end: the words of the last step, whose positions are valid, times tokens of zero
            step = gl.minimum(start + p * GROUPS + warp_w, k_steps - 1)
            words += (gl.load(base + step * 1024 + lane_w * 4 + word_w),)
        for p in gl.static_range(PREFETCH):
            step = start + p * GROUPS + warp_x
            there = (token < tokens) & (step < k_steps) & (step * 32 + inner < x_stride)
            x = gl.load(x_where + step * 32, mask=there, other=0)
            if SPARSE:
                acc = gl.inline_asm(_sparse_step, TIES, [acc, words[p], x], acc.type, is_pure=False)
            else:
                acc = gl.inline_asm(_dense_step, TIES, [acc, words[p], x], acc.type, is_pure=False)
    total = gl.sum(acc, axis=0)
    lane = gl.arange(0, 32, gl.SliceLayout(1, total.type.layout))[:, None]
    item = gl.arange(0, 4 * NT, gl.SliceLayout(0, total.type.layout))[None, :]
    row = tile * 16 + lane // 4 + 8 * (item % 4 // 2)
    column = 8 * (item // 4) + 2 * (lane % 4) + item % 2
    inside = (row < features) & (column < tokens)
    scale = gl.load(scale_pointer + column, mask=inside, other=0.0)
    gamma = gl.load(row_scale_pointer + row, mask=inside, other=0.0)
    y = total.to(gl.float32) * (scale * gamma)
    if BIAS:
        y += gl.load(bias_pointer + row, mask=inside, other=0.0).to(gl.float32)
    gl.store(y_pointer + column.to(gl.int64) * features + row, y.to(y_pointer.dtype.element_ty), mask=inside)
