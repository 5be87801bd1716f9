"""Device helpers of the decode step: attention to the cache, by parts of the context, and the joining of many parts."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sbn_kernels.decode.step.attention import attend, fetch_query, finish_attention, merge_parts, state_constraints
from sbn_kernels.decode.step.rows import item_of, load_cache_tokens


@gluon.jit
def longest_context(lengths, max_length, P: gl.constexpr):
    """The longest context of this step, the new token included."""
    longest = 0
    BATCH: gl.constexpr = P.batch
    for b in gl.static_range(BATCH):
        longest = gl.maximum(longest, gl.minimum(gl.load(lengths + b).to(gl.int32), max_length - 1) + 1)
    return longest


@gluon.jit
def split_context(longest, P: gl.constexpr):
    """The number of parts of the context, and the tokens of a part: a multiple of 128, which is 16 for each warp."""
    blocks = (longest + 127) // 128
    most = gl.where(longest <= P.direct_tokens, P.direct_parts, gl.maximum(P.splits, P.direct_parts))
    part = (blocks + most - 1) // most
    return (blocks + part - 1) // part, part * 128


@gluon.jit
def _attend_item(base, kv, item, qkv, keys, values, slots, parts, parts_m, attended, attended_m, splits, epoch,
                 flag, deadline, P: gl.constexpr):  # fmt: skip
    """Computes the attention of one group to one part of the context; ``kv`` holds the part's first 128 tokens."""
    E: gl.constexpr = P.head_size
    V1: gl.constexpr = gl.BlockedLayout([1], [32], [P.warps], [0])
    RO: gl.constexpr = gl.BlockedLayout([1, 1, E // 4], [1, 32, 1], [P.warps, 1, 1], [2, 1, 0])
    F1: gl.constexpr = gl.distributed_type(gl.float32, [32 * P.warps], V1)
    FO: gl.constexpr = gl.distributed_type(gl.float32, [P.warps, 32, E // 4], RO)
    sm = base + P.at_tokens
    token, group, split, first, end, position, cached = item
    k, v = keys + cached * slots * E, values + cached * slots * E
    args = [qkv + token * (P.qkv_heads * E), group // P.groups_per_kv_head, group * P.group, epoch & 255, sm, flag,
            deadline]  # fmt: skip
    gl.inline_asm(fetch_query(P), "l,r,r,r,r,l,l,~{memory}", args, (), is_pure=False)
    m = gl.full([32 * P.warps], -1e30, gl.float32, V1)
    total = gl.zeros([32 * P.warps], gl.float32, V1)
    o = gl.zeros([P.warps, 32, E // 4], gl.float32, RO)
    for start in range(first, end, 128):
        m, total, o = gl.inline_asm(
            attend(P), state_constraints(P), [m, total, o, kv, start, end, position, sm], (F1, F1, FO), is_pure=False
        )
        # A second set of registers, to load ahead, does not fit; the tokens are in L2 already.
        kv = load_cache_tokens(k, v, start + 128, end, position, P)
    head = token * P.heads + group * P.group
    there = split * P.batch * P.heads + head
    filled = gl.where(split == 0, splits, P.direct_parts)
    args = [m, total, o, sm, epoch, splits, filled, parts + there.to(gl.int64) * E, parts_m + there * 2,
            attended + there * E, attended_m + there * 2]  # fmt: skip
    constraints: gl.constexpr = "f,f," + "f," * (E // 4) + "r,r,r,r,l,l,l,l,~{memory}"
    gl.inline_asm(finish_attention(P), constraints, args, (), is_pure=False)


@gluon.jit
def attention(base, kv, mine, qkv, keys, values, lengths, max_length, slots, parts, parts_m, attended, attended_m,
               splits, part, epoch, flag, deadline, P: gl.constexpr):  # fmt: skip
    """Computes phase B for the items of this program; ``kv`` holds the first 128 tokens of the first item, ``mine``."""
    first = P.programs - 1 - gl.program_id(0)
    count = P.batch * P.groups * splits
    if first < count:
        _attend_item(base, kv, mine, qkv, keys, values, slots, parts, parts_m, attended, attended_m, splits,
                     epoch, flag, deadline, P)  # fmt: skip
    if P.many_items:
        for n in range(first + P.programs, count, P.programs):
            item = item_of(n, lengths, max_length, splits, part, P)
            k, v = keys + item[6] * slots * P.head_size, values + item[6] * slots * P.head_size
            other = load_cache_tokens(k, v, item[3], item[4], item[5], P)
            _attend_item(base, other, item, qkv, keys, values, slots, parts, parts_m, attended, attended_m,
                         splits, epoch, flag, deadline, P)  # fmt: skip


@gluon.jit
def merge(base, parts, parts_m, attended, attended_m, splits, epoch, flag, deadline, P: gl.constexpr):
    """Joins the parts of a long context; an item is one head."""
    E: gl.constexpr = P.head_size
    for item in range(P.programs - 1 - gl.program_id(0), P.batch * P.heads, P.programs):
        args = [parts + item * E, parts_m + item * 2, splits, epoch, base + P.at_tokens, flag, deadline,
                attended + item * E, attended_m + item * 2]  # fmt: skip
        gl.inline_asm(merge_parts(P), "l,l,r,r,r,l,l,l,l,~{memory}", args, (), is_pure=False)
