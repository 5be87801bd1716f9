"""Device helpers of the decode step: shares and items of work, the results of a product, and their use.

A program's threads share the results of a unit in *items*: (tile, row 0 to 7, token); a thread with an item has the
results of rows ``h`` and ``h + 8`` of the tile. All results are rounded to bfloat16 where the model's layers under
autocast round: after the product, after the bias, after the rotation and after the addition to the residual stream.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sbn_kernels.decode.step.attention import load_cache
from sbn_kernels.decode.step.gemv import fetch_weights, gather_sums, multiply_shared, multiply_tiles

_STAMP = gl.constexpr("""{ .reg .pred p; .reg .u32 t; .reg .u64 c, g; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
mov.u64 c, %clock64; mov.u64 g, %globaltimer; @p st.global.v2.u64 [$0], {c, g}; }""")
_PUBLISH = gl.constexpr("{ .reg .pred p; setp.ne.u32 p, $2, 0; @p st.relaxed.gpu.global.b32 [$0], $1; }")
_LOAD = gl.constexpr("{ .reg .pred p; setp.ne.u32 p, $2, 0; mov.b32 $0, 0; @p ld.shared.f32 $0, [$1]; }")
_STORE = gl.constexpr("{ .reg .pred p; setp.ne.u32 p, $2, 0; @p st.shared.b32 [$0], $1; }")
_STORE2 = gl.constexpr("{ .reg .pred p; setp.ne.u32 p, $3, 0; @p st.shared.v2.b32 [$0], {$1, $2}; }")


@gluon.jit
def _publish(words, bits, tag, inside):
    """Writes words for other programs: the upper 24 of ``bits``, which are a float32, and the tag."""
    gl.inline_asm(_PUBLISH, "l,r,r,~{memory}", [words, (bits & -256) | tag, inside.to(gl.int32)], (), is_pure=False)


@gluon.jit
def _bits(value):
    """Converts a bfloat16 to the bits of the same float32."""
    return value.to(gl.float32).to(gl.int32, bitcast=True)


@gluon.jit
def share(tiles: gl.constexpr, P: gl.constexpr):
    """The first tile and the number of tiles of this program; ``plan.share`` computes the same on the host."""
    pid = gl.program_id(0)
    base: gl.constexpr = tiles // P.programs
    extra: gl.constexpr = tiles % P.programs
    return pid * base + gl.minimum(pid, extra), base + (pid < extra).to(gl.int32)


@gluon.jit
def _item(j: gl.constexpr, P: gl.constexpr):
    """Item number ``j`` of a thread in a unit: tile, row 0 to 7 of the tile, token."""
    V1: gl.constexpr = gl.BlockedLayout([1], [32], [P.warps], [0])
    i = gl.arange(0, 32 * P.warps, V1) + j * 32 * P.warps
    return i // (8 * P.batch_slots), i % 8, i // 8 % P.batch_slots


@gluon.jit
def unit_place(base, unit, P: gl.constexpr):
    """The address of a unit's weights in shared memory."""
    at = gl.inline_asm(
        "ld.shared.b32 $0, [$1];", "=r,r,~{memory}", [base + P.at_schedule + 16 * unit], gl.int32, is_pure=False
    )
    return base + P.at_ring + at


@gluon.jit
def multiply(base, place, count, unit, codes, flag, deadline, P: gl.constexpr, F: gl.constexpr):
    """Waits for a unit's weights, multiplies, and leaves partial sums in shared memory; ``codes``: if shared."""
    barrier = base + 8 * (unit % P.barriers)
    if F.shared:
        args = [place, count, codes, base + P.at_sums, barrier, unit // P.barriers % 2, flag, deadline]
        gl.inline_asm(multiply_shared(P, F), "r,r,l,r,r,r,l,l,~{memory}", args, (), is_pure=False)
    else:
        args = [place, count, base + P.at_tokens, base + P.at_sums, barrier, unit // P.barriers % 2, flag, deadline]
        gl.inline_asm(multiply_tiles(P, F), "r,r,r,r,r,r,l,l,~{memory}", args, (), is_pure=False)


@gluon.jit
def _two_rows(base, place, count, j: gl.constexpr, P: gl.constexpr, F: gl.constexpr):
    """The results of rows h and h + 8 of a thread's tile for the thread's token, with bias, bfloat16."""
    V1: gl.constexpr = gl.BlockedLayout([1], [32], [P.warps], [0])
    I1: gl.constexpr = gl.distributed_type(gl.int32, [32 * P.warps], V1)
    F1: gl.constexpr = gl.distributed_type(gl.float32, [32 * P.warps], V1)
    tile, h, token = _item(j, P)
    tile = gl.minimum(tile, count - 1)
    ROW: gl.constexpr = 4 * (F.groups if P.batch == 1 else P.sum_pitch)
    sums = base + P.at_sums + tile * (64 * F.groups * P.sum_pitch) + h * ROW + 4 * token
    statistics = base + (P.at_statistics if F.shared else P.at_small)
    rows = place + tile * F.tile_bytes + F.steps * 512 + 16 * h
    args = [sums, rows, statistics, gl.minimum(token, P.batch - 1)]
    i0, i1, g0, g1, b0, b1, s = gl.inline_asm(
        gather_sums(P, F),
        "=&r,=&r,=&f,=&f,=&f,=&f,=&f,r,r,r,r,~{memory}",
        args,
        (I1, I1, F1, F1, F1, F1, F1),
        is_pure=False,
    )
    y0 = (i0.to(gl.float32) * (s * g0)).to(gl.bfloat16)
    y1 = (i1.to(gl.float32) * (s * g1)).to(gl.bfloat16)
    return (y0.to(gl.float32) + b0).to(gl.bfloat16), (y1.to(gl.float32) + b1).to(gl.bfloat16)


@gluon.jit
def fetch(base, following, used, weights, P: gl.constexpr):
    """Starts the copies that are possible once unit ``used`` and all before it have been used.

    The kernel calls this when a vector has arrived, before the product. After a product all programs wait for the next
    vector, and a burst of copies would slow that vector down.
    """
    args = [following, base + P.at_schedule, used, base, base + P.at_ring, weights]
    return gl.inline_asm(fetch_weights(P), "=&r,r,r,r,r,r,l,~{memory}", args, following.type, is_pure=False)


@gluon.jit
def barrier():
    """Waits for all threads of the program, which ends the use of a unit and of the unit's partial sums."""
    gl.inline_asm("bar.sync 0;", "~{memory}", [], (), is_pure=False)


@gluon.jit
def add_to_residual(base, place, words, first, start, count, tag, P: gl.constexpr, F: gl.constexpr):
    """Adds a product to the residual stream of this program's rows, rounds to bfloat16, and writes ``words``."""
    V1: gl.constexpr = gl.BlockedLayout([1], [32], [P.warps], [0])
    F1: gl.constexpr = gl.distributed_type(gl.float32, [32 * P.warps], V1)
    ROUNDS: gl.constexpr = (F.tiles * 8 * P.batch_slots + 32 * P.warps - 1) // (32 * P.warps)
    for j in gl.static_range(ROUNDS):
        tile, h, token = _item(j, P)
        inside = (tile < count) & (token < P.batch)
        row = (gl.minimum(start + tile, first[1] - 1) * 16 + h) * P.batch_slots + token
        at = base + P.at_residual + 4 * row
        mine = inside.to(gl.int32)
        x0 = gl.inline_asm(_LOAD, "=&f,r,r,~{memory}", [at, mine], F1, is_pure=False)
        x1 = gl.inline_asm(_LOAD, "=&f,r,r,~{memory}", [at + 32 * P.batch_slots, mine], F1, is_pure=False)
        y0, y1 = _two_rows(base, place, count, j, P, F)
        x0 = _bits((x0 + y0.to(gl.float32)).to(gl.bfloat16))
        x1 = _bits((x1 + y1.to(gl.float32)).to(gl.bfloat16))
        word = words + token * P.d_model + (first[0] + start + tile) * 16 + h
        _publish(word, x0, tag, inside)
        _publish(word + 8, x1, tag, inside)
        gl.inline_asm(_STORE, "r,r,r,~{memory}", [at, x0, mine], (), is_pure=False)
        gl.inline_asm(_STORE, "r,r,r,~{memory}", [at + 32 * P.batch_slots, x1, mine], (), is_pure=False)


@gluon.jit
def rotation(base, first, position_of, max_length, cos, sin, P: gl.constexpr):
    """Writes the cosines and sines of this program's rows to shared memory, for all layers; 1 and 0 for rows of v."""
    E: gl.constexpr = P.head_size
    TILES: gl.constexpr = (P.qkv.all_tiles + P.programs - 1) // P.programs
    ROUNDS: gl.constexpr = (TILES * 8 * P.batch_slots + 32 * P.warps - 1) // (32 * P.warps)
    for j in gl.static_range(ROUNDS):
        tile, h, token = _item(j, P)
        inside = (tile < first[1]) & (token < P.batch)
        place = first[0] + tile
        feature = place % (E // 16) * 8 + h
        position = gl.load(position_of + gl.minimum(token, P.batch - 1))
        position = gl.minimum(position, max_length - 1)
        here = base + P.at_positions + 4 * gl.minimum(token, P.batch - 1)
        once = (tile < 1) & (h < 1) & (token < P.batch)
        gl.inline_asm(_STORE, "r,r,r,~{memory}", [here, position.to(gl.int32), once.to(gl.int32)], (), is_pure=False)
        turns = inside & (place // (E // 16) < P.heads + P.kv_heads)
        c = gl.load(cos + position * E + E // 2 + feature, mask=turns, other=1.0)
        s = gl.load(sin + position * E + E // 2 + feature, mask=turns, other=0.0)
        at = base + P.at_rotation + 8 * ((tile * 8 + h) * P.batch_slots + token)
        args = [at, c.to(gl.int32, bitcast=True), s.to(gl.int32, bitcast=True), inside.to(gl.int32)]
        gl.inline_asm(_STORE2, "r,r,r,r,~{memory}", args, (), is_pure=False)


@gluon.jit
def embed(base, first, tokens, embedding, words, tag, P: gl.constexpr):
    """Starts the residual stream of this program's rows with the embedding, and writes ``words``."""
    TILES: gl.constexpr = (P.o.all_tiles + P.programs - 1) // P.programs
    ROUNDS: gl.constexpr = (TILES * 8 * P.batch_slots + 32 * P.warps - 1) // (32 * P.warps)
    for j in gl.static_range(ROUNDS):
        tile, h, token = _item(j, P)
        inside = (tile < first[1]) & (token < P.batch)
        number = gl.load(tokens + token, mask=inside, other=0)
        number = gl.minimum(gl.maximum(number, 0), P.shape.vocab - 1)
        for half in gl.static_range(2):
            row = (first[0] + tile) * 16 + h + 8 * half
            x = gl.load(embedding + number * P.d_model + row, mask=inside, other=0.0)
            at = base + P.at_residual + 4 * ((tile * 16 + h + 8 * half) * P.batch_slots + token)
            gl.inline_asm(_STORE, "r,r,r,~{memory}", [at, _bits(x), inside.to(gl.int32)], (), is_pure=False)
            _publish(words + token * P.d_model + row, _bits(x), tag, inside)


@gluon.jit
def write_qkv(base, place, words, keys, values, first, start, count, slots, tag, P: gl.constexpr):
    """Rotates a unit's rows of q and k, writes the words of q, k and v, and writes k and v to the cache."""
    V1: gl.constexpr = gl.BlockedLayout([1], [32], [P.warps], [0])
    F1: gl.constexpr = gl.distributed_type(gl.float32, [32 * P.warps], V1)
    I1: gl.constexpr = gl.distributed_type(gl.int32, [32 * P.warps], V1)
    E: gl.constexpr = P.head_size
    ROUNDS: gl.constexpr = (P.qkv.tiles * 8 * P.batch_slots + 32 * P.warps - 1) // (32 * P.warps)
    for j in gl.static_range(ROUNDS):
        tile, h, token = _item(j, P)
        inside = (tile < count) & (token < P.batch)
        f0, f1 = _two_rows(base, place, count, j, P, P.qkv)
        at = base + P.at_rotation + 8 * ((gl.minimum(start + tile, first[1] - 1) * 8 + h) * P.batch_slots + token)
        c, s = gl.inline_asm("ld.shared.v2.f32 {$0, $1}, [$2];", "=f,=f,r,~{memory}", [at], (F1, F1), is_pure=False)
        f0, f1 = f0.to(gl.float32), f1.to(gl.float32)
        r0, r1 = (f0 * c - f1 * s).to(gl.bfloat16), (f1 * c + f0 * s).to(gl.bfloat16)
        row = first[0] + start + tile
        head, feature = row // (E // 16), row % (E // 16) * 8 + h
        word = words + (token * P.qkv_heads + head) * E + feature
        _publish(word, _bits(r0), tag, inside)
        _publish(word + E // 2, _bits(r1), tag, inside)
        is_key = head < P.heads + P.kv_heads
        kv_head = head - gl.where(is_key, P.heads, P.heads + P.kv_heads)
        where = base + P.at_positions + 4 * gl.minimum(token, P.batch - 1)
        position = gl.inline_asm("ld.shared.b32 $0, [$1];", "=r,r,~{memory}", [where], I1, is_pure=False)
        slot = ((token * P.kv_heads + kv_head).to(gl.int64) * slots + position) * E + feature
        into_keys = inside & is_key & (head >= P.heads)
        gl.store(keys + slot, r0, mask=into_keys)
        gl.store(keys + slot + E // 2, r1, mask=into_keys)
        gl.store(values + slot, r0, mask=inside & (head >= P.heads + P.kv_heads))
        gl.store(values + slot + E // 2, r1, mask=inside & (head >= P.heads + P.kv_heads))


@gluon.jit
def write_hidden(base, place, words, first, start, count, tag, P: gl.constexpr):
    """Computes the SwiGLU of a unit's gates and ups in float32, and writes words with 15 bits of mantissa."""
    ROUNDS: gl.constexpr = (P.gate_up.tiles * 8 * P.batch_slots + 32 * P.warps - 1) // (32 * P.warps)
    for j in gl.static_range(ROUNDS):
        tile, h, token = _item(j, P)
        inside = (tile < count) & (token < P.batch)
        gate, up = _two_rows(base, place, count, j, P, P.gate_up)
        gate, up = gate.to(gl.float32), up.to(gl.float32)
        hidden = gate / (1.0 + gl.exp(-gate)) * up
        row = (first[0] + start + tile) * 8 + h
        _publish(words + token * P.d_ffn + row, hidden.to(gl.int32, bitcast=True) + 128, tag, inside)


@gluon.jit
def item_of(item, lengths, max_length, splits, part, P: gl.constexpr):
    """An item of attention: (token, group, split, first context token, end of the split, position, rows before it).

    ``rows before`` counts the [batch, kv_heads] rows of a cache that lie before the item's.
    """
    token = item // (P.groups * splits)
    group = item // splits % P.groups
    split = item % splits
    position = gl.minimum(gl.load(lengths + token).to(gl.int32), max_length - 1)
    first = split * part
    rows = (token * P.kv_heads + group // P.groups_per_kv_head).to(gl.int64)
    return token, group, split, first, gl.minimum(first + part, position + 1), position, rows


@gluon.jit
def load_cache_tokens(keys, values, first, end, position, P: gl.constexpr):
    """Loads the keys and values of 128 tokens into registers; see ``attention.load_cache``."""
    R: gl.constexpr = gl.BlockedLayout([1, 1, P.head_size // 2], [1, 32, 1], [P.warps, 1, 1], [2, 1, 0])
    KV: gl.constexpr = gl.distributed_type(gl.int32, [P.warps, 32, P.head_size // 2], R)
    outputs: gl.constexpr = "=&r," * (P.head_size // 2)
    return gl.inline_asm(
        load_cache(P), outputs + "l,l,r,r,r,~{memory}", [keys, values, first, end, position], KV, is_pure=False
    )


@gluon.jit
def stamp(trace, layer, place: gl.constexpr, P: gl.constexpr):
    """Writes down the time in cycles of this multiprocessor and in nanoseconds, if the plan says so."""
    if P.traced:
        at = trace + 2 * ((gl.program_id(0) * (P.layers + 1) + layer) * P.stamps + place)
        gl.inline_asm(_STAMP, "l,~{memory}", [at], (), is_pure=False)
