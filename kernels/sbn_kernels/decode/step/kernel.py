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
work that does not grow with the batch in every program. From three tokens on the result of attention and the hidden
vector go that way. The program that quantises a token then also joins the parts of the token's context, so more
programs take part in attention.

No program overwrites a vector that another still has to read: the writer has waited for results, and each reader of the
old vector made its part of those results after reading. For example, the readers of y in phase D make the hidden
vector, and phase E waits for the whole hidden vector.

Position, step and lengths come from memory, so one CUDA graph serves all steps. Every wait has a deadline. A wait that
passes the deadline sets an error flag and goes on. The other programs see the flag and go on too, so the kernel ends
with wrong outputs and without a trap. A step that finds the flag set does nothing.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sbn_kernels.decode.step.attention import PREFETCH
from sbn_kernels.decode.step.context import attention, longest_context, merge, split_context
from sbn_kernels.decode.step.handover import (
    acquire,
    await_codes,
    load_norm_weights,
    normalize_and_quantize,
    quantize,
    quantize_result,
    share_normalized,
    share_result,
    share_vector,
)
from sbn_kernels.decode.step.output import head_of_few, head_of_many
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
    stamp,
    unit_place,
    write_hidden,
    write_qkv,
)

_START = gl.constexpr("""{ .reg .pred p; .reg .u32 t, a; mov.u32 t, %tid.x; setp.lt.u32 p, t, $1;
mad.lo.u32 a, t, 8, $0;
@p mbarrier.init.shared::cta.b64 [a], 1; fence.proxy.async.shared::cta; }""")
_COPY_SCHEDULE = gl.constexpr("""{ .reg .pred p; .reg .u32 t, a; .reg .u64 s; .reg .b32 w0, w1, w2, w3;
mov.u32 t, %tid.x;
AGAIN: setp.ge.u32 p, t, $2; @p bra DONE; mad.wide.u32 s, t, 16, $1; mad.lo.u32 a, t, 16, $0;
ld.global.nc.v4.b32 {w0, w1, w2, w3}, [s]; st.shared.v4.b32 [a], {w0, w1, w2, w3}; add.u32 t, t, 256; bra AGAIN;
DONE: }""")
_LOWEST = gl.constexpr("min.u32 $0, $1, $2; min.u32 $0, $0, $3;")
_DEADLINE = gl.constexpr("mov.u64 $0, %globaltimer; add.u64 $0, $0, $1;")


@gluon.jit
def _step(
    tokens, lengths, state, caches, cos, sin, embedding, weights, norms, head, head_scale, logits, best, chosen,
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
    longest = longest_context(lengths, max_length, P)
    embed(base, my_rows, tokens, embedding, x, epoch & 255, P)
    gl.inline_asm(_START, "r,r,~{memory}", [base, P.barriers], (), is_pure=False)
    args = [base + P.at_schedule, table + pid * ((P.units + 1) * 4), P.units + 1]
    gl.inline_asm(_COPY_SCHEDULE, "r,l,r,~{memory}", args, (), is_pure=False)
    barrier()
    following = fetch(base, gl.zeros([32 * P.warps], gl.int32, V1), -1, weights, P)
    rotation(base, my_qkv, lengths, max_length, cos, sin, P)
    barrier()
    splits, part = split_context(longest, P)
    joined = gl.where(splits > P.direct_parts, 1, splits)
    has_item = P.programs - 1 - pid < P.batch * P.groups * splits
    mine = item_of(gl.where(has_item, P.programs - 1 - pid, 0), lengths, max_length, splits, part, P)
    end = gl.where(has_item, mine[4], 0)
    # One copy request brings all of its tokens to L2, so that later loads of long parts do not wait for memory.
    ahead = gl.maximum(end - mine[3], 0) * (2 * P.head_size)
    cached = mine[6] * slots * P.head_size
    gain = load_norm_weights(norms, P)
    unit = 0
    for layer in range(P.layers):
        tag = (epoch + layer + 1) & 255
        keys = gl.load(caches + 2 * layer).to(gl.pointer_type(gl.bfloat16))
        values = gl.load(caches + 2 * layer + 1).to(gl.pointer_type(gl.bfloat16))
        # Keys and values that B needs first: their loads run while A computes. Behind A they cost 1 to 4 % of a step.
        gl.inline_asm(PREFETCH, "l,r", [keys + cached + mine[3] * P.head_size, ahead], (), is_pure=False)
        gl.inline_asm(PREFETCH, "l,r", [values + cached + mine[3] * P.head_size, ahead], (), is_pure=False)
        kv = load_cache_tokens(keys + cached, values + cached, mine[3], end, mine[5], P)
        now = epoch + layer + 1
        codes, other = shared + (now & 1) * P.shared_bytes, shared + (1 - (now & 1)) * P.shared_bytes
        # A
        stamp(trace, layer, 0, P)
        if P.shared_codes:
            share_normalized(base, x, codes, other, places, gain, (epoch + layer) & 255, now, flag, deadline, P)
            stamp(trace, layer, 1, P)
            await_codes(base, places, now, flag, deadline, P, False)
        if my_qkv[1] > 0:
            if not P.shared_codes:
                normalize_and_quantize(base, x, gain, (epoch + layer) & 255, flag, deadline, P)
            stamp(trace, layer, 2, P)
            for start in range(0, my_qkv[1], P.qkv.tiles):
                place, count = unit_place(base, unit, P), gl.minimum(P.qkv.tiles, my_qkv[1] - start)
                following = fetch(base, following, unit - 1, weights, P)
                multiply(base, place, count, unit, codes, flag, deadline, P, P.qkv)
                write_qkv(base, place, qkv, keys, values, my_qkv, start, count, slots, tag, P)
                barrier()
                unit += 1
        elif P.qkv.shared:
            acquire()
        stamp(trace, layer, 3, P)
        # B
        attention(base, kv, mine, qkv, keys, values, lengths, max_length, slots, parts, parts_m, attended, attended_m,
                   splits, part, now, flag, deadline, P)  # fmt: skip
        stamp(trace, layer, 4, P)
        if P.splits > P.direct_parts:  # noqa: SIM102 - known when the kernel is compiled
            if splits > P.direct_parts:
                merge(base, parts, parts_m, attended, attended_m, splits, now, flag, deadline, P)
        stamp(trace, layer, 5, P)
        # C
        gain = load_norm_weights(norms + (2 * layer + 1) * D, P)
        if P.o.shared:
            share_result(base, attended, attended_m, joined, codes + P.at_codes_a, other + P.at_codes_a,
                             places + 2 * P.batch, now, flag, deadline, P)  # fmt: skip
            stamp(trace, layer, 6, P)
            await_codes(base, places + 2 * P.batch, now, flag, deadline, P, False)
        if my_rows[1] > 0:
            if not P.o.shared:
                quantize_result(base, attended, attended_m, joined, now, flag, deadline, P)
            stamp(trace, layer, 7, P)
            for start in range(0, my_rows[1], P.o.tiles):
                place, count = unit_place(base, unit, P), gl.minimum(P.o.tiles, my_rows[1] - start)
                if not P.early_o:
                    following = fetch(base, following, unit - 1, weights, P)
                multiply(base, place, count, unit, codes + P.at_codes_a, flag, deadline, P, P.o)
                add_to_residual(base, place, y, my_rows, start, count, tag, P, P.o)
                barrier()
                unit += 1
        elif P.o.shared:
            acquire()
        # D
        stamp(trace, layer, 8, P)
        if P.shared_codes:
            share_normalized(base, y, codes + P.at_codes_y, other + P.at_codes_y, places + 4 * P.batch, gain, tag, now,
                              flag, deadline, P)  # fmt: skip
            stamp(trace, layer, 9, P)
            await_codes(base, places + 4 * P.batch, now, flag, deadline, P, False)
        else:
            normalize_and_quantize(base, y, gain, tag, flag, deadline, P)
        stamp(trace, layer, 10, P)
        for start in range(0, my_hidden[1], P.gate_up.tiles):
            place, count = unit_place(base, unit, P), gl.minimum(P.gate_up.tiles, my_hidden[1] - start)
            following = fetch(base, following, unit - 1, weights, P)
            multiply(base, place, count, unit, codes + P.at_codes_y, flag, deadline, P, P.gate_up)
            write_hidden(base, place, hidden, my_hidden, start, count, tag, P)
            barrier()
            unit += 1
        # E
        stamp(trace, layer, 11, P)
        gain = load_norm_weights(norms + (2 * layer + 2) * D, P)
        if P.down.shared:
            share_vector(base, hidden, codes + P.at_codes_h, other + P.at_codes_h, places + 6 * P.batch, tag, now, flag,
                   deadline, P, P.shape.d_ffn)  # fmt: skip
            stamp(trace, layer, 12, P)
            await_codes(base, places + 6 * P.batch, now, flag, deadline, P, False)
        if my_rows[1] > 0:
            if not P.down.shared:
                quantize(base, hidden, tag, flag, deadline, P, P.d_ffn)
            stamp(trace, layer, 13, P)
            for start in range(0, my_rows[1], P.down.tiles):
                place, count = unit_place(base, unit, P), gl.minimum(P.down.tiles, my_rows[1] - start)
                following = fetch(base, following, unit - 1, weights, P)
                multiply(base, place, count, unit, codes + P.at_codes_h, flag, deadline, P, P.down)
                add_to_residual(base, place, x, my_rows, start, count, tag, P, P.down)
                barrier()
                unit += 1
        elif P.down.shared:
            acquire()
        stamp(trace, layer, 14, P)
    last = epoch + P.layers
    stamp(trace, P.layers, 0, P)
    # Program 0 has waited for all others in every layer, so all have read what changes here.
    if pid == 0:  # noqa: SIM102 - with `and` every program would load the flag
        if gl.load(flag, volatile=True) == 0:
            # Two layers take turns with the places of shared codes, across steps too.
            gl.store(state, last + (2 if P.o.shared else 1))
            BATCH: gl.constexpr = P.batch
            for n in gl.static_range(BATCH):
                gl.store(lengths + n, gl.minimum(gl.load(lengths + n) + 1, max_length))
    if P.batch <= 2:
        head_of_few(base, head, head_scale, logits, gain, x, last & 255, flag, deadline, best, chosen, trace, P)
    else:
        head_of_many(base, head, head_scale, logits, gain, x, shared, places, last, flag, deadline, best, chosen,
                     trace, P)  # fmt: skip
    stamp(trace, P.layers, 2, P)


@gluon.jit(do_not_specialize=("timeout", "slots", "max_length"))
def decode_step_kernel(
    tokens, lengths, state, caches, cos, sin, embedding, weights, norms, head, head_scale, logits, best, chosen,
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
        head: The weight of the head ``[vocab, d_model]``: bfloat16, or int8 codes.
        head_scale: The scale of each row of the head, float32 ``[vocab]``, if ``P.head_bits`` is 8.
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
        _step(tokens, lengths, state, caches, cos, sin, embedding, weights, norms, head, head_scale, logits,
              best, chosen, x, y, qkv, parts, parts_m, attended, attended_m, hidden, shared, places, table, trace,
              timeout, slots, max_length, P)  # fmt: skip
