"""Device code of the Hopper products on 2-bit ternary weights, in Gluon. Needs Triton >= 3.9; imported only there.

One warp-specialised, persistent kernel computes ``y = (x8 @ T^T) * s * gamma (+ bias)`` for both forms of weight:

* ``SPARSE``: 2:4 weights on the sparse tensor core, ``wgmma.mma_async.sp`` (k64: 64 dense columns an instruction).
* otherwise: dense ternary weights of any pattern, ``wgmma.mma_async`` (k32).

Triton has no sparse dot, so inline PTX issues the instruction. The weights are operand A and live in registers: each
thread reads 16 bytes of packed codes a k128 step and unpacks them with ``prmt``. With A in shared memory, A and the
stream of tokens B together would exceed what shared memory delivers. So an output tile is [128 features, BT tokens],
computed transposed, and turned round on its way through shared memory in the epilogue.

Roles: a producer, and two consumer warpgroups of 64 features each. The producer fills a ring of ``STAGES`` buffers by
TMA: tokens [BT, 128] and 4 KB of codes. Consumers fetch the codes of the next step while the current step multiplies,
and run apart from each other, so that one keeps the tensor core busy while the other is in its epilogue.

``instructions.py`` has the text of the multiplications, ``common/hopper_pipeline.py`` the ring and its waits.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from sbn_kernels.common.hopper_pipeline import await_multiplications, await_phase, release, ring, split_columns, tied
from sbn_kernels.gemm.sm90.instructions import all_dense, constraints, first_sparse, rest_sparse, retire_one_and_release


@gluon.jit
def _tile(i, token_tiles, panels, group):
    """Number of a tile -> (panel, token tile); ``group`` token tiles share a sweep over panels, so both stay in L2."""
    per = group * panels
    band = i // per
    rest = i - band * per
    first = band * group
    width = gl.minimum(token_tiles - first, group)
    return rest // width, first + rest % width


@gluon.jit
def _count(token_tiles, panels, parts, whole, BT: gl.constexpr, PIECE: gl.constexpr):
    """The number of pieces of work. Computed anew where it is needed, because an argument would take a register."""
    count = token_tiles * panels * parts
    if PIECE > 0:
        count = whole + (count - whole) * (BT // PIECE)
    return count


@gluon.jit
def _work(
    i, token_tiles, panels, per_part, k_steps, group, whole,
    BT: gl.constexpr, PARTS: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    """Number of a piece of work -> (panel, its first token, its first row of y, its k steps, whether it is small)."""
    part = 0
    first = 0
    end = k_steps
    piece = 0
    small = 0
    if PARTS:
        part = i // (token_tiles * panels)
        i = i - part * (token_tiles * panels)
        first = part * per_part
        end = gl.minimum(first + per_part, k_steps)
    if PIECE > 0:
        per: gl.constexpr = BT // PIECE
        small = (i >= whole).to(gl.int32)
        piece = gl.where(small != 0, (i - whole) % per, 0)
        i = gl.where(small != 0, whole + (i - whole) // per, i)
    panel, token_tile = _tile(i, token_tiles, panels, group)
    token0 = token_tile * BT + piece * PIECE
    return panel, token0, part * token_tiles * BT + token0, first, end, small


@gluon.jit
def _load_tokens(x, token0, k, barrier, room, small):
    """Loads the tokens of a k step in blocks as large as the descriptor's; with ``small`` only the first block."""
    BOX: gl.constexpr = x.block_type.shape[0]
    tma.async_load(x, [token0, k * 128], barrier, room.slice(0, BOX, dim=0))
    if small == 0:
        for box in gl.static_range(1, room.shape[0] // BOX):
            tma.async_load(x, [token0 + box * BOX, k * 128], barrier, room.slice(box * BOX, BOX, dim=0))


@gluon.jit
def load_steps(
    x, w, xs, ws, full, empty, token0, panel, k_steps, first, end, stage, phase, small,
    BT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills the ring with the k steps ``first`` to ``end`` of a tile; returns the place in the ring after the last."""
    for k in range(first, end):
        mbarrier.wait(empty.index(stage), phase)
        if small == 0:
            mbarrier.expect(full.index(stage), BT * 128 + w.block_type.nbytes)
        else:
            mbarrier.expect(full.index(stage), x.block_type.nbytes + w.block_type.nbytes)
        _load_tokens(x, token0, k, full.index(stage), xs.index(stage), small)
        tma.async_load(w, [(panel * k_steps + k) * 32, 0], full.index(stage), ws.index(stage))
        stage += 1
        if stage == STAGES:
            stage = 0
            phase = phase ^ 1
    return stage, phase


@gluon.jit
def _producer(
    x, w, xs, ws, full, empty, k_steps, token_tiles, panels, parts, per_part, group, whole,
    BT: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, PIECE: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 1
    done = 0  # The k steps of the first tile that are on their way.
    if EARLY:
        # The codes do not come from the kernel before, so the first of them are loaded while that kernel ends.
        panel, token0, _row, first, end, _small = _work(
            gl.program_id(0), token_tiles, panels, per_part, k_steps, group, whole, BT, PARTS, 0
        )
        done = gl.minimum(end - first, STAGES)
        for k in range(done):
            mbarrier.expect(full.index(k), BT * 128 + w.block_type.nbytes)
            tma.async_load(w, [(panel * k_steps + first + k) * 32, 0], full.index(k), ws.index(k))
        gdc_wait()
        for k in range(done):
            _load_tokens(x, token0, first + k, full.index(k), xs.index(k), 0)
        stage = gl.where(done == STAGES, 0, done)
        phase = gl.where(done == STAGES, 0, 1)
    for i in range(gl.program_id(0), _count(token_tiles, panels, parts, whole, BT, PIECE), gl.num_programs(0)):
        panel, token0, _row, first, end, small = _work(
            i, token_tiles, panels, per_part, k_steps, group, whole, BT, PARTS, PIECE
        )
        stage, phase = load_steps(
            x, w, xs, ws, full, empty, token0, panel, k_steps, first + done, end, stage, phase, small, BT, STAGES
        )
        done = 0


@gluon.jit
def sum_steps(
    xs, ws, full, empty, first, end, stage, phase, held, zero, small,
    BT: gl.constexpr, STAGES: gl.constexpr, SPARSE: gl.constexpr, PIECE: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Sums the k steps ``first`` to ``end``, at least one, as the producer fills the ring: int32 [64, BT].

    ``stage`` and ``phase`` are the place of the first step in the ring, ``held`` are the metadata registers. All three
    are returned for the next tile. With ``small`` only the first PIECE tokens are multiplied.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BT, 32])
    CODES: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    TIES: gl.constexpr = constraints(BT // 2, 3)
    TIED: gl.constexpr = tied(BT // 2, 0)
    acc = gl.zeros([64, BT], gl.int32, ACC)
    KINDS: gl.constexpr = (acc.type, held.type)
    gl.inline_asm(await_phase, "r,r", [full.index(stage), phase], (), is_pure=False)
    words = ws.index(stage).slice(16 * HALF, 16, dim=0).load(CODES)
    for k in range(first, end):
        going = (k > first).to(gl.int32)
        state = going + 2 * small
        more = k + 1 < end
        tile = xs.index(stage)
        # Computed anew: Triton does not see that a loop variable changes if it starts as the value of another variable.
        previous = gl.where(stage == 0, STAGES - 1, stage - 1)
        next_stage = stage + 1
        next_phase = phase
        if next_stage == STAGES:
            next_stage = 0
            next_phase = phase ^ 1
        # the step whose codes are fetched early: the next one; in the last step, this one again
        ready = gl.where(more, next_stage, stage)
        parity = gl.where(more, next_phase, phase)
        if SPARSE:
            acc, held = gl.inline_asm(
                first_sparse(BT // 2, PIECE), TIES, [acc, words, held, tile, state, zero], KINDS, is_pure=False
            )
            gl.inline_asm(await_phase, "r,r", [full.index(ready), parity], (), is_pure=False)
            coming = ws.index(ready).slice(16 * HALF, 16, dim=0).load(CODES)
            gl.inline_asm(retire_one_and_release, "r,r", [empty.index(previous), going], (), is_pure=False)
            acc, held = gl.inline_asm(
                rest_sparse(BT // 2, PIECE), TIES, [acc, words, held, tile, state, zero], KINDS, is_pure=False
            )
        else:
            acc, held = gl.inline_asm(
                all_dense(BT // 2, PIECE), TIES, [acc, words, held, tile, state, zero], KINDS, is_pure=False
            )
            gl.inline_asm(release, "r,r", [empty.index(previous), going], (), is_pure=False)
            gl.inline_asm(await_phase, "r,r", [full.index(ready), parity], (), is_pure=False)
            coming = ws.index(ready).slice(16 * HALF, 16, dim=0).load(CODES)
        words = coming
        stage = next_stage
        phase = next_phase
    acc = gl.inline_asm(await_multiplications, TIED, [acc], acc.type, is_pure=False)
    last = gl.where(stage == 0, STAGES - 1, stage - 1)
    gl.inline_asm(release, "r,r", [empty.index(last), 1], (), is_pure=False)
    return acc, held, stage, phase


@gluon.jit
def no_metadata():
    """The value of the metadata registers before the first step."""
    HELD: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0])
    return gl.zeros([16, 16], gl.int32, HELD)


@gluon.jit
def _store_chunk(
    out, scale, row_scale, bias, y, buffer, token0, y_row, row0, skip,
    CHUNK: gl.constexpr, ROWS: gl.constexpr, BIAS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Scales, rounds, transposes and stores CHUNK tokens through a shared buffer, unless they are to be skipped.

    The vectors of scales are as long as whole tiles, because masks here would take the registers that the pipeline
    needs.
    """
    if skip == 0:
        if PARTS:
            result = out
        else:
            rows = row0 + gl.arange(0, 64, gl.SliceLayout(1, out.type.layout))
            columns = token0 + gl.arange(0, CHUNK, gl.SliceLayout(0, out.type.layout))
            factor = gl.load(scale + columns)[None, :]
            if ROWS:
                factor = factor * gl.load(row_scale + rows)[:, None]
            result = out.to(gl.float32) * factor
            if BIAS:
                result += gl.load(bias + rows).to(gl.float32)[:, None]
        turned = gl.permute(result, (1, 0)).to(y.dtype)
        tma.store_wait(1)
        buffer.store(turned)
        fence_async_shared()
        tma.async_store(y, [y_row, row0], buffer)


@gluon.jit
def _consumer(
    scale, row_scale, bias, y, xs, ws, ys, full, empty, k_steps, token_tiles, panels, parts, per_part, group, whole,
    zero, BT: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr, SPARSE: gl.constexpr, ROWS: gl.constexpr,
    BIAS: gl.constexpr, PARTS: gl.constexpr, PIECE: gl.constexpr, EARLY: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 0
    held = no_metadata()
    if EARLY:
        gdc_wait()  # The scales of the tokens come from the kernel before.
    for i in range(gl.program_id(0), _count(token_tiles, panels, parts, whole, BT, PIECE), gl.num_programs(0)):
        panel, token0, y_row, first, end, small = _work(
            i, token_tiles, panels, per_part, k_steps, group, whole, BT, PARTS, PIECE
        )
        acc, held, stage, phase = sum_steps(
            xs, ws, full, empty, first, end, stage, phase, held, zero, small, BT, STAGES, SPARSE, PIECE, HALF
        )
        row0 = panel * 128 + 64 * HALF
        chunks = split_columns(acc, BT // CHUNK)
        for c in gl.static_range(BT // CHUNK):
            _store_chunk(
                chunks[c], scale, row_scale, bias, y, ys.index(2 * HALF + c % 2), token0 + c * CHUNK,
                y_row + c * CHUNK, row0, small if PIECE > 0 and c * CHUNK >= PIECE else 0,
                CHUNK, ROWS, BIAS, PARTS,
            )  # fmt: skip
    tma.store_wait(0)


# Sizes vary from call to call; specialising on them would compile anew for each pattern of divisibility.
_SIZES = ("k_steps", "token_tiles", "panels", "parts", "per_part", "group", "whole", "zero")


@gluon.jit(do_not_specialize=_SIZES)
def ternary_gemm_kernel(
    x, w, y, scale, row_scale, bias, k_steps, token_tiles, panels, parts, per_part, group, whole, zero,
    BT: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr, SPARSE: gl.constexpr, ROWS: gl.constexpr,
    BIAS: gl.constexpr, PARTS: gl.constexpr, PIECE: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """y [tokens, features] = (x [tokens, K] int8 @ T^T) * scale[token] (* row_scale[feature]) (+ bias[feature]).

    ``x``, ``w``, ``y`` are tensor descriptors (blocks [BT, 128] int8, [32, 32] int32, [CHUNK, 64]); ``zero`` is 0.
    ``scale``, ``row_scale`` and ``bias`` are readable up to whole tiles. Launch with 4 warps: those of the first
    consumer.

    With ``PARTS`` the sum over K is cut into ``parts`` parts of ``per_part`` k steps, none of them empty, and ``y``
    takes their int32 sums, unscaled: [parts * token tiles * BT, features].

    With ``PIECE`` above 0 the tiles after the first ``whole`` ones are cut into pieces of PIECE tokens, so that a last
    wave of few tiles occupies more multiprocessors. Blocks of ``x`` are [PIECE, 128] then. Each program must have a
    whole tile first.
    """
    xs = gl.allocate_shared_memory(gl.int8, [STAGES, BT, 128], x.layout)
    ws = gl.allocate_shared_memory(gl.int32, [STAGES, 32, 32], w.layout)
    ys = gl.allocate_shared_memory(y.dtype, [4, CHUNK, 64], y.layout)
    full, empty = ring(STAGES)
    gl.warp_specialize(
        [
            (_consumer, (
                scale, row_scale, bias, y, xs, ws, ys, full, empty, k_steps, token_tiles, panels, parts, per_part,
                group, whole, zero, BT, CHUNK, STAGES, SPARSE, ROWS, BIAS, PARTS, PIECE, EARLY, 0)),
            (_consumer, (
                scale, row_scale, bias, y, xs, ws, ys, full, empty, k_steps, token_tiles, panels, parts, per_part,
                group, whole, zero, BT, CHUNK, STAGES, SPARSE, ROWS, BIAS, PARTS, PIECE, EARLY, 1)),
            (_producer, (
                x, w, xs, ws, full, empty, k_steps, token_tiles, panels, parts, per_part, group, whole,
                BT, STAGES, PARTS, PIECE, EARLY)),
        ],
        [4, 4],
    )  # fmt: skip
