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
and run apart from each other, so that one keeps the tensor core busy while the other is in its epilogue. The scales of
a tile's tokens come to shared memory while the tile is summed.

Two facts that only the compiler's report and a bit-exact test show:

* Registers of a multiplication in flight must not be rewritten. ptxas tracks the accumulators and A, but not the
  metadata register of the sparse form. So every k64 step is a commit group of its own, and the register is rewritten
  only after the wait that retires its group. Until then a real use keeps the register alive: new metadata is computed
  as ``word ^ (old & zero)``, where ``zero`` is a kernel argument that the compiler knows nothing of.
* ptxas serialises all multiplications (C7512 and C7513 in its report; DEPBAR 0 after every IGMMA) if registers are
  short, or if the four dense steps are spread over two asm blocks. So registers are not reallocated between the roles,
  because ptxas would give all roles the smallest share. Each role has 168 registers, too few for masks in the
  epilogue.

``common/hopper_pipeline.py`` has the ring and its waits.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from sbn_kernels.common.decode_ptx import unpack_word
from sbn_kernels.common.hopper_pipeline import (
    await_multiplications,
    await_phase,
    matrix_descriptor,
    release,
    release_text,
    ring,
    split_columns,
    tied,
)


@gluon.constexpr_function
def _multiply(step: int, acc: tuple[str, ...], metadata: str | None, accumulate: str) -> list[str]:
    """PTX: issues one wgmma of ``step`` as a commit group of its own."""
    tokens = 2 * len(acc)
    registers = "{" + ",".join(acc) + "}"
    operand = f"{{a{step}0,a{step}1,a{step}2,a{step}3}}"
    if metadata is not None:
        name, tail = f"wgmma.mma_async.sp.sync.aligned.m64n{tokens}k64.s32.s8.s8", f"{metadata}, 0, {accumulate}"
    else:
        name, tail = f"wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.s8.s8", accumulate
    offset = step * (4 if metadata is not None else 2)
    return [
        f".reg .b64 d{step};",
        f"add.s64 d{step}, base, {offset};",
        "wgmma.fence.sync.aligned;",
        f"{name} {registers}, {operand}, d{step}, {tail};",
        "wgmma.commit_group.sync.aligned;",
    ]


@gluon.constexpr_function
def _hold(register: str, word: str, zero: str) -> str:
    """PTX: new metadata ``word ^ (register & zero)``, which keeps the old value of ``register`` alive until here."""
    return f"lop3.b32 {register}, {word}, {register}, {zero}, 0x78;"


@gluon.constexpr_function
def _first_sparse(outs, ins):
    acc, held = outs
    _, words, _, address, accumulate, zero = ins
    lines = ["{", *matrix_descriptor("base", address[0]), ".reg .pred p;", f"setp.ne.b32 p, {accumulate[0]}, 0;"]
    lines += [*unpack_word("a0", words[0]), _hold(held[0], words[1], zero[0]), *_multiply(0, acc, held[0], "p"), "}"]
    return "\n".join(lines)


@gluon.constexpr_function
def _rest_sparse(outs, ins):
    acc, held = outs
    _, words, _, address, _, zero = ins
    lines = [
        "{",
        *matrix_descriptor("base", address[0]),
        *unpack_word("a1", words[2]),
        _hold(held[1], words[3], zero[0]),
    ]
    lines += [*_multiply(1, acc, held[1], "1"), "wgmma.wait_group.sync.aligned 1;", "}"]
    return "\n".join(lines)


@gluon.constexpr_function
def _all_dense(outs, ins):
    acc, _ = outs
    _, words, _, address, accumulate, _ = ins
    lines = ["{", *matrix_descriptor("base", address[0]), ".reg .pred p;", f"setp.ne.b32 p, {accumulate[0]}, 0;"]
    for step in (0, 1, 2, 3):
        lines += [*unpack_word(f"a{step}", words[step]), *_multiply(step, acc, None, "1" if step else "p")]
        lines.append("wgmma.wait_group.sync.aligned 1;")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def _retire_one_and_release(outs, ins):
    barrier, wanted = ins
    return release_text(barrier[0], wanted[0], "wgmma.wait_group.sync.aligned 1;")


@gluon.constexpr_function
def _constraints(accumulators, inputs):
    """Constraints: accumulators and two held registers tied to themselves, and free registers around the held pair."""
    outputs = ["=r"] * (accumulators + 2)
    tied = [str(i) for i in range(accumulators)]
    return ",".join([*outputs, *tied, *["r"] * 4, str(accumulators), str(accumulators + 1), *["r"] * inputs])


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
def _work(i, token_tiles, panels, per_part, k_steps, group, PARTS: gl.constexpr):
    """Number of a piece of work -> (panel, token tile, part of the sum, its first k step, the step after its last)."""
    part = 0
    first = 0
    end = k_steps
    if PARTS:
        part = i // (token_tiles * panels)
        i = i - part * (token_tiles * panels)
        first = part * per_part
        end = gl.minimum(first + per_part, k_steps)
    panel, token_tile = _tile(i, token_tiles, panels, group)
    return panel, token_tile, part, first, end


@gluon.jit
def load_steps(
    x, w, xs, ws, full, empty, token0, panel, k_steps, first, end, stage, phase, STAGES: gl.constexpr
):  # fmt: skip
    """Fills the ring with the k steps ``first`` to ``end`` of a tile; returns the place in the ring after the last."""
    for k in range(first, end):
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(full.index(stage), x.block_type.nbytes + w.block_type.nbytes)
        tma.async_load(x, [token0, k * 128], full.index(stage), xs.index(stage))
        tma.async_load(w, [(panel * k_steps + k) * 32, 0], full.index(stage), ws.index(stage))
        stage += 1
        if stage == STAGES:
            stage = 0
            phase = phase ^ 1
    return stage, phase


@gluon.jit
def _producer(
    x, w, xs, ws, full, empty, k_steps, token_tiles, panels, parts, per_part, group,
    BT: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 1
    done = 0  # The k steps of the first tile that are on their way.
    if EARLY:
        # The codes do not come from the kernel before, so the first of them are loaded while that kernel ends.
        panel, token_tile, _part, first, end = _work(
            gl.program_id(0), token_tiles, panels, per_part, k_steps, group, PARTS
        )
        done = gl.minimum(end - first, STAGES)
        for k in range(done):
            mbarrier.expect(full.index(k), x.block_type.nbytes + w.block_type.nbytes)
            tma.async_load(w, [(panel * k_steps + first + k) * 32, 0], full.index(k), ws.index(k))
        gdc_wait()
        for k in range(done):
            tma.async_load(x, [token_tile * BT, (first + k) * 128], full.index(k), xs.index(k))
        stage = gl.where(done == STAGES, 0, done)
        phase = gl.where(done == STAGES, 0, 1)
    for i in range(gl.program_id(0), token_tiles * panels * parts, gl.num_programs(0)):
        panel, token_tile, _part, first, end = _work(i, token_tiles, panels, per_part, k_steps, group, PARTS)
        stage, phase = load_steps(
            x, w, xs, ws, full, empty, token_tile * BT, panel, k_steps, first + done, end, stage, phase, STAGES
        )
        done = 0


@gluon.jit
def sum_steps(
    xs, ws, full, empty, first, end, stage, phase, held, zero,
    BT: gl.constexpr, STAGES: gl.constexpr, SPARSE: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Sums the k steps ``first`` to ``end``, at least one, as the producer fills the ring: int32 [64, BT].

    ``stage`` and ``phase`` are the place of the first step in the ring, ``held`` are the metadata registers. All three
    are returned for the next tile. The last multiplications may still run: :func:`finish_steps` waits for their end.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BT, 32])
    CODES: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    TIES: gl.constexpr = _constraints(BT // 2, 3)
    acc = gl.zeros([64, BT], gl.int32, ACC)
    gl.inline_asm(await_phase, "r,r", [full.index(stage), phase], (), is_pure=False)
    words = ws.index(stage).slice(16 * HALF, 16, dim=0).load(CODES)
    for k in range(first, end):
        going = (k > first).to(gl.int32)
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
                _first_sparse, TIES, [acc, words, held, tile, going, zero], (acc.type, held.type), is_pure=False
            )
            gl.inline_asm(await_phase, "r,r", [full.index(ready), parity], (), is_pure=False)
            coming = ws.index(ready).slice(16 * HALF, 16, dim=0).load(CODES)
            gl.inline_asm(_retire_one_and_release, "r,r", [empty.index(previous), going], (), is_pure=False)
            acc, held = gl.inline_asm(
                _rest_sparse, TIES, [acc, words, held, tile, going, zero], (acc.type, held.type), is_pure=False
            )
        else:
            acc, held = gl.inline_asm(
                _all_dense, TIES, [acc, words, held, tile, going, zero], (acc.type, held.type), is_pure=False
            )
            gl.inline_asm(release, "r,r", [empty.index(previous), going], (), is_pure=False)
            gl.inline_asm(await_phase, "r,r", [full.index(ready), parity], (), is_pure=False)
            coming = ws.index(ready).slice(16 * HALF, 16, dim=0).load(CODES)
        words = coming
        stage = next_stage
        phase = next_phase
    return acc, held, stage, phase


@gluon.jit
def finish_steps(acc, empty, stage, BT: gl.constexpr, STAGES: gl.constexpr):
    """Waits for the multiplications of :func:`sum_steps`, and releases the last stage; returns the sums."""
    TIED: gl.constexpr = tied(BT // 2, 0)
    acc = gl.inline_asm(await_multiplications, TIED, [acc], acc.type, is_pure=False)
    last = gl.where(stage == 0, STAGES - 1, stage - 1)
    gl.inline_asm(release, "r,r", [empty.index(last), 1], (), is_pure=False)
    return acc


@gluon.jit
def no_metadata():
    """The value of the metadata registers before the first step."""
    HELD: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0])
    return gl.zeros([16, 16], gl.int32, HELD)


@gluon.jit
def _consumer(
    scale, row_scale, bias, y, xs, ws, ys, ss, full, empty, k_steps, token_tiles, panels, parts, per_part, group,
    zero, BT: gl.constexpr, CHUNK: gl.constexpr, BUFFERS: gl.constexpr, STAGES: gl.constexpr, SPARSE: gl.constexpr,
    ROWS: gl.constexpr, BIAS: gl.constexpr, PARTS: gl.constexpr, EARLY: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    COPY: gl.constexpr = gl.BlockedLayout([max(1, BT // 128)], [32], [4], [0])
    stage = 0
    phase = 0
    held = no_metadata()
    if EARLY:
        gdc_wait()  # The kernel before makes the scales of the tokens, and may read memory that y takes over.
    for i in range(gl.program_id(0), token_tiles * panels * parts, gl.num_programs(0)):
        panel, token_tile, part, first, end = _work(i, token_tiles, panels, per_part, k_steps, group, PARTS)
        token0 = (part * token_tiles + token_tile) * BT
        row0 = panel * 128 + 64 * HALF
        # The scales of the tile's tokens travel to shared memory during the sum. A load from global memory at the end
        # would delay the fence of each chunk. The vector of scales is as long as whole tiles, so there is no mask.
        of_tokens = ss.index(HALF)
        if not PARTS:
            async_copy.async_load(of_tokens, scale + token0 + gl.arange(0, BT, COPY))
            async_copy.commit_group()
        acc, held, stage, phase = sum_steps(
            xs, ws, full, empty, first, end, stage, phase, held, zero, BT, STAGES, SPARSE, HALF
        )
        LIKE: gl.constexpr = split_columns(acc, BT // CHUNK)[0].type.layout
        rows = row0 + gl.arange(0, 64, gl.SliceLayout(1, LIKE))
        if ROWS:
            of_rows = gl.load(row_scale + rows)
        if BIAS:
            added = gl.load(bias + rows).to(gl.float32)
        acc = finish_steps(acc, empty, stage, BT, STAGES)
        if not PARTS:
            async_copy.wait_group(0)
        # Epilogue: scale, round, transpose and store CHUNK tokens at a time through BUFFERS shared buffers.
        chunks = split_columns(acc, BT // CHUNK)
        for c in gl.static_range(BT // CHUNK):
            out = chunks[c]
            if not PARTS:
                factor = of_tokens.slice(c * CHUNK, CHUNK, dim=0).load(gl.SliceLayout(0, LIKE))[None, :]
                if ROWS:
                    factor = factor * of_rows[:, None]
                out = out.to(gl.float32) * factor
                if BIAS:
                    out += added[:, None]
            out = gl.permute(out, (1, 0)).to(y.dtype)
            buffer = ys.index(BUFFERS * HALF + c % BUFFERS)
            tma.store_wait(BUFFERS - 1)
            buffer.store(out)
            fence_async_shared()
            tma.async_store(y, [token0 + c * CHUNK, row0], buffer)
    tma.store_wait(0)


# Sizes vary from call to call; specialising on them would compile anew for each pattern of divisibility.
_SIZES = ("k_steps", "token_tiles", "panels", "parts", "per_part", "group", "zero")


@gluon.jit(do_not_specialize=_SIZES)
def ternary_gemm_kernel(
    x, w, y, scale, row_scale, bias, k_steps, token_tiles, panels, parts, per_part, group, zero,
    BT: gl.constexpr, CHUNK: gl.constexpr, BUFFERS: gl.constexpr, STAGES: gl.constexpr, SPARSE: gl.constexpr,
    ROWS: gl.constexpr, BIAS: gl.constexpr, PARTS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """y [tokens, features] = (x [tokens, K] int8 @ T^T) * scale[token] (* row_scale[feature]) (+ bias[feature]).

    ``x``, ``w``, ``y`` are tensor descriptors (blocks [BT, 128] int8, [32, 32] int32, [CHUNK, 64]); ``zero`` is 0.
    ``scale``, ``row_scale`` and ``bias`` are readable up to whole tiles. Launch with 4 warps: those of the first
    consumer.

    With ``PARTS`` the sum over K is cut into ``parts`` parts of ``per_part`` k steps, none of them empty, and ``y``
    takes their int32 sums, unscaled: [parts * token tiles * BT, features].
    """
    xs = gl.allocate_shared_memory(gl.int8, [STAGES, BT, 128], x.layout)
    ws = gl.allocate_shared_memory(gl.int32, [STAGES, 32, 32], w.layout)
    ys = gl.allocate_shared_memory(y.dtype, [2 * BUFFERS, CHUNK, 64], y.layout)
    ss = gl.allocate_shared_memory(gl.float32, [2, BT], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, empty = ring(STAGES)
    gl.warp_specialize(
        [
            (_consumer, (
                scale, row_scale, bias, y, xs, ws, ys, ss, full, empty, k_steps, token_tiles, panels, parts, per_part,
                group, zero, BT, CHUNK, BUFFERS, STAGES, SPARSE, ROWS, BIAS, PARTS, EARLY, 0)),
            (_consumer, (
                scale, row_scale, bias, y, xs, ws, ys, ss, full, empty, k_steps, token_tiles, panels, parts, per_part,
                group, zero, BT, CHUNK, BUFFERS, STAGES, SPARSE, ROWS, BIAS, PARTS, EARLY, 1)),
            (_producer, (
                x, w, xs, ws, full, empty, k_steps, token_tiles, panels, parts, per_part, group, BT, STAGES, PARTS,
                EARLY)),
        ],
        [4, 4],
    )  # fmt: skip
