"""Inline PTX that multiplies 16 rows of ternary weights at a time with the quantised tokens.

The weights are 2 bits each: ``u = t + 1`` for a code ``t`` in {-1, 0, 1}. Masking bits ``2 j`` and ``2 j + 1`` of every
byte of a word leaves four unsigned bytes ``u 4^j``, so one logical instruction gives an operand register, and
``sum t x = sum u x - sum x``. The four ``j`` are summed apart and joined as ``64 c0 + 16 c1 + 4 c2 + c3``, which is 64
times the sum. All sums are 32-bit integers, and exact below 131,072 columns.

A tile is 16 rows. A *step* is 128 columns of a tile: 512 bytes, 16 for each lane of a warp. Lane ``(g, t)`` =
``(lane / 4, lane % 4)`` holds, of rows ``g`` and ``g + 8``, the 32 columns ``32 t ..``: word ``2 h + r`` has row
``g + 8 r``, and its bits ``8 b + 2 j`` the column ``32 t + 8 j + 4 h + b``. This is operand A of ``mma.m16n8k32`` with
the columns permuted in such a way that a lane's tokens are 32 neighbouring bytes.

The weights stand in shared memory, and so do the tokens of a small batch. Codes that programs share
(``plan.Phase.shared``) are read from the L2 cache.

Warps split K into ``groups`` and the tiles into the rest. Their partial sums meet in shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon

from sbn_kernels.decode.step.plan import COLUMNS, STEP, Phase, Plan
from sbn_kernels.decode.step.ptx import assembly, begin_anew_without, helper, wait_mbarrier

_MASKS = ("0x03030303", "0x0c0c0c0c", "0x30303030", "0xc0c0c0c0")
_PRELOADED = 96  # registers for a warp's share of the tokens, where several tiles use it
_AHEAD = 64  # registers for tokens that are loaded ahead of their use, where the codes are shared
_REGISTERS = (("c", "b"), ("d", "e"))  # sums and tokens of each group of 8 tokens


@helper
def _addresses(p: Plan, f: Phase, weights: str, xq: str, red: str) -> list[str]:
    """Registers: kg, rg this warp's place in K and among tiles, wa weights, xa tokens, ra partial sums."""
    lines = [
        ".reg .u32 tid, warp, lane, g, t, kg, rg, wa, xa, ra; .reg .b32 z, tmp; .reg .pred skip, p; mov.b32 z, 0;",
        "mov.u32 tid, %tid.x; shr.u32 warp, tid, 5; and.b32 lane, tid, 31; shr.u32 g, lane, 2; and.b32 t, lane, 3;",
        f"and.b32 kg, warp, {f.groups - 1}; shr.u32 rg, warp, {f.groups.bit_length() - 1};",
        f"mad.lo.u32 wa, kg, 512, {weights}; mad.lo.u32 wa, lane, 16, wa; mad.lo.u32 wa, rg, {f.tile_bytes}, wa;",
        f"mad.lo.u32 xa, t, 32, {'0' if f.shared else xq}; mad.lo.u32 xa, kg, 128, xa;",
        f"mad.lo.u32 ra, rg, {p.sums_bytes(f)}, {red};",
        f"mad.lo.u32 ra, kg, {4 if p.batch == 1 else 64 * p.sum_pitch}, ra;",
    ]
    if p.batch == 1:
        # Lane t = 0 writes row g, lane t = 1 row g + 8.
        return [*lines, f"mad.lo.u32 tmp, t, 8, g; mad.lo.u32 ra, tmp, {4 * f.groups}, ra;"]
    if not f.shared:
        lines += [f"and.b32 tmp, g, {p.batch_slots - 1}; mad.lo.u32 xa, tmp, {p.x_stride(f.columns)}, xa;"]
    # Row g, tokens 2 t and 2 t + 1.
    return [*lines, f"mad.lo.u32 ra, g, {4 * p.sum_pitch}, ra; mad.lo.u32 ra, t, 8, ra;"]


@helper
def _tokens(p: Plan, f: Phase, s: int, at: int) -> list[str]:
    """Loads a lane's 32 values of step ``s`` of this warp."""
    where = 128 * f.groups * s
    return [
        f"ld.shared.v4.b32 {{{','.join(f'b{at + 4 * h + r}' for r in range(4))}}}, [xa+{where + 16 * h}];"
        for h in range(2)
    ]


@helper
def _shared_addresses(p: Plan, f: Phase, codes: str) -> list[str]:
    """Registers xa0, xa1: where this lane's values of a token of each group stand in memory."""
    lines = [".reg .u64 " + ", ".join(f"xa{q}" for q in range(p.token_groups)) + ";"]
    for q in range(p.token_groups):
        # Columns beyond the batch multiply the last token again, and nobody reads their results.
        lines += [f"add.u32 tmp, g, {COLUMNS * q}; min.u32 tmp, tmp, {p.batch - 1};"]
        lines += [f"mad.lo.u32 tmp, tmp, {f.steps * STEP}, xa; cvt.u64.u32 xa{q}, tmp; add.u64 xa{q}, xa{q}, {codes};"]
    return lines


@helper
def _shared_tokens(p: Plan, f: Phase, s: int) -> list[str]:
    """Loads a lane's 32 values of step ``s`` of this warp for each group of tokens, from the L2 cache."""
    where = STEP * f.groups * s
    on, lines = "", []
    if (s + 1) * f.groups > f.steps:  # not every warp has a step left
        lines = [f"setp.lt.u32 p, kg, {f.steps - f.groups * s};"]
        lines += [f"mov.b32 {r}, 0;" for r in _step_registers(p, s)]
        on = "@p "
    return lines + [
        f"{on}ld.relaxed.gpu.global.v4.b32 {{{','.join(f'{b}{8 * s + 4 * h + r}' for r in range(4))}}}, "
        f"[xa{q}+{where + 16 * h}];"
        for q, (_, b) in enumerate(_REGISTERS[: p.token_groups])
        for h in range(2)
    ]


@helper
def _step_registers(p: Plan, s: int) -> list[str]:
    """The registers that :func:`_shared_tokens` loads."""
    return [f"{b}{8 * s + k}" for _, b in _REGISTERS[: p.token_groups] for k in range(8)]


@helper
def _multiply(p: Plan, where: int, at: int, first: bool) -> list[str]:
    """A step of one tile: 16 rows by 128 columns. The weights are unpacked once for all groups of tokens."""
    lines = [f"ld.shared.v4.b32 {{w0, w1, w2, w3}}, [wa+{where}];"]
    for j in range(4):
        lines += [f"and.b32 a{k}, w{k}, {_MASKS[j]};" for k in range(4)]
        if p.batch == 1:
            for r in range(2):
                lines += [
                    f"dp4a.u32.s32 c{j}_{r}, a{r}, b{at + 2 * j}, {'z' if first else f'c{j}_{r}'};",
                    f"dp4a.u32.s32 c{j}_{r}, a{2 + r}, b{at + 2 * j + 1}, c{j}_{r};",
                ]
        else:
            for sums, b in _REGISTERS[: p.token_groups]:
                c = "{" + ",".join(f"{sums}{j}_{k}" for k in range(4)) + "}"
                lines += [
                    f"mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {c}, {{a0,a1,a2,a3}}, "
                    f"{{{b}{at + 2 * j},{b}{at + 2 * j + 1}}}, {'{z,z,z,z}' if first else c};"
                ]
    return lines


@helper
def _partial_sums(p: Plan, f: Phase, where: int) -> list[str]:
    """Joins the four bit positions and writes a tile's partial sums, see ``Plan.sums_bytes``."""
    count = 2 if p.batch == 1 else 4
    lines = []
    for sums, _ in _REGISTERS[: p.token_groups]:
        for k in range(count):
            for j in (1, 2, 3):
                lines += [f"mad.lo.s32 {sums}0_{k}, {sums}0_{k}, 4, {sums}{j}_{k};"]
    if p.batch == 1:
        for k in range(2):
            for distance in (1, 2):
                lines += [f"shfl.sync.bfly.b32 tmp, c0_{k}, {distance}, 31, 0xffffffff; add.s32 c0_{k}, c0_{k}, tmp;"]
        lines += ["setp.eq.u32 p, t, 1; selp.b32 tmp, c0_1, c0_0, p; setp.lt.u32 p, t, 2;"]
        return [*lines, f"@p st.shared.b32 [ra+{where}], tmp;"]
    lines += [f"setp.lt.u32 p, t, {max(1, p.batch_slots // 2)};"]
    for q, (sums, _) in enumerate(_REGISTERS[: p.token_groups]):
        for half in range(2):  # rows g and g + 8
            at = where + 4 * (8 * p.sum_pitch * half + COLUMNS * q)
            lines += [f"@p st.shared.v2.b32 [ra+{at}], {{{sums}0_{2 * half}, {sums}0_{2 * half + 1}}};"]
    return lines


@gluon.constexpr_function
def multiply_tiles(p, f):
    """PTX: weights, number of tiles, xq, red, mbarrier, parity, flag, deadline -> 64 times the partial sums in red."""

    def asm(outs, ins):
        (weights,), (tiles,), (xq,), (red,), (barrier,), (parity,), (flag,), (deadline,) = ins
        tile_groups = p.warps // f.groups
        steps, mine = -(-f.steps // f.groups), -(-f.tiles // tile_groups)
        preload = mine > 1 and 8 * steps <= _PRELOADED
        lines = ["{", *_addresses(p, f, weights, xq, red)]
        lines += [".reg .b32 w<4>, a<4>;", *(f".reg .b32 c{j}_<4>;" for j in range(4))]
        lines += [f".reg .b32 b<{8 * (steps if preload else 1)}>;"]
        if preload:
            for s in range(steps):
                # Beyond the last step lie other values; no product uses them.
                lines += _tokens(p, f, s, 8 * s)
        lines += ["{", *wait_mbarrier(barrier, parity, flag, deadline), "}"]
        for i in range(mine):
            lines += [f"add.u32 tmp, rg, {tile_groups * i}; setp.ge.u32 skip, tmp, {tiles}; @skip bra END;"]
            for s in range(steps):
                if (s + 1) * f.groups > f.steps:  # not every warp has a step left
                    if s == 0:
                        lines += [f"mov.b32 c{j}_{k}, 0;" for j in range(4) for k in range(4)]
                    lines += [f"setp.ge.u32 skip, kg, {f.steps - f.groups * s}; @skip bra SUM{i};"]
                if not preload:
                    lines += _tokens(p, f, s, 0)
                where = f.tile_bytes * tile_groups * i + 512 * f.groups * s
                lines += _multiply(p, where, 8 * s if preload else 0, s == 0)
            lines += [f"SUM{i}:", *_partial_sums(p, f, p.sums_bytes(f) * tile_groups * i)]
        return "\n".join([*lines, "END:", "bar.sync 0;", "}"])

    return assembly(asm)


@gluon.constexpr_function
def multiply_shared(p, f):
    """PTX: the same as :func:`multiply_tiles`, with the address of the codes in memory for ``xq``.

    A warp needs the tokens' columns of its own place in K only. So the codes go from the L2 cache to registers and
    never stand in shared memory. Codes may still be on their way. So a warp looks at all of them once, after its first
    tile, and begins anew if one has not come: see ``ptx.EMPTY``.

    At the end warp 0 makes the emptying of older codes visible to the program: see ``shared.share_codes``. Warp 0 has
    read codes of every token in every shape; where K has few steps, later warps read none.
    """

    def asm(outs, ins):
        (weights,), (tiles,), (codes,), (red,), (barrier,), (parity,), (flag,), (deadline,) = ins
        tile_groups = p.warps // f.groups
        steps, mine = -(-f.steps // f.groups), -(-f.tiles // tile_groups)
        preload = mine > 1 and 8 * steps * p.token_groups <= _AHEAD
        lines = ["{", *_addresses(p, f, weights, "0", red), *_shared_addresses(p, f, codes)]
        lines += [".reg .b32 w<4>, a<4>, low<4>, count; mov.b32 count, 0;"]
        for sums, b in _REGISTERS[: p.token_groups]:
            lines += [f".reg .b32 {b}<{8 * steps}>;", *(f".reg .b32 {sums}{j}_<4>;" for j in range(4))]
        ahead = steps if preload else min(steps, max(1, _AHEAD // (8 * p.token_groups)))
        lines += ["AGAIN:", *(line for s in range(ahead) for line in _shared_tokens(p, f, s))]
        lines += ["{", *wait_mbarrier(barrier, parity, flag, deadline), "}"]
        lines += [f"mov.b32 low{k}, 0x7fffffff;" for k in range(4)]
        for i in range(mine):
            lines += [f"add.u32 tmp, rg, {tile_groups * i}; setp.ge.u32 skip, tmp, {tiles}; @skip bra END;"]
            if i and not preload:
                for s in range(ahead):
                    lines += _shared_tokens(p, f, s)
            for s in range(steps):
                if (s + 1) * f.groups > f.steps:  # not every warp has a step left
                    if s == 0:
                        lines += [
                            f"mov.b32 {sums}{j}_{k}, 0;"
                            for sums, _ in _REGISTERS[: p.token_groups]
                            for j in range(4)
                            for k in range(4)
                        ]
                    lines += [f"setp.ge.u32 skip, kg, {f.steps - f.groups * s}; @skip bra SUM{i};"]
                lines += _multiply(p, f.tile_bytes * tile_groups * i + 512 * f.groups * s, 8 * s, s == 0)
                if i == 0:
                    lines += [f"min.s32 low{k % 4}, low{k % 4}, {r};" for k, r in enumerate(_step_registers(p, s))]
                if s + ahead < steps:
                    lines += _shared_tokens(p, f, s + ahead)
            lines += [f"SUM{i}:", *_partial_sums(p, f, p.sums_bytes(f) * tile_groups * i)]
            if i == 0:
                lines += ["min.s32 low0, low0, low1; min.s32 low2, low2, low3; min.s32 low0, low0, low2;"]
                lines += begin_anew_without("low0", "count", "AGAIN", flag, deadline)
        lines += ["END:", "setp.ne.u32 p, warp, 0; @p bra LAST; fence.acq_rel.gpu;", "LAST:"]
        return "\n".join([*lines, "bar.sync 0;", "}"])

    return assembly(asm)


@helper
def _load_apart(register: str, address: str, count: int, name: str, stride: int) -> list[str]:
    """Adds up 1, 2, 4 or 8 integers in shared memory that lie ``stride`` bytes apart."""
    return [
        *(f"ld.shared.b32 {name}{k}, [{address}+{stride * k}];" for k in range(count)),
        f"mov.b32 {register}, {name}0;",
        *(f"add.s32 {register}, {register}, {name}{k};" for k in range(1, count)),
    ]


@helper
def _load_sum(register: str, address: str, count: int, name: str) -> list[str]:
    """Adds up 1, 2, 4 or 8 neighbouring integers in shared memory."""
    if count == 1:
        return [f"ld.shared.b32 {register}, [{address}];"]
    if count == 2:
        return [f"ld.shared.v2.b32 {{{name}0, {name}1}}, [{address}]; add.s32 {register}, {name}0, {name}1;"]
    loads = [
        f"ld.shared.v4.b32 {{{','.join(f'{name}{4 * q + k}' for k in range(4))}}}, [{address}+{16 * q}];"
        for q in range(count // 4)
    ]
    return [
        *loads,
        f"add.s32 {register}, {name}0, {name}1;",
        *(f"add.s32 {register}, {register}, {name}{k};" for k in range(2, count)),
    ]


@gluon.constexpr_function
def gather_sums(p, f):
    """PTX: addresses of a row's partial sums and row data, statistics, token -> sums, scales, biases of two rows.

    Results: the exact integer products of rows h and h + 8 of a tile with a token, their scales, their biases, and the
    token's scale. Addresses and token are a thread's own.
    """

    def asm(outs, ins):
        (i0,), (i1,), (g0,), (g1,), (b0,), (b1,), (s,) = outs
        (sums,), (rows,), (statistics,), (token,) = ins
        eight = 32 * (f.groups if p.batch == 1 else p.sum_pitch)
        lines = ["{", ".reg .b32 t<8>, u<8>, v<8>, total; .reg .u32 a;"]
        lines += [f"ld.shared.v4.f32 {{{g0}, {g1}, {b0}, {b1}}}, [{rows}];"]
        if f.shared:
            lines += [f"mad.lo.u32 a, {token}, 8, {statistics}; ld.shared.v2.b32 {{total, t0}}, [a]; mov.b32 {s}, t0;"]
        else:
            lines += [f"mad.lo.u32 a, {token}, 4, {statistics}; ld.shared.f32 {s}, [a+96];"]
            lines += [f"mad.lo.u32 a, {token}, {4 * p.warps_per_token}, {statistics}; add.u32 a, a, 64;"]
            lines += _load_sum("total", "a", p.warps_per_token, "t")
        lines += [f"add.u32 a, {sums}, {eight};"]
        if p.batch == 1:
            lines += _load_sum(i0, sums, f.groups, "u") + _load_sum(i1, "a", f.groups, "v")
        else:
            lines += _load_apart(i0, sums, f.groups, "u", 64 * p.sum_pitch)
            lines += _load_apart(i1, "a", f.groups, "v", 64 * p.sum_pitch)
        lines += [f"shr.s32 {i}, {i}, 6; sub.s32 {i}, {i}, total;" for i in (i0, i1)]
        return "\n".join([*lines, "}"])

    return assembly(asm)


@helper
def _fetch(thread: int, last_barrier: int) -> str:
    return "\n".join([
        "{",
        ".reg .pred p; .reg .u32 off, bytes, at, after, b; .reg .u64 a; .reg .b64 s;",
        "mov.u32 $0, $1;",
        f"mov.u32 b, %tid.x; setp.ne.u32 p, b, {thread}; @p bra DONE;",
        "AGAIN:",
        "mad.lo.u32 b, $0, 16, $2; ld.shared.v4.u32 {off, bytes, at, after}, [b];",
        "setp.gt.s32 p, after, $3; @p bra DONE;",
        f"and.b32 b, $0, {last_barrier}; mad.lo.u32 b, b, 8, $4; add.u32 off, off, $5; mad.wide.u32 a, at, 16, $6;",
        "mbarrier.arrive.expect_tx.shared::cta.b64 s, [b], bytes;",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [off], [a], bytes, [b];",
        "add.u32 $0, $0, 1; bra AGAIN;",
        "DONE:",
        "}",
    ])  # fmt: skip


@gluon.constexpr_function
def fetch_weights(p):
    """PTX: next, schedule, last unit used, mbarriers, ring, weights -> next.

    One thread starts the copies of all units that the schedule allows once that unit has been used by all.
    """
    return _fetch(32 * (p.warps - 1), p.barriers - 1)
