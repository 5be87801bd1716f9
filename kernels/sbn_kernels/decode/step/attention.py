"""Inline PTX for attention of one new token to the cache of one key/value head, split over the context.

A program takes a *group*, up to 8 query heads that share a key/value head, and a range of tokens, a *part* of the
context. A warp takes 16 tokens at a time: scores by ``mma.m16n8k16`` (rows: query heads; half of the rows stay empty),
an online softmax in registers, then the weighted sum of the values. Keys and values go from memory to registers in the
order in which the instruction wants them, with head features permuted so that every load has 16 bytes; they never touch
shared memory. Loads of the first tokens do not need the query, so the kernel starts them a phase ahead.

The new token's key and value come with the query, as words, and replace what was loaded for its place.

Lane ``(g, t) = (lane / 4, lane % 4)``. Key register ``E/8 n + 4 i + r``: token ``8 n + g``, features
``32 i + 8 t + 2 r`` and the next. Value register ``E/16 a + 4 f + r``: token ``(2 t, 2 t + 1, 2 t + 8, 2 t + 9)[a]``,
features ``64 f + 8 g + 2 r`` and the next. Result register ``16 f + i``: head ``g``, feature ``64 f + 16 t + i``.

Shared memory, in bytes: rows of bfloat16 (8 query heads, the new key, the new value), maxima and sums by warp and head
at ``STATISTICS``, results by warp and head at ``RESULTS``.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sbn_kernels.decode.step.plan import MERGE_SPLITS, RESULTS, STATISTICS, Plan
from sbn_kernels.decode.step.ptx import VALUE, assembly, f32, helper, pair_store, poll_pairs, poll_words

_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
_LANES = [
    ".reg .u32 tid, warp, lane, g, t; .reg .pred p;",
    "mov.u32 tid, %tid.x; shr.u32 warp, tid, 5; and.b32 lane, tid, 31; shr.u32 g, lane, 2; and.b32 t, lane, 3;",
]
_NOTHING = -1e30  # maximum of no scores


@gluon.constexpr_function
def load_cache(p):
    """PTX: keys and values of a head, first token, end, position -> E/2 registers for this warp's 16 tokens.

    Registers are left as they are if no token lies before ``end``, and are 0 for tokens from ``position`` on.
    """

    def asm(outs, ins):
        (kv,) = outs
        (keys,), (values,), (first,), (end,), (position,) = ins
        e = p.head_size
        lines = ["{", *_LANES, ".reg .u32 base, tok, off; .reg .u64 a;", f"mad.lo.u32 base, warp, 16, {first};"]
        lines += [f"setp.ge.u32 p, base, {end}; @p bra NONE;"]
        lines += [f"mov.b32 {r}, 0;" for r in kv]
        for n in range(2):
            lines += [f"add.u32 tok, base, g; add.u32 tok, tok, {8 * n}; setp.lt.u32 p, tok, {position};"]
            lines += [
                f"shl.b32 off, t, 4; mad.lo.u32 off, tok, {2 * e}, off; cvt.u64.u32 a, off; add.u64 a, a, {keys};"
            ]
            for i in range(e // 32):
                at = e // 8 * n + 4 * i
                lines += [f"@p ld.global.v4.b32 {{{','.join(kv[at : at + 4])}}}, [a+{64 * i}];"]
        for q in range(4):
            lines += [
                f"mad.lo.u32 tok, t, 2, base; add.u32 tok, tok, {(0, 1, 8, 9)[q]}; setp.lt.u32 p, tok, {position};"
            ]
            lines += [
                f"shl.b32 off, g, 4; mad.lo.u32 off, tok, {2 * e}, off; cvt.u64.u32 a, off; add.u64 a, a, {values};"
            ]
            for f in range(e // 64):
                at = e // 4 + e // 16 * q + 4 * f
                lines += [f"@p ld.global.v4.b32 {{{','.join(kv[at : at + 4])}}}, [a+{128 * f}];"]
        return "\n".join([*lines, "NONE:", "}"])

    return assembly(asm)


@gluon.constexpr_function
def fetch_query(p):
    """PTX: words of the token's q, k, v; key/value head; first query head; tag; shared memory; flag; deadline."""

    def asm(outs, ins):
        (words,), (kv_head,), (head,), (tag,), (sm,), (flag,), (deadline,) = ins
        quarter = p.head_size // 4  # lanes that share a head
        total = (p.group + 2) * quarter
        rounds = -(-total // (32 * p.warps))
        lines = ["{", *_LANES, ".reg .u32 n, row, part, src; .reg .b32 lo, hi;"]
        groups = []
        for c in range(rounds):
            lines += [f".reg .pred in{c}, new{c}; .reg .u64 a{c}; .reg .u32 to{c}; .reg .b32 w{c}_<4>;"]
            lines += [f"add.u32 n, tid, {32 * p.warps * c}; setp.lt.u32 in{c}, n, {total};"]
            lines += [f"shr.u32 row, n, {quarter.bit_length() - 1}; and.b32 part, n, {quarter - 1};"]
            lines += [f"setp.ge.u32 new{c}, row, {p.group}; add.u32 src, row, {head};"]
            # Rows of words: query heads, key heads, value heads. The new key goes to row 8, the new value to row 9.
            lines += [f"@new{c} sub.u32 row, row, {p.group}; @new{c} mad.lo.u32 src, row, {p.kv_heads}, {kv_head};"]
            lines += [f"@new{c} add.u32 src, src, {p.heads}; @new{c} add.u32 row, row, 8;"]
            lines += [f"mad.lo.u32 src, src, {4 * p.head_size}, 0; mad.lo.u32 src, part, 16, src;"]
            lines += [f"cvt.u64.u32 a{c}, src; add.u64 a{c}, a{c}, {words};"]
            lines += [f"mad.lo.u32 to{c}, row, {2 * p.head_size}, {sm}; mad.lo.u32 to{c}, part, 8, to{c};"]
            groups.append((f"a{c}", f"in{c}", [f"w{c}_{k}" for k in range(4)]))
        lines += poll_words(groups, tag, flag, deadline)
        for c in range(rounds):
            w = [f"w{c}_{k}" for k in range(4)]
            lines += [f"prmt.b32 lo, {w[0]}, {w[1]}, 0x7632; prmt.b32 hi, {w[2]}, {w[3]}, 0x7632;"]
            lines += [f"@in{c} st.shared.v2.b32 [to{c}], {{lo, hi}};"]
        return "\n".join([*lines, "bar.sync 0;", "}"])

    return assembly(asm)


PREFETCH = gl.constexpr("""{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
setp.ne.and.u32 p, $1, 0, p;
@p cp.async.bulk.prefetch.L2.global [$0], $1; }""")


@gluon.constexpr_function
def state_constraints(p):
    """Constraints of :func:`attend`: maximum, sum and results are read and written in place."""
    state = 2 + p.head_size // 4
    return ",".join(["=f"] * state + [str(i) for i in range(state)] + ["r"] * (p.head_size // 2 + 4) + ["~{memory}"])


@gluon.constexpr_function
def attend(p):
    """PTX: state (maximum, sum, results), keys and values, first token, end, new token's position, memory -> state."""

    def asm(outs, ins):
        (m,), (total,), o = outs
        kv, (first,), (end,), (position,), (sm,) = ins[3:]
        e = p.head_size
        lines = ["{", *_LANES, ".reg .u32 base, tok, sa, qa; .reg .b32 z; .reg .pred has; mov.b32 z, 0;"]
        lines += [f"mad.lo.u32 base, warp, 16, {first}; setp.ge.u32 p, base, {end}; @p bra NONE;"]
        lines += [f"mad.lo.u32 sa, t, 16, {sm}; mad.lo.u32 qa, g, {2 * e}, sa; setp.lt.u32 has, g, {p.group};"]
        for i in range(e // 32):
            lines += [f".reg .b32 q{i}_<4>;", *(f"mov.b32 q{i}_{r}, 0;" for r in range(4))]
            lines += [f"@has ld.shared.v4.b32 {{q{i}_0,q{i}_1,q{i}_2,q{i}_3}}, [qa+{64 * i}];"]
        lines += [f".reg .b32 k<{e // 4}>, v<{e // 4}>;"]
        lines += [f"mov.b32 k{i}, {kv[i]}; mov.b32 v{i}, {kv[e // 4 + i]};" for i in range(e // 4)]
        for n in range(2):
            lines += [f"add.u32 tok, base, g; add.u32 tok, tok, {8 * n}; setp.eq.u32 p, tok, {position};"]
            for i in range(e // 32):
                regs = ",".join(f"k{e // 8 * n + 4 * i + r}" for r in range(4))
                lines += [f"@p ld.shared.v4.b32 {{{regs}}}, [sa+{16 * e + 64 * i}];"]
        lines += [f"mad.lo.u32 sa, g, 16, {sm};"]
        for q in range(4):
            lines += [
                f"mad.lo.u32 tok, t, 2, base; add.u32 tok, tok, {(0, 1, 8, 9)[q]}; setp.eq.u32 p, tok, {position};"
            ]
            for f in range(e // 64):
                regs = ",".join(f"v{e // 16 * q + 4 * f + r}" for r in range(4))
                lines += [f"@p ld.shared.v4.b32 {{{regs}}}, [sa+{18 * e + 128 * f}];"]
        lines += [".reg .f32 s<4>, u<4>, s1_<4>, u1_<4>, x, top, alpha, sum, zf; mov.f32 zf, 0f00000000;"]
        lines += [f"mov.f32 s{k}, zf; mov.f32 u{k}, zf; mov.f32 s1_{k}, zf; mov.f32 u1_{k}, zf;" for k in range(4)]
        for i in range(e // 32):
            for j in (0, 2):
                # Two chains for each 8 tokens: an instruction waits for the one that it adds to.
                for n, c in ((0, ("s", "s1_")[j // 2]), (1, ("u", "u1_")[j // 2])):
                    d = "{" + ",".join(f"{c}{k}" for k in range(4)) + "}"
                    at = e // 8 * n + 4 * i + j
                    lines += [f"{_MMA} {d}, {{q{i}_{j},z,q{i}_{j + 1},z}}, {{k{at},k{at + 1}}}, {d};"]
        scale = f32(math.log2(math.e) / math.sqrt(e))
        lines += ["add.f32 s0, s0, s1_0; add.f32 s1, s1, s1_1; add.f32 s2, u0, u1_0; add.f32 s3, u1, u1_1;"]
        lines += [*(f"mul.f32 s{k}, s{k}, {scale};" for k in range(4))]
        for k, off in enumerate((0, 1, 8, 9)):
            lines += [f"mad.lo.u32 tok, t, 2, base; add.u32 tok, tok, {off}; setp.gt.u32 p, tok, {position};"]
            lines += [f"@p mov.f32 s{k}, {f32(_NOTHING)};"]
        lines += ["max.f32 top, s0, s1; max.f32 top, top, s2; max.f32 top, top, s3;"]
        for distance in (1, 2):
            lines += [f"shfl.sync.bfly.b32 x, top, {distance}, 31, 0xffffffff; max.f32 top, top, x;"]
        lines += [f"max.f32 top, top, {m}; sub.f32 alpha, {m}, top; ex2.approx.f32 alpha, alpha; mov.f32 {m}, top;"]
        lines += ["mov.f32 sum, zf;"]
        lines += [f"sub.f32 s{k}, s{k}, top; ex2.approx.f32 s{k}, s{k}; add.f32 sum, sum, s{k};" for k in range(4)]
        for distance in (1, 2):
            lines += [f"shfl.sync.bfly.b32 x, sum, {distance}, 31, 0xffffffff; add.f32 sum, sum, x;"]
        lines += [f"fma.rn.f32 {total}, {total}, alpha, sum;"]
        lines += [f"mul.f32 {r}, {r}, alpha;" for r in o]
        lines += [
            ".reg .b32 p0, p1, b0, b1; .reg .f32 d2, d3; cvt.rn.bf16x2.f32 p0, s1, s0; cvt.rn.bf16x2.f32 p1, s3, s2;"
        ]
        for f in range(e // 64):
            for i in range(8):
                select = ("0x5410", "0x7632")[i % 2]
                v = [f"v{e // 16 * q + 4 * f + i // 2}" for q in range(4)]
                lines += [f"prmt.b32 b0, {v[0]}, {v[1]}, {select}; prmt.b32 b1, {v[2]}, {v[3]}, {select};"]
                c0, c1 = o[16 * f + i], o[16 * f + 8 + i]
                lines += [f"{_MMA} {{{c0},{c1},d2,d3}}, {{p0,z,p1,z}}, {{b0,b1}}, {{{c0},{c1},zf,zf}};"]
        return "\n".join([*lines, "NONE:", "}"])

    return assembly(asm)


@helper
def _join_warps(p: Plan, entries: int, stride: int) -> list[str]:
    """Weights of ``entries`` partial results, maxima at [ca + stride i] -> M, L, e{i}: their factors."""
    lines = [f".reg .f32 M, L, e<{entries}>, n<{entries}>;"]
    lines += [f"ld.shared.v2.f32 {{e{i}, n{i}}}, [ca+{stride * i}];" for i in range(entries)]
    lines += ["mov.f32 M, e0;", *(f"max.f32 M, M, e{i};" for i in range(1, entries)), "mov.f32 L, 0f00000000;"]
    for i in range(entries):
        lines += [f"sub.f32 e{i}, e{i}, M; ex2.approx.f32 e{i}, e{i}; fma.rn.f32 L, e{i}, n{i}, L;"]
    return lines


@helper
def _hand_over(
    p: Plan, first: str, second: str, pair: str, start: str, words: str, statistics: str, filled: str
) -> list[str]:
    """Hands two neighbouring results over in words; the thread with the head's first pair adds maximum and sum.

    Args:
        p: The plan.
        first: Register of the first result; ``second`` of the other.
        second: See ``first``.
        pair: Register with the number of the pair, counted from ``words``.
        start: Predicate: the pair is its head's first; ``hd`` is that head's number, counted from ``statistics``.
        words: Address.
        statistics: Address.
        filled: Register with the number of parts that are written elsewhere or here. The others get empty words, so
            that all words have this layer's tag in every layer. An old tag could come round again.

    Uses the registers M, L, c0, c1, tag, epo, a, and the predicate unused.
    """
    part_words = 4 * p.batch * p.d_attention
    lines = [
        f"mov.b32 c0, {first}; mov.b32 c1, {second}; add.u32 c0, c0, 128; add.u32 c1, c1, 128;",
        f"and.b32 c0, c0, {VALUE}; or.b32 c0, c0, tag; and.b32 c1, c1, {VALUE}; or.b32 c1, c1, tag;",
        f"mad.wide.u32 a, {pair}, 8, {words};",
    ]
    lines += ["st.relaxed.gpu.global.v2.b32 [a], {c0, c1};"]
    if p.direct_parts == 1:
        return lines
    for i in range(1, p.direct_parts):
        lines += [f"setp.le.u32 unused, {filled}, {i};"]
        lines += [f"@unused st.relaxed.gpu.global.v2.b32 [a+{part_words * i}], {{tag, tag}};"]
    lines += [f"mad.wide.u32 a, hd, 16, {statistics}; mov.b32 c0, M; mov.b32 c1, L;"]
    return [*lines, *pair_store("a", "c0", "c1", "epo", start)]


@gluon.constexpr_function
def finish_attention(p):
    """PTX: maximum, sum, results, shared memory, epoch, two numbers of parts, addresses of the group's first head.

    The numbers are that of all parts, and ``filled`` of :func:`_hand_over`. The addresses are: pairs and statistics of
    this part, for :func:`merge_parts`, which come into use from ``direct_parts + 1`` parts on; and words and statistics
    of this part for readers that join the parts themselves.
    """

    def asm(outs, ins):
        (m,), (total,), o, (sm,), (epoch,), (count,), (filled,), (part,), (part_m,), (words,), (statistics,) = ins
        e, row = p.head_size, 4 * p.result_words
        lines = ["{", *_LANES, ".reg .u32 oa, ca, cb, n, hd, pr; .reg .b32 tag, epo; .reg .u64 a;"]
        lines += [".reg .pred has, few, start, unused;"]
        lines += [
            f"setp.le.u32 few, {count}, {p.direct_parts};",
            f"and.b32 tag, {epoch}, 255; mov.b32 epo, {epoch};",
        ]
        lines += [f"setp.lt.u32 has, g, {p.group}; mad.lo.u32 oa, warp, {p.group}, g; mad.lo.u32 oa, oa, {row}, {sm};"]
        lines += [f"mad.lo.u32 oa, t, 64, oa; mad.lo.u32 ca, warp, 8, g; mad.lo.u32 ca, ca, 8, {sm};"]
        for f in range(e // 64):
            for q in range(4):
                regs = ",".join(o[16 * f + 4 * q : 16 * f + 4 * q + 4])
                lines += [f"@has st.shared.v4.f32 [oa+{RESULTS + 256 * f + 16 * q}], {{{regs}}};"]
        lines += [f"setp.eq.and.u32 p, t, 0, has; @p st.shared.v2.f32 [ca+{STATISTICS}], {{{m}, {total}}}; bar.sync 0;"]
        total_pairs = p.group * e // 2
        for c in range(-(-total_pairs // (32 * p.warps))):
            lines += ["{", f"add.u32 n, tid, {32 * p.warps * c}; setp.ge.u32 p, n, {total_pairs}; @p bra END{c};"]
            lines += [f"shr.u32 hd, n, {(e // 2).bit_length() - 1}; and.b32 pr, n, {e // 2 - 1};"]
            lines += [f"mad.lo.u32 ca, hd, 8, {sm}; mad.lo.u32 cb, hd, {row}, {sm}; mad.lo.u32 cb, pr, 8, cb;"]
            lines += [f"add.u32 ca, ca, {STATISTICS}; setp.eq.u32 start, pr, 0;", *_join_warps(p, p.warps, 64)]
            lines += [".reg .f32 f0, f1, x0, x1; .reg .b32 c0, c1; mov.f32 f0, 0f00000000; mov.f32 f1, f0;"]
            for i in range(p.warps):
                lines += [f"ld.shared.v2.f32 {{x0, x1}}, [cb+{RESULTS + p.group * row * i}];"]
                lines += [f"fma.rn.f32 f0, e{i}, x0, f0; fma.rn.f32 f1, e{i}, x1, f1;"]
            # No token in this part: the sum is 0 and the results are 0, which must not become a NaN.
            lines += [f"max.f32 x0, L, {f32(1e-30)}; rcp.approx.f32 x0, x0; mul.f32 f0, f0, x0; mul.f32 f1, f1, x0;"]
            lines += [f"@!few bra PART{c};", *_hand_over(p, "f0", "f1", "n", "start", words, statistics, filled)]
            lines += [f"bra END{c};", f"PART{c}:"]
            lines += [
                f"mad.wide.u32 a, n, 16, {part}; mov.b32 c0, f0; mov.b32 c1, f1;",
                *pair_store("a", "c0", "c1", "epo"),
            ]
            lines += [f"mad.wide.u32 a, hd, 16, {part_m}; mov.b32 c0, M; mov.b32 c1, L;"]
            lines += [*pair_store("a", "c0", "c1", "epo", "start"), f"END{c}:", "}"]
        return "\n".join([*lines, "bar.sync 0;", "}"])

    return assembly(asm)


@gluon.constexpr_function
def merge_parts(p):
    """PTX that joins the parts of one head.

    Inputs: parts and statistics of the head, their count, epoch, shared memory, flag, deadline, and the addresses of
    the result's words and statistics. ``E / 4`` lanes read a part; a lane reads all of its parts at once.
    """

    def asm(outs, ins):
        (parts,), (statistics,), (count,), (epoch,), (sm,), (flag,), (deadline,), (words,), (result_m,) = ins
        e = p.head_size
        lanes = e // 4
        readers = 32 * p.warps // lanes  # parts read at a time
        rounds = -(-MERGE_SPLITS // readers)
        part_bytes, statistics_bytes = 8 * p.batch * p.d_attention, 16 * p.batch * p.heads
        lines = ["{", *_LANES, ".reg .u32 sub, d, i, ca, cb, hd; .reg .u64 a, b;"]
        lines += [f".reg .b32 tag, epo; .reg .pred start, unused; and.b32 tag, {epoch}, 255; mov.b32 epo, {epoch};"]
        lines += [f"shr.u32 sub, tid, {lanes.bit_length() - 1}; and.b32 d, tid, {lanes - 1};"]
        lines += [f"mad.wide.u32 a, sub, {part_bytes}, {parts}; mad.wide.u32 a, d, 32, a;"]
        lines += [f"mad.wide.u32 b, sub, {statistics_bytes}, {statistics};"]
        groups = []
        for c in range(rounds):
            lines += [f".reg .pred in{c}; .reg .b32 o{c}_<8>, m{c}_<4>; add.u32 i, sub, {readers * c};"]
            lines += [f"setp.lt.u32 in{c}, i, {count};", *(f"mov.b32 o{c}_{k}, 0;" for k in (0, 2, 4, 6))]
            lines += [f"mov.b32 m{c}_0, {f32(_NOTHING)}; mov.b32 m{c}_2, 0;"]
            for q in range(2):
                regs = [f"o{c}_{4 * q + k}" for k in range(4)]
                groups.append((f"a+{part_bytes * readers * c + 16 * q}", f"in{c}", regs))
            groups.append((f"b+{statistics_bytes * readers * c}", f"in{c}", [f"m{c}_{k}" for k in range(4)]))
        lines += poll_pairs(groups, epoch, flag, deadline)
        lines += [".reg .f32 top, w, x, sum, f<4>; mov.b32 top, m0_0; mov.f32 sum, 0f00000000;"]
        lines += [f"mov.b32 x, m{c}_0; max.f32 top, top, x;" for c in range(1, rounds)]
        lines += [f"mov.f32 f{k}, sum;" for k in range(4)]
        for c in range(rounds):
            lines += [f"mov.b32 w, m{c}_0; sub.f32 w, w, top; ex2.approx.f32 w, w; mov.b32 x, m{c}_2; mul.f32 w, w, x;"]
            lines += ["add.f32 sum, sum, w;"]
            lines += [f"mov.b32 x, o{c}_{2 * k}; fma.rn.f32 f{k}, w, x, f{k};" for k in range(4)]
        lines += [
            f"mad.lo.u32 ca, sub, 8, {sm}; mad.lo.u32 cb, sub, {4 * p.result_words}, {sm}; mad.lo.u32 cb, d, 16, cb;"
        ]
        lines += ["bar.sync 0;", f"st.shared.v4.f32 [cb+{RESULTS}], {{f0, f1, f2, f3}};"]
        lines += [f"setp.eq.u32 p, d, 0; @p st.shared.v2.f32 [ca+{STATISTICS}], {{top, sum}}; bar.sync 0;"]
        # As after attention itself, but the sums are in the results already: the factors are 2^(m - M).
        lines += [f"setp.ge.u32 p, tid, {e // 2}; @p bra END;", f"add.u32 ca, {sm}, {STATISTICS};"]
        lines += [f"mad.lo.u32 cb, tid, 8, {sm};", *_join_warps(p, readers, 8)]
        lines += [".reg .f32 f5, f6, x0, x1; .reg .b32 c0, c1; mov.f32 f5, 0f00000000; mov.f32 f6, f5;"]
        for i in range(readers):
            lines += [f"ld.shared.v2.f32 {{x0, x1}}, [cb+{RESULTS + 4 * p.result_words * i}];"]
            lines += [f"fma.rn.f32 f5, e{i}, x0, f5; fma.rn.f32 f6, e{i}, x1, f6;"]
        lines += ["rcp.approx.f32 x0, L; mul.f32 f5, f5, x0; mul.f32 f6, f6, x0; mov.b32 hd, 0;"]
        lines += ["setp.eq.u32 start, tid, 0;"]
        lines += _hand_over(p, "f5", "f6", "tid", "start", words, result_m, "1")
        lines += ["END:", "bar.sync 0;", "}"]
        return "\n".join(lines)

    return assembly(asm)
