"""The device code: one decode step of a ternary transformer as one persistent kernel, for NVIDIA Hopper.

Each program runs on its own multiprocessor, and all programs run at the same time (a cooperative launch). A layer has
five phases. Between two phases every program needs the results of all programs of the phase before:

    A  norm, quantisation, product with q, k and v, bias, rotation, write to the cache
    B  attention, by key/value head and part of the context; for long contexts a second phase joins the parts
    C  joining of a few parts, quantisation, product with o, residual
    D  norm, quantisation, product with gate and up, SwiGLU
    E  quantisation, product with down, residual

A program owns tiles of 16 rows of each matrix, the same rows in every layer. Weights wait for nothing: they flow
through a ring in shared memory, several phases ahead of their use (``schedule``). The programs hand over vectors of a
few thousand words, which carry the tag of their layer (``ptx``).

For a small batch each program quantises all tokens itself. For a larger batch (``plan.Phase.shared``) one program
quantises a token for all, and the programs read the codes from the L2 cache. That is one more hand-over a phase, and
work that does not grow with the batch in every program. From three tokens on the result of attention goes that way. The
program that quantises a token then also joins the parts of the token's context, so more programs take part in
attention.

No program overwrites a vector that another still has
to read: the writer has waited for results, and each reader of the old vector made its part of those results after
reading. For example, the readers of y in phase D make the hidden vector, and phase E waits for the whole hidden vector.

Position, step and lengths come from memory, so one CUDA graph serves all steps. Every wait has a deadline. A wait that
passes the deadline sets an error flag and goes on. The other programs see the flag and go on too, so the kernel ends
with wrong outputs and without a trap. A step that finds the flag set does nothing.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sbn_kernels.decode.step.attention import (
    PREFETCH,
    attend,
    fetch_query,
    finish_attention,
    merge_parts,
    state_constraints,
)
from sbn_kernels.decode.step.head import (
    choose,
    choose_constraints,
    dot_constraints,
    dot_row,
    dot_rows,
    load_row,
    load_rows,
)
from sbn_kernels.decode.step.rows import (
    add_to_residual,
    barrier,
    embed,
    fetch,
    item_of,
    load_cache_tokens,
    multiply,
    rotation,
    share,
    unit_place,
    write_hidden,
    write_qkv,
)
from sbn_kernels.decode.step.tokens import (
    await_tokens,
    copy_final,
    load_norm,
    normalize_words,
    quantize_attention,
    quantize_words,
    share_attention,
    share_codes,
    share_final,
)

_START = gl.constexpr("""{ .reg .pred p; .reg .u32 t, a; mov.u32 t, %tid.x; setp.lt.u32 p, t, $1;
mad.lo.u32 a, t, 8, $0;
@p mbarrier.init.shared::cta.b64 [a], 1; fence.proxy.async.shared::cta; }""")
_COPY_SCHEDULE = gl.constexpr("""{ .reg .pred p; .reg .u32 t, a; .reg .u64 s; .reg .b32 w0, w1, w2, w3;
mov.u32 t, %tid.x;
AGAIN: setp.ge.u32 p, t, $2; @p bra DONE; mad.wide.u32 s, t, 16, $1; mad.lo.u32 a, t, 16, $0;
ld.global.nc.v4.b32 {w0, w1, w2, w3}, [s]; st.shared.v4.b32 [a], {w0, w1, w2, w3}; add.u32 t, t, 256; bra AGAIN;
DONE: }""")
_STAMP = gl.constexpr("""{ .reg .pred p; .reg .u32 t; .reg .u64 c, g; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
mov.u64 c, %clock64; mov.u64 g, %globaltimer; @p st.global.v2.u64 [$0], {c, g}; }""")
_ACQUIRE = gl.constexpr("fence.acq_rel.gpu;")
_LOWEST = gl.constexpr("min.u32 $0, $1, $2; min.u32 $0, $0, $3;")
_DEADLINE = gl.constexpr("mov.u64 $0, %globaltimer; add.u64 $0, $0, $1;")


@gluon.jit
def _stamp(trace, layer, place: gl.constexpr, P: gl.constexpr):
    """Writes down the time in cycles of this multiprocessor and in nanoseconds, if the plan says so."""
    if P.traced:
        at = trace + 2 * ((gl.program_id(0) * (P.layers + 1) + layer) * P.stamps + place)
        gl.inline_asm(_STAMP, "l,~{memory}", [at], (), is_pure=False)


@gluon.jit
def _longest(lengths, max_length, P: gl.constexpr):
    """The longest context of this step, the new token included."""
    longest = 0
    BATCH: gl.constexpr = P.batch
    for b in gl.static_range(BATCH):
        longest = gl.maximum(longest, gl.minimum(gl.load(lengths + b).to(gl.int32), max_length - 1) + 1)
    return longest


@gluon.jit
def _split_context(longest, P: gl.constexpr):
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
def _attention(base, kv, mine, qkv, keys, values, lengths, max_length, slots, parts, parts_m, attended, attended_m,
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
def _load_norm(norm, P: gl.constexpr):
    """Loads this thread's weights of a norm."""
    STEP: gl.constexpr = 128 * P.norm_plan.warps_per_token
    COUNT: gl.constexpr = (P.d_model + STEP - 1) // STEP
    REGS: gl.constexpr = (
        2 if COUNT == 1 else 4 if COUNT == 2 else 8 if COUNT <= 4 else 16 if COUNT <= 8 else 32 if COUNT <= 16 else 64
    )
    R: gl.constexpr = gl.BlockedLayout([1, 1, REGS], [1, 32, 1], [P.warps, 1, 1], [2, 1, 0])
    G: gl.constexpr = gl.distributed_type(gl.int32, [P.warps, 32, REGS], R)
    return gl.inline_asm(load_norm(P.norm_plan), "=&r," * REGS + "l", [norm], G, is_pure=False)


@gluon.jit
def _quantize(base, words, tag, flag, deadline, P: gl.constexpr, VALUES: gl.constexpr):
    """Waits for a vector of each token and leaves its codes in shared memory."""
    args = [words, tag, base + P.at_tokens, base + P.at_small, flag, deadline]
    gl.inline_asm(quantize_words(P, VALUES, False), "l,r,r,r,l,l,~{memory}", args, (), is_pure=False)


@gluon.jit
def _normalize_and_quantize(base, words, gain, tag, flag, deadline, P: gl.constexpr):
    """Waits for the residual stream, applies a norm, and leaves the codes in shared memory."""
    constraints: gl.constexpr = "l,r,r,r,l,l," + "r," * gain.shape[2] + "~{memory}"
    args = [words, tag, base + P.at_tokens, base + P.at_small, flag, deadline, gain]
    gl.inline_asm(quantize_words(P, P.d_model, True), constraints, args, (), is_pure=False)


@gluon.jit
def _quantize_attention(base, attended, attended_m, count, epoch, flag, deadline, P: gl.constexpr):
    """Waits for the result of attention, which may come in parts, and leaves the codes in shared memory."""
    if P.direct_parts == 1:
        _quantize(base, attended, epoch & 255, flag, deadline, P, P.d_attention)
    else:
        args = [attended, attended_m, count, epoch, base + P.at_tokens, base + P.at_small, flag, deadline]
        gl.inline_asm(quantize_attention(P), "l,l,r,r,r,r,l,l,~{memory}", args, (), is_pure=False)


@gluon.jit
def _final_norm(base, words, gain, tag, flag, deadline, P: gl.constexpr):
    """Applies the last norm and leaves bfloat16 hidden states in shared memory."""
    constraints: gl.constexpr = "l,r,r,r,l,l," + "r," * gain.shape[2] + "~{memory}"
    args = [words, tag, base + P.at_tokens, base + P.at_small, flag, deadline, gain]
    gl.inline_asm(normalize_words(P), constraints, args, (), is_pure=False)


@gluon.jit
def _await(base, places, epoch, flag, deadline, P: gl.constexpr, ACQUIRE: gl.constexpr):
    """Waits until the shared vectors of all tokens are complete, and copies their sums and scales."""
    args = [places, epoch, base + P.at_statistics, flag, deadline]
    gl.inline_asm(await_tokens(P, ACQUIRE), "l,r,r,l,l,~{memory}", args, (), is_pure=False)


@gluon.jit
def _acquire():
    """Makes the emptying of older codes visible to a program that has nothing to multiply; see ``share_codes``."""
    gl.inline_asm(_ACQUIRE, "~{memory}", [], (), is_pure=False)


@gluon.jit
def _share(base, words, codes, other, places, tag, epoch, flag, deadline, P: gl.constexpr, VALUES: gl.constexpr):
    """Quantises this program's tokens for all programs."""
    WIDTH: gl.constexpr = (VALUES + 127) // 128 * 128
    for token in range(P.programs - 1 - gl.program_id(0), P.batch, P.programs):
        args = [words + token * VALUES, tag, codes + token * WIDTH, other + token * WIDTH, places + token * 2, epoch,
                base + P.at_small, flag, deadline]  # fmt: skip
        asm: gl.constexpr = share_codes(P.token_plan, VALUES, False)
        gl.inline_asm(asm, "l,r,l,l,l,r,r,l,l,~{memory}", args, (), is_pure=False)


@gluon.jit
def _share_normalized(base, words, codes, other, places, gain, tag, epoch, flag, deadline, P: gl.constexpr):
    """As :func:`_share`, for the residual stream behind a norm."""
    constraints: gl.constexpr = "l,r,l,l,l,r,r,l,l," + "r," * gain.shape[2] + "~{memory}"
    WIDTH: gl.constexpr = (P.d_model + 127) // 128 * 128
    for token in range(P.programs - 1 - gl.program_id(0), P.batch, P.programs):
        args = [words + token * P.d_model, tag, codes + token * WIDTH, other + token * WIDTH, places + token * 2, epoch,
                base + P.at_small, flag, deadline, gain]  # fmt: skip
        gl.inline_asm(share_codes(P.token_plan, P.d_model, True), constraints, args, (), is_pure=False)


@gluon.jit
def _share_attention(base, attended, attended_m, count, codes, other, places, epoch, flag, deadline, P: gl.constexpr):
    """As :func:`_share`, for the result of attention, which may come in parts."""
    WIDTH: gl.constexpr = (P.d_attention + 127) // 128 * 128
    if P.direct_parts == 1:
        _share(base, attended, codes, other, places, epoch & 255, epoch, flag, deadline, P, P.d_attention)
    else:
        for token in range(P.programs - 1 - gl.program_id(0), P.batch, P.programs):
            args = [attended + token * P.d_attention, attended_m + token * (2 * P.heads), count, codes + token * WIDTH,
                    other + token * WIDTH, places + token * 2, epoch, base + P.at_small, flag, deadline]  # fmt: skip
            gl.inline_asm(share_attention(P), "l,l,r,l,l,l,r,r,l,l,~{memory}", args, (), is_pure=False)


@gluon.jit
def _share_final(base, words, target, places, gain, tag, epoch, flag, deadline, P: gl.constexpr):
    """Applies the last norm to this program's tokens for all programs, and copies all tokens to shared memory."""
    constraints: gl.constexpr = "l,r,l,l,r,r,l,l," + "r," * gain.shape[2] + "~{memory}"
    for token in range(P.programs - 1 - gl.program_id(0), P.batch, P.programs):
        args = [words + token * P.d_model, tag, target + token * (2 * P.head_columns), places + token * 2, epoch,
                base + P.at_small, flag, deadline, gain]  # fmt: skip
        gl.inline_asm(share_final(P.token_plan), constraints, args, (), is_pure=False)
    _await(base, places, epoch, flag, deadline, P, True)
    gl.inline_asm(copy_final(P), "l,r,~{memory}", [target, base + P.at_tokens], (), is_pure=False)


@gluon.jit
def _merge(base, parts, parts_m, attended, attended_m, splits, epoch, flag, deadline, P: gl.constexpr):
    """Joins the parts of a long context; an item is one head."""
    E: gl.constexpr = P.head_size
    for item in range(P.programs - 1 - gl.program_id(0), P.batch * P.heads, P.programs):
        args = [parts + item * E, parts_m + item * 2, splits, epoch, base + P.at_tokens, flag, deadline,
                attended + item * E, attended_m + item * 2]  # fmt: skip
        gl.inline_asm(merge_parts(P), "l,l,r,r,r,l,l,l,l,~{memory}", args, (), is_pure=False)


@gluon.jit
def _largest_key(best, logit, row, P: gl.constexpr):
    """The larger of ``best`` and the key of a logit; see ``head``."""
    bits = logit.to(gl.float32).to(gl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(gl.int64) << 32) | (0x7FFFFFFF - row).to(gl.int64)
    return gl.where((row < P.shape.vocab) & (key > best), key, best)


@gluon.jit
def _head_of_few(base, head, logits, gain, words, tag, flag, deadline, best, chosen, trace, P: gl.constexpr):
    """Computes the final norm and the head for one or two tokens. The first rows are loaded ahead of the norm."""
    REGS: gl.constexpr = (P.d_model + 255) // 256 * 4
    AHEAD: gl.constexpr = 96 // REGS if REGS <= 48 else 2
    PADDED: gl.constexpr = 16 if REGS <= 16 else 32 if REGS <= 32 else 64
    R: gl.constexpr = gl.BlockedLayout([1, 1, PADDED], [1, 32, 1], [P.warps, 1, 1], [2, 1, 0])
    W: gl.constexpr = gl.distributed_type(gl.int32, [P.warps, 32, PADDED], R)
    R1: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [P.warps, 1], [1, 0])
    Y: gl.constexpr = gl.distributed_type(gl.float32, [P.warps, 32], R1)
    LOAD: gl.constexpr = "=&r," * PADDED + "l,r,~{memory}"
    STRIDE: gl.constexpr = P.programs * P.warps
    BATCH: gl.constexpr = P.batch
    warp = gl.arange(0, P.warps, gl.SliceLayout(1, R1))[:, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, R1))[None, :]
    first = gl.program_id(0) * P.warps
    rows = ()
    for i in gl.static_range(AHEAD):
        rows += (gl.inline_asm(load_row(P), LOAD, [head, first + i * STRIDE], W, is_pure=False),)
    _final_norm(base, words, gain, tag, flag, deadline, P)
    _stamp(trace, P.layers, 1, P)
    keys = ()
    for _token in gl.static_range(BATCH):
        keys += (gl.full([P.warps, 32], -(2**63), gl.int64, R1),)
    for start in range(first, P.shape.vocab, AHEAD * STRIDE):
        coming = ()
        for i in gl.static_range(AHEAD):
            row = start + i * STRIDE + warp + lane * 0
            larger = ()
            for token in gl.static_range(BATCH):
                args = [rows[i], base + P.at_tokens + token * P.head_stride]
                y = gl.inline_asm(dot_row(P), ("=&f", "r", "r"), args, Y, is_pure=False)
                y = y.to(logits.dtype.element_ty)
                gl.store(logits + token * P.shape.vocab + row, y, mask=(row < P.shape.vocab) & (lane == 0))
                larger += (_largest_key(keys[token], y, row, P),)
            keys = larger
            coming += (gl.inline_asm(load_row(P), LOAD, [head, start + (AHEAD + i) * STRIDE], W, is_pure=False),)
        rows = coming
    if BATCH == 1:
        args = [keys[0], base + P.at_staging, best, chosen]  # type: ignore[misc]
    else:
        args = [keys[0], keys[1], base + P.at_staging, best, chosen]  # type: ignore[misc]
    gl.inline_asm(choose(P), choose_constraints(P), args, (), is_pure=False)


@gluon.jit
def _head(base, head, logits, gain, words, shared, places, epoch, flag, deadline, best, chosen, trace,
          P: gl.constexpr):  # fmt: skip
    """Computes the final norm and the head for three tokens or more."""
    R64: gl.constexpr = gl.BlockedLayout([1, 1, 64], [1, 32, 1], [P.warps, 1, 1], [2, 1, 0])
    SUMS: gl.constexpr = 4 * P.token_groups
    R4: gl.constexpr = gl.BlockedLayout([1, 1, SUMS], [1, 32, 1], [P.warps, 1, 1], [2, 1, 0])
    W: gl.constexpr = gl.distributed_type(gl.int32, [P.warps, 32, 64], R64)
    A: gl.constexpr = gl.distributed_type(gl.float32, [P.warps, 32, SUMS], R4)
    LOAD: gl.constexpr = "=&r," * 64 + "l,r,~{memory}"
    STEPS: gl.constexpr = (P.head_columns + 255) // 256
    TILES: gl.constexpr = (P.shape.vocab + 15) // 16
    STRIDE: gl.constexpr = P.programs * P.warps
    warp = gl.arange(0, P.warps, gl.SliceLayout(1, gl.SliceLayout(2, R4)))[:, None, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, R4)))[None, :, None]
    item = gl.arange(0, SUMS, gl.SliceLayout(0, gl.SliceLayout(1, R4)))[None, None, :]
    first = gl.program_id(0) * P.warps
    rows = gl.inline_asm(load_rows(P, 0), LOAD, [head, first], W, is_pure=False)
    if P.shared_codes:
        _share_final(base, words, shared + P.at_final, places + 8 * P.batch, gain, epoch & 255, epoch, flag, deadline,
                     P)  # fmt: skip
    else:
        _final_norm(base, words, gain, epoch & 255, flag, deadline, P)
    _stamp(trace, P.layers, 1, P)
    keys = gl.full([P.warps, 32, SUMS], -(2**63), gl.int64, R4)
    for tile in range(first, TILES, STRIDE):
        acc = gl.zeros([P.warps, 32, SUMS], gl.float32, R4)
        for s in gl.static_range(STEPS):
            coming = gl.inline_asm(
                load_rows(P, (s + 1) % STEPS), LOAD, [head, tile + (s + 1) // STEPS * STRIDE], W, is_pure=False
            )
            args = [acc, rows, base + P.at_tokens, base + P.at_staging]
            acc = gl.inline_asm(dot_rows(P, s), dot_constraints(P), args, A, is_pure=False)
            rows = coming
        row = (tile + warp) * 16 + lane // 4 + item // 2 % 2 * 8
        token = lane % 4 * 2 + item % 2 + item // 4 * 8
        where = logits + token.to(gl.int64) * P.shape.vocab + row
        y = acc.to(logits.dtype.element_ty)
        gl.store(where, y, mask=(row < P.shape.vocab) & (token < P.batch))
        keys = _largest_key(keys, y, row, P)
    # The staging rows are not in use any more.
    args = [keys, base + P.at_staging, best, chosen]
    gl.inline_asm(choose(P), choose_constraints(P), args, (), is_pure=False)


@gluon.jit
def _step(
    tokens, lengths, state, caches, cos, sin, embedding, weights, norms, head, logits, best, chosen,
    x, y, qkv, parts, parts_m, attended, attended_m, hidden, shared, places, table, trace, timeout, slots, max_length,
    P: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = P.d_model
    V1: gl.constexpr = gl.BlockedLayout([1], [32], [P.warps], [0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    pid = gl.program_id(0)
    flag = state + 1
    # Triton wants powers of two. The three allocations are all there is and stand side by side, in some order.
    a = gl.allocate_shared_memory(gl.int32, [P.pieces[0]], FLAT)
    b = gl.allocate_shared_memory(gl.int32, [P.pieces[1]], FLAT)
    c = gl.allocate_shared_memory(gl.int32, [P.pieces[2]], FLAT)
    base = gl.inline_asm(_LOWEST, "=&r,r,r,r,~{memory}", [a, b, c], gl.int32, is_pure=False)
    deadline = gl.inline_asm(_DEADLINE, "=&l,l,~{memory}", [timeout], gl.int64, is_pure=False)
    epoch = gl.load(state)

    my_qkv, my_rows, my_hidden = share(P.qkv.all_tiles, P), share(P.o.all_tiles, P), share(P.gate_up.all_tiles, P)
    longest = _longest(lengths, max_length, P)
    embed(base, my_rows, tokens, embedding, x, epoch & 255, P)
    gl.inline_asm(_START, "r,r,~{memory}", [base, P.barriers], (), is_pure=False)
    args = [base + P.at_schedule, table + pid * ((P.units + 1) * 4), P.units + 1]
    gl.inline_asm(_COPY_SCHEDULE, "r,l,r,~{memory}", args, (), is_pure=False)
    barrier()
    following = fetch(base, gl.zeros([32 * P.warps], gl.int32, V1), -1, weights, P)
    rotation(base, my_qkv, lengths, max_length, cos, sin, P)
    barrier()
    splits, part = _split_context(longest, P)
    joined = gl.where(splits > P.direct_parts, 1, splits)
    has_item = P.programs - 1 - pid < P.batch * P.groups * splits
    mine = item_of(gl.where(has_item, P.programs - 1 - pid, 0), lengths, max_length, splits, part, P)
    end = gl.where(has_item, mine[4], 0)
    # One copy request brings all of its tokens to L2, so that later loads of long parts do not wait for memory.
    ahead = gl.maximum(end - mine[3], 0) * (2 * P.head_size)
    cached = mine[6] * slots * P.head_size
    gain = _load_norm(norms, P)
    unit = 0
    for layer in range(P.layers):
        tag = (epoch + layer + 1) & 255
        keys = gl.load(caches + 2 * layer).to(gl.pointer_type(gl.bfloat16))
        values = gl.load(caches + 2 * layer + 1).to(gl.pointer_type(gl.bfloat16))
        # Keys and values that B needs first come to L2 while A computes.
        gl.inline_asm(PREFETCH, "l,r", [keys + cached + mine[3] * P.head_size, ahead], (), is_pure=False)
        gl.inline_asm(PREFETCH, "l,r", [values + cached + mine[3] * P.head_size, ahead], (), is_pure=False)
        if P.early_cache:
            kv = load_cache_tokens(keys + cached, values + cached, mine[3], end, mine[5], P)
        now = epoch + layer + 1
        codes, other = shared + (now & 1) * P.shared_bytes, shared + (1 - (now & 1)) * P.shared_bytes
        # A
        _stamp(trace, layer, 0, P)
        if P.shared_codes:
            _share_normalized(base, x, codes, other, places, gain, (epoch + layer) & 255, now, flag, deadline, P)
            _stamp(trace, layer, 1, P)
            _await(base, places, now, flag, deadline, P, False)
        if my_qkv[1] > 0:
            if not P.shared_codes:
                _normalize_and_quantize(base, x, gain, (epoch + layer) & 255, flag, deadline, P)
            _stamp(trace, layer, 2, P)
            for start in range(0, my_qkv[1], P.qkv.tiles):
                place, count = unit_place(base, unit, P), gl.minimum(P.qkv.tiles, my_qkv[1] - start)
                following = fetch(base, following, unit - 1, weights, P)
                multiply(base, place, count, unit, codes, flag, deadline, P, P.qkv)
                write_qkv(base, place, qkv, keys, values, my_qkv, start, count, slots, tag, P)
                barrier()
                unit += 1
        elif P.qkv.shared:
            _acquire()
        if not P.early_cache:
            kv = load_cache_tokens(keys + cached, values + cached, mine[3], end, mine[5], P)
        _stamp(trace, layer, 3, P)
        # B
        _attention(base, kv, mine, qkv, keys, values, lengths, max_length, slots, parts, parts_m, attended, attended_m,
                   splits, part, now, flag, deadline, P)  # fmt: skip
        _stamp(trace, layer, 4, P)
        if P.splits > P.direct_parts:  # noqa: SIM102 - known when the kernel is compiled
            if splits > P.direct_parts:
                _merge(base, parts, parts_m, attended, attended_m, splits, now, flag, deadline, P)
        _stamp(trace, layer, 5, P)
        # C
        gain = _load_norm(norms + (2 * layer + 1) * D, P)
        if P.o.shared:
            _share_attention(base, attended, attended_m, joined, codes + P.at_codes_a, other + P.at_codes_a,
                             places + 2 * P.batch, now, flag, deadline, P)  # fmt: skip
            _stamp(trace, layer, 6, P)
            _await(base, places + 2 * P.batch, now, flag, deadline, P, False)
        if my_rows[1] > 0:
            if not P.o.shared:
                _quantize_attention(base, attended, attended_m, joined, now, flag, deadline, P)
            _stamp(trace, layer, 7, P)
            for start in range(0, my_rows[1], P.o.tiles):
                place, count = unit_place(base, unit, P), gl.minimum(P.o.tiles, my_rows[1] - start)
                if not P.early_o:
                    following = fetch(base, following, unit - 1, weights, P)
                multiply(base, place, count, unit, codes + P.at_codes_a, flag, deadline, P, P.o)
                add_to_residual(base, place, y, my_rows, start, count, tag, P, P.o)
                barrier()
                unit += 1
        elif P.o.shared:
            _acquire()
        # D
        _stamp(trace, layer, 8, P)
        if P.shared_codes:
            _share_normalized(base, y, codes + P.at_codes_y, other + P.at_codes_y, places + 4 * P.batch, gain, tag, now,
                              flag, deadline, P)  # fmt: skip
            _stamp(trace, layer, 9, P)
            _await(base, places + 4 * P.batch, now, flag, deadline, P, False)
        else:
            _normalize_and_quantize(base, y, gain, tag, flag, deadline, P)
        _stamp(trace, layer, 10, P)
        for start in range(0, my_hidden[1], P.gate_up.tiles):
            place, count = unit_place(base, unit, P), gl.minimum(P.gate_up.tiles, my_hidden[1] - start)
            following = fetch(base, following, unit - 1, weights, P)
            multiply(base, place, count, unit, codes + P.at_codes_y, flag, deadline, P, P.gate_up)
            write_hidden(base, place, hidden, my_hidden, start, count, tag, P)
            barrier()
            unit += 1
        # E
        _stamp(trace, layer, 11, P)
        gain = _load_norm(norms + (2 * layer + 2) * D, P)
        if P.down.shared:
            _share(base, hidden, codes + P.at_codes_h, other + P.at_codes_h, places + 6 * P.batch, tag, now, flag,
                   deadline, P, P.shape.d_ffn)  # fmt: skip
            _stamp(trace, layer, 12, P)
            _await(base, places + 6 * P.batch, now, flag, deadline, P, False)
        if my_rows[1] > 0:
            if not P.down.shared:
                _quantize(base, hidden, tag, flag, deadline, P, P.d_ffn)
            _stamp(trace, layer, 13, P)
            for start in range(0, my_rows[1], P.down.tiles):
                place, count = unit_place(base, unit, P), gl.minimum(P.down.tiles, my_rows[1] - start)
                following = fetch(base, following, unit - 1, weights, P)
                multiply(base, place, count, unit, codes + P.at_codes_h, flag, deadline, P, P.down)
                add_to_residual(base, place, x, my_rows, start, count, tag, P, P.down)
                barrier()
                unit += 1
        elif P.down.shared:
            _acquire()
        _stamp(trace, layer, 14, P)
    last = epoch + P.layers
    _stamp(trace, P.layers, 0, P)
    # Program 0 has waited for all others in every layer, so all have read what changes here.
    if pid == 0:  # noqa: SIM102 - with `and` every program would load the flag
        if gl.load(flag, volatile=True) == 0:
            # Two layers take turns with the places of shared codes, across steps too.
            gl.store(state, last + (2 if P.o.shared else 1))
            BATCH: gl.constexpr = P.batch
            for n in gl.static_range(BATCH):
                gl.store(lengths + n, gl.minimum(gl.load(lengths + n) + 1, max_length))
    if P.batch <= 2:
        _head_of_few(base, head, logits, gain, x, last & 255, flag, deadline, best, chosen, trace, P)
    else:
        _head(base, head, logits, gain, x, shared, places, last, flag, deadline, best, chosen, trace, P)
    _stamp(trace, P.layers, 2, P)


@gluon.jit(do_not_specialize=("timeout", "slots", "max_length"))
def decode_step_kernel(
    tokens, lengths, state, caches, cos, sin, embedding, weights, norms, head, logits, best, chosen,
    x, y, qkv, parts, parts_m, attended, attended_m, hidden, shared, places, table, trace, timeout, slots, max_length,
    P: gl.constexpr,
):  # fmt: skip
    """Adds one token to each sequence.

    Args:
        tokens: The token ids, int64 ``[batch]``.
        lengths: The number of tokens of each sequence, int64 ``[batch]``; the kernel adds one, up to ``max_length``.
        state: The epoch and the error flag, int32 ``[2]``.
        caches: The addresses of each layer's keys and values, int64 ``[layers, 2]``.
        cos: The cosines of the rotation, float32 ``[positions, head_size]``.
        sin: The sines, shaped as ``cos``; those of the first half of a head have the opposite sign.
        embedding: The embedding, bfloat16 ``[vocab, d_model]``.
        weights: The packed layers, int32.
        norms: The weights of the norms, bfloat16 ``[2 layers + 1, d_model]``: attention, MLP, ..., the last norm.
        head: The weight of the head, bfloat16 ``[vocab, d_model]``.
        logits: The result ``[batch, vocab]``, bfloat16 or float32.
        best: The largest key of each token, and the number of programs that have joined theirs, int64 ``[batch + 1]``.
            Before and behind every step they are :data:`head.LOWEST` and 0.
        chosen: The most likely token of each sequence, int64 ``[batch]``.
        x: The residual stream before attention: words, int32 ``[batch, d_model]``.
        y: The residual stream after attention: words, int32 ``[batch, d_model]``.
        qkv: Queries, keys and values: words, int32 ``[batch, heads + 2 kv_heads, head_size]``.
        parts: Attention's parts: pairs, int64 ``[splits, batch, heads, head_size]``.
        parts_m: The maxima and sums of the parts: pairs, int64 ``[splits, batch, heads, 2]``.
        attended: Attention's result: words, int32 ``[direct_parts, batch, heads, head_size]``.
        attended_m: The maxima and sums of the result: pairs, int64 ``[direct_parts, batch, heads, 2]``.
        hidden: The hidden vector of the MLP: words, int32 ``[batch, d_ffn]``.
        shared: The codes of all vectors and the final hidden states of two layers, uint8 ``[2, shared_bytes]``, if
            codes are shared. At first all bytes are ``ptx.EMPTY``.
        places: The sums and scales of the shared vectors: pairs, int64 ``[5, batch, 2]``.
        table: The schedule, int32 ``[programs, units + 1, 4]``.
        trace: Times in cycles and in nanoseconds, int64 ``[programs, layers + 1, stamps, 2]``, if the plan is traced.
        timeout: The deadline of a step, in nanoseconds.
        slots: The number of tokens that a cache has room for.
        max_length: The number of tokens that a sequence can have; at most ``slots``.
        P: The plan.
    """
    if gl.load(state + 1) == 0:
        _step(tokens, lengths, state, caches, cos, sin, embedding, weights, norms, head, logits, best, chosen,
              x, y, qkv, parts, parts_m, attended, attended_m, hidden, shared, places, table, trace, timeout, slots,
              max_length, P)  # fmt: skip
