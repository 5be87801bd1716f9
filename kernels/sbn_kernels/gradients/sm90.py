"""Device code of the Hopper product of two int8 matrices, in Gluon. Needs Triton >= 3.9; imported only there.

``y = (a @ b^T) * scale[row]`` with both factors in shared memory: the gradient of the weight, whose sum runs over
tokens. (``gemm/sm90/kernels.py`` holds one factor, of two bits, in registers.) The kernel is persistent and
warp-specialised like the other: a producer fills a ring by TMA, and two consumers of 64 rows each multiply
``m64n256k32`` and run apart from each other. Where tiles do not fill a wave of multiprocessors, the last tiles are
split along the sum into int32 parts, which another kernel adds exactly.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sbn_kernels.common.hopper_pipeline import (
    await_multiplications,
    await_phase,
    matrix_descriptor,
    release,
    ring,
    split_columns,
    tied,
)


@gluon.constexpr_function
def _multiply_tile(outs, ins):
    """PTX: multiplies a k128 step as one commit group, then waits for the group before it."""
    (acc,) = outs
    _, a, b, accumulate = ins
    registers = "{" + ",".join(acc) + "}"
    lines = ["{", ".reg .pred p;", f"setp.ne.b32 p, {accumulate[0]}, 0;"]
    lines += [*matrix_descriptor("a", a[0]), *matrix_descriptor("b", b[0]), "wgmma.fence.sync.aligned;"]
    for step in range(4):
        if step:
            lines += ["add.s64 a, a, 2;", "add.s64 b, b, 2;"]
        name = f"wgmma.mma_async.sync.aligned.m64n{2 * len(acc)}k32.s32.s8.s8"
        lines.append(f"{name} {registers}, a, b, {'1' if step else 'p'};")
    return "\n".join([*lines, "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 1;", "}"])


@gluon.jit
def _unit(i, k_steps, per_split, row_tiles, column_tiles, whole, group):
    """Unit of work -> (row tile, column tile, first k step, end); ``group`` row tiles share a sweep over columns.

    Units below ``whole`` are whole tiles. Then come the first parts of the other tiles, their second parts, and so on.
    """
    others = gl.maximum(row_tiles * column_tiles - whole, 1)
    part = gl.maximum(i - whole, 0) // others
    tile = i - part * others
    per = group * column_tiles
    band = tile // per
    tile = tile - band * per
    first = band * group
    height = gl.minimum(row_tiles - first, group)
    end = gl.where(i < whole, k_steps, gl.minimum(k_steps, (part + 1) * per_split))
    return first + tile % height, tile // height, part * per_split, end


@gluon.jit
def _producer(
    a, b, as_, bs, full, empty, k_steps, per_split, row_tiles, column_tiles, whole, units, group,
    BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 1
    for i in range(gl.program_id(0), units, gl.num_programs(0)):
        row_tile, column_tile, first, end = _unit(i, k_steps, per_split, row_tiles, column_tiles, whole, group)
        for k in range(first, end):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), 2 * a.block_type.nbytes + b.block_type.nbytes)
            tma.async_load(a, [row_tile * 128, k * 128], full.index(stage), as_.index(2 * stage))
            tma.async_load(a, [row_tile * 128 + 64, k * 128], full.index(stage), as_.index(2 * stage + 1))
            tma.async_load(b, [column_tile * BN, k * 128], full.index(stage), bs.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase = phase ^ 1


@gluon.jit
def _store_scaled(acc, scale, y, ys, row0, column0, ADD: gl.constexpr, CHUNK: gl.constexpr, HALF: gl.constexpr):
    """Scales, rounds and stores 64 rows of a tile, CHUNK columns at a time, through two shared buffers.

    With ADD the memory adds to what is there. Each place is written once, so the sum does not depend on an order.
    """
    pieces = split_columns(acc, acc.shape[1] // CHUNK)
    for c in gl.static_range(acc.shape[1] // CHUNK):
        rows = row0 + gl.arange(0, 64, gl.SliceLayout(1, pieces[c].type.layout))
        out = pieces[c].to(gl.float32) * gl.load(scale + rows)[:, None]
        buffer = ys.index(2 * HALF + c % 2)
        tma.store_wait(1)
        buffer.store(out.to(y.dtype))
        fence_async_shared()
        if ADD:
            tma.async_atomic_add(y, [row0, column0 + c * CHUNK], buffer)
        else:
            tma.async_store(y, [row0, column0 + c * CHUNK], buffer)


@gluon.jit
def _store_part(acc, parts, ys, row0, HALF: gl.constexpr):
    """Stores 64 rows of a part without scaling, through the same buffers."""
    pieces = split_columns(acc, acc.shape[1] // 32)
    for c in gl.static_range(acc.shape[1] // 32):
        buffer = ys.index(2 * HALF + c % 2).reinterpret(gl.int32, [64, 32], parts.layout)
        tma.store_wait(1)
        buffer.store(pieces[c])
        fence_async_shared()
        tma.async_store(parts, [row0, c * 32], buffer)


@gluon.jit
def _consumer(
    scale, y, parts, as_, bs, ys, full, empty, k_steps, per_split, row_tiles, column_tiles, whole, units, group,
    BN: gl.constexpr, ADD: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32])
    TIED: gl.constexpr = tied(BN // 2, 3)
    stage = 0
    phase = 0
    for i in range(gl.program_id(0), units, gl.num_programs(0)):
        row_tile, column_tile, first, end = _unit(i, k_steps, per_split, row_tiles, column_tiles, whole, group)
        acc = gl.zeros([64, BN], gl.int32, ACC)
        for k in range(first, end):
            gl.inline_asm(await_phase, "r,r", [full.index(stage), phase], (), is_pure=False)
            going = (k > first).to(gl.int32)
            factors = [acc, as_.index(2 * stage + HALF), bs.index(stage), going]
            acc = gl.inline_asm(_multiply_tile, TIED, factors, acc.type, is_pure=False)
            previous = gl.where(stage == 0, STAGES - 1, stage - 1)
            gl.inline_asm(release, "r,r", [empty.index(previous), going], (), is_pure=False)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase = phase ^ 1
        acc = gl.inline_asm(await_multiplications, tied(BN // 2, 0), [acc], acc.type, is_pure=False)
        last = gl.where(stage == 0, STAGES - 1, stage - 1)
        gl.inline_asm(release, "r,r", [empty.index(last), 1], (), is_pure=False)
        if i < whole:
            _store_scaled(acc, scale, y, ys, row_tile * 128 + 64 * HALF, column_tile * BN, ADD, CHUNK, HALF)
        else:
            _store_part(acc, parts, ys, (i - whole) * 128 + 64 * HALF, HALF)
    tma.store_wait(0)


# Sizes vary from call to call; specialising on them would compile anew for each pattern of divisibility.
_SIZES = ("k_steps", "per_split", "row_tiles", "column_tiles", "whole", "units", "group")


@gluon.jit(do_not_specialize=_SIZES)
def int8_outer_kernel(
    a, b, y, parts, scale, k_steps, per_split, row_tiles, column_tiles, whole, units, group,
    BN: gl.constexpr, ADD: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """y [rows, columns] = (a [rows, K] @ b [columns, K]^T) * scale[row]; from ``whole`` on: unscaled, to ``parts``.

    With ADD the product is added to ``y``, which is float32.

    ``a``, ``b``, ``y``, ``parts`` are tensor descriptors (blocks [64, 128], [BN, 128] int8, [64, CHUNK], [64, 32]
    int32); ``scale`` is readable up to whole tiles. Launch with 4 warps: those of the first consumer.
    """
    as_ = gl.allocate_shared_memory(gl.int8, [2 * STAGES, 64, 128], a.layout)
    bs = gl.allocate_shared_memory(gl.int8, [STAGES, BN, 128], b.layout)
    ys = gl.allocate_shared_memory(y.dtype, [4, 64, CHUNK], y.layout)
    full, empty = ring(STAGES)
    gl.warp_specialize(
        [
            (_consumer, (
                scale, y, parts, as_, bs, ys, full, empty, k_steps, per_split, row_tiles, column_tiles, whole, units,
                group, BN, ADD, CHUNK, STAGES, 0)),
            (_consumer, (
                scale, y, parts, as_, bs, ys, full, empty, k_steps, per_split, row_tiles, column_tiles, whole, units,
                group, BN, ADD, CHUNK, STAGES, 1)),
            (_producer, (
                a, b, as_, bs, full, empty, k_steps, per_split, row_tiles, column_tiles, whole, units, group,
                BN, STAGES)),
        ],
        [4, 4],
    )  # fmt: skip
