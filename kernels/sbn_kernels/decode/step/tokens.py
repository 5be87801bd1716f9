"""Inline PTX that reads a token's vector as it arrives, normalises and quantises it into shared memory.

Every multiprocessor quantises every vector that it needs, although the others do the same work. Reading and quantising
6 KB takes less time than one more exchange between multiprocessors. ``warps_per_token`` warps work on a token: 8 where
there is one token, 1 where there are eight. A thread holds *chunks* of four neighbouring values.

The kernel computes as the model does under bfloat16 autocast. RMSNorm: ``n = bf16(weight * (rstd * x))``, sums in
float32. Quantisation: ``s = max(max|n|, 1e-5) / 127`` and ``round(n / s)`` with IEEE division, halves to even. One
reduction serves both: ``max|n|`` is taken to be ``bf16(rstd * max|weight * x|)``. Rounding is monotonic, so this is the
maximum itself, except where a boundary of bfloat16 lies within a last bit of float32 of it (one vector in about 10^4).

Registers of the PTX below: ``x{c}_k`` value k of chunk c, ``g{c}_k`` two weights of the norm, ``am`` the bits of the
largest magnitude, ``ss`` the sum of squares, ``s`` the scale, ``ns`` its negative, ``inv`` its reciprocal, ``total``
the sum of this thread's codes.
"""

from __future__ import annotations

from collections.abc import Sequence

from triton.experimental import gluon

from sbn_kernels.decode.step.plan import Plan
from sbn_kernels.decode.step.ptx import (
    BF16_HIGH,
    VALUE,
    add_across,
    assembly,
    exact_quotient,
    f32,
    helper,
    poll_words,
    read_pairs,
)

_KEPT = 40  # chunks that a thread keeps in registers; a longer vector is read twice, the second time from L2
AT_ONCE = 16  # chunks that a thread polls together
_PARTS_AT_ONCE = 12  # the same for parts of attention, over all of a thread's chunks


@helper
def threads(p: Plan) -> list[str]:
    """tid, warp, lane, the token of this thread, and its number ``lt`` among the token's threads."""
    wpt = p.warps_per_token
    return [
        ".reg .u32 tid, warp, lane, token, lt; .reg .pred act;",
        "mov.u32 tid, %tid.x; shr.u32 warp, tid, 5; and.b32 lane, tid, 31;",
        f"shr.u32 token, warp, {wpt.bit_length() - 1}; and.b32 lt, tid, {32 * wpt - 1};",
        f"setp.lt.u32 act, token, {p.batch};",
        ".reg .b32 am, mb, q0, q1, q2, q3, h0, h1, total; .reg .f32 ss, q, e;",
        ".reg .u32 xw; .reg .u64 src; .reg .pred in;",
        "mov.b32 am, 0; mov.b32 total, 0; mov.f32 ss, 0f00000000;",
    ]


@helper
def chunks(p: Plan, values: int) -> tuple[list[str], list[str | None]]:
    """PTX that sets the predicates of a thread's chunks, and the predicates (None: always)."""
    step = 128 * p.warps_per_token
    lines: list[str] = []
    predicates: list[str | None] = []
    for c in range(-(-values // step)):
        if values >= step * (c + 1):
            predicates.append(None if p.batch == p.batch_slots else "act")
        else:
            lines.append(f".reg .pred in{c}; setp.lt.and.u32 in{c}, lt, {(values - step * c) // 4}, act;")
            predicates.append(f"in{c}")
    return lines, predicates


@helper
def norm_weights(p: Plan, gains: Sequence[str], count: int) -> list[str]:
    """The norm's weights of every chunk, two bfloat16 a register."""
    lines = [".reg .b32 gb; .reg .f32 gl, t0, t1;"]
    for c in range(count):
        lines += [f".reg .b32 g{c}_<2>; mov.b32 g{c}_0, {gains[2 * c]}; mov.b32 g{c}_1, {gains[2 * c + 1]};"]
    return lines


@gluon.constexpr_function
def load_norm(p):
    """PTX: weights of a norm -> this thread's, two registers a chunk; zeros beyond the vector.

    Loaded a phase ahead of their use: they come from memory, and a thread's loads may return in order, so a poll behind
    them would wait for them.
    """

    def asm(outs, ins):
        (regs,) = outs
        ((norm,),) = ins
        inside, predicates = chunks(p, p.d_model)
        lines = ["{", *threads(p), *inside, ".reg .u64 ga;", f"mad.wide.u32 ga, lt, 8, {norm};"]
        lines += [f"mov.b32 {r}, 0;" for r in regs]
        for c, predicate in enumerate(predicates):
            on = f"@{predicate} " if predicate else ""
            where = 256 * p.warps_per_token * c
            lines += [f"{on}ld.global.nc.v2.b32 {{{regs[2 * c]}, {regs[2 * c + 1]}}}, [ga+{where}];"]
        return "\n".join([*lines, "}"])

    return assembly(asm)


@helper
def half_of(target: str, pair: str, k: int) -> str:
    """bfloat16 number ``k`` of the register ``pair`` as float32."""
    return f"{f'shl.b32 gb, {pair}, 16;' if k == 0 else f'and.b32 gb, {pair}, {BF16_HIGH};'} mov.b32 {target}, gb;"


@helper
def largest(at: int, norm: bool) -> list[str]:
    """Updates ``am``, and with a norm ``ss``, with a chunk's values."""
    lines = []
    for k in range(4):
        x = f"x{at}_{k}"
        if norm:
            lines += [half_of("gl", f"g{at}_{k // 2}", k % 2)]
            lines += [f"fma.rn.f32 ss, {x}, {x}, ss; mul.rn.f32 t0, {x}, gl; mov.b32 mb, t0;"]
        else:
            lines += [f"mov.b32 mb, {x};"]
        lines += ["and.b32 mb, mb, 0x7fffffff; max.u32 am, am, mb;"]
    return lines


@helper
def reduce_token(p: Plan, red: str, square_sum: bool) -> list[str]:
    """Maximum of ``am`` and sum of ``ss`` over the warps of a token, with one barrier."""
    wpt = p.warps_per_token
    lines = [".reg .u32 ra, rl; .reg .f32 rs; .reg .b32 rb; .reg .pred first;"]
    lines += ["redux.sync.max.u32 am, am, 0xffffffff; setp.eq.u32 first, lane, 0;"]
    if square_sum:
        lines += add_across("ss", "rs", (16, 8, 4, 2, 1))
    if wpt == 1:
        return lines
    lines += [f"mad.lo.u32 ra, warp, 8, {red}; mov.b32 rb, ss; @first st.shared.v2.b32 [ra], {{am, rb}}; bar.sync 0;"]
    lines += [f"and.b32 rl, lane, {wpt - 1}; mad.lo.u32 rl, token, {wpt}, rl; mad.lo.u32 ra, rl, 8, {red};"]
    lines += ["ld.shared.v2.b32 {am, rb}, [ra]; redux.sync.max.u32 am, am, 0xffffffff;"]
    if square_sum:
        lines += ["mov.b32 ss, rb;", *add_across("ss", "rs", [d for d in (4, 2, 1) if d < wpt])]
    return lines


@helper
def rstd(p: Plan, values: int) -> list[str]:
    """ss -> ``rstd``, one over the root of the mean square."""
    return [
        ".reg .f32 rstd;",
        f"fma.rn.f32 ss, ss, {f32(1.0 / values)}, {f32(p.eps)}; rsqrt.approx.f32 rstd, ss;",
    ]


@helper
def scale(norm: bool) -> list[str]:
    """am -> the scale, its negative and its reciprocal."""
    lines = [".reg .f32 s, ns, inv, top;", "mov.b32 top, am;"]
    if norm:
        lines += [f"mul.rn.f32 top, top, rstd; cvt.rn.bf16x2.f32 am, top, top; and.b32 am, am, {BF16_HIGH};"]
    # Compared as bits, where a NaN is the largest.
    lines += ["max.u32 am, am, 0x3727C5AC; mov.b32 top, am;"]
    lines += exact_quotient("s", "top", f32(-127.0), f32(1 / 127), "inv")
    return [*lines, "rcp.rn.f32 inv, s; neg.f32 ns, s;"]


@helper
def _normalise(at: int) -> list[str]:
    """A chunk's values -> four bfloat16 results in ``h0`` and ``h1``."""
    lines = []
    for k in range(4):
        t = f"t{k % 2}"
        lines += [half_of("gl", f"g{at}_{k // 2}", k % 2)]
        lines += [f"mul.rn.f32 {t}, x{at}_{k}, rstd; mul.rn.f32 {t}, {t}, gl;"]
        if k % 2:
            lines += [f"cvt.rn.bf16x2.f32 h{k // 2}, t1, t0;"]
    return lines


@helper
def store_codes(p: Plan, c: int, at: int, values: int, norm: bool, target: str = "shared.b32 [xw") -> list[str]:
    """Quantises chunk ``c``, in the registers number ``at``, into a word at ``xw``, or at another ``target``.

    A code of -128 comes up only where the scale is one rounding below the largest value. It becomes -127 for another
    ``target``, where four of them would look like a word that has not come.
    """
    least = -128.0 if target.startswith("shared") else -127.0
    step = 128 * p.warps_per_token
    lines = []
    if norm:
        lines += [*_normalise(at), *(half_of(f"x{at}_{k}", f"h{k // 2}", k % 2) for k in range(4))]
    for k in range(4):
        lines += exact_quotient("q", f"x{at}_{k}", "ns", "inv", "e")
        if norm:  # the scale may be one rounding below the largest value
            lines += [f"min.f32 q, q, {f32(127.0)}; max.f32 q, q, {f32(least)};"]
        lines += [f"add.rn.f32 q, q, {f32(12582912.0)}; mov.b32 q{k}, q;"]  # 1.5 * 2^23: the low byte is the code
    lines += ["prmt.b32 q0, q0, q1, 0x0040; prmt.b32 q2, q2, q3, 0x0040; prmt.b32 q0, q0, q2, 0x5410;"]
    lines += ["dp4a.s32.s32 total, q0, 0x01010101, total;"]
    left = -(-values // 128) * 128 - step * c
    if left >= step:
        return [*lines, f"st.{target}+{step * c}], q0;"]
    # Beyond the vector the values are zero, and so are the codes that fill up the last 128.
    return [*lines, f"setp.lt.u32 in, lt, {left // 4}; @in st.{target}+{step * c}], q0;"]


@helper
def _finish_codes(red: str) -> list[str]:
    """Sums of codes by warp, scales by token, and the barrier after which all of it can be read."""
    return [
        "redux.sync.add.s32 total, total, 0xffffffff;",
        f"mad.lo.u32 ra, warp, 4, {red}; @first st.shared.b32 [ra+64], total;",
        f"setp.eq.u32 in, lt, 0; mad.lo.u32 ra, token, 4, {red}; @in st.shared.f32 [ra+96], s;",
        "bar.sync 0;",
    ]


@helper
def read_chunks(
    p: Plan, chunks: Sequence[int], kept: bool, predicates: Sequence[str | None], wait: Sequence[str]
) -> list[str]:
    """Polls the words of some chunks; their values are then in ``x{at}_k``, at = c, or c % AT_ONCE if not kept."""
    at = {c: c if kept else c % AT_ONCE for c in chunks}
    groups = [
        (f"src+{512 * p.warps_per_token * c}", predicates[c], [f"w{at[c]}_{k}" for k in range(4)]) for c in chunks
    ]
    lines = ["{", *poll_words(groups, *wait, p.missing_only)]
    for c in chunks:
        lines += [f"and.b32 w{at[c]}_{k}, w{at[c]}_{k}, {VALUE}; mov.b32 x{at[c]}_{k}, w{at[c]}_{k};" for k in range(4)]
    return [*lines, "}"]


@gluon.constexpr_function
def quantize_words(p, values, norm):
    """PTX: words, tag, xq, red, flag, deadline, weights of the norm if any -> codes, their sums, scales."""

    def asm(outs, ins):
        (words,), (tag,), (xq,), (red,), (flag,), (deadline,) = ins[:6]
        wait = (tag, flag, deadline)
        inside, predicates = chunks(p, values)
        count = len(predicates)
        kept = norm or count <= _KEPT
        lines = ["{", *threads(p), *inside]
        lines += [f"mad.lo.u32 xw, token, {p.x_stride(values)}, {xq}; mad.lo.u32 xw, lt, 4, xw;"]
        lines += [f"mad.wide.u32 src, token, {4 * values}, {words}; mad.wide.u32 src, lt, 16, src;"]
        lines += [f".reg .b32 w{c}_<4>; .reg .f32 x{c}_<4>;" for c in range(count if kept else AT_ONCE)]
        if norm:
            lines += norm_weights(p, ins[6], count)
        else:
            lines += [".reg .b32 gb;"]
        batches = [range(c, min(c + AT_ONCE, count)) for c in range(0, count, AT_ONCE)]
        for batch in batches:
            lines += read_chunks(p, batch, kept, predicates, wait)
            for c in batch:
                lines += largest(c if kept else c % AT_ONCE, norm)
        lines += reduce_token(p, red, norm)
        if norm:
            lines += rstd(p, values)
        lines += scale(norm)
        for batch in batches:
            if not kept:
                lines += read_chunks(p, batch, kept, predicates, wait)
            for c in batch:
                lines += store_codes(p, c, c if kept else c % AT_ONCE, values, norm)
        return "\n".join([*lines, *_finish_codes(red), "}"])

    return assembly(asm)


@helper
def final_norm(p, predicates, gains, red, wait, space, address):
    """Reads a hidden state, and stores its last norm in bfloat16 at ``address`` in the state space ``space``."""
    count, step = len(predicates), 256 * p.warps_per_token
    lines = [f".reg .b32 w{c}_<4>; .reg .f32 x{c}_<4>;" for c in range(count)]
    lines += norm_weights(p, gains, count)
    lines += read_chunks(p, range(count), True, predicates, wait)
    for c in range(count):
        lines += largest(c, True)
    lines += reduce_token(p, red, True) + rstd(p, p.d_model)
    for c in range(count):
        lines += _normalise(c)
        left = 2 * p.head_columns - step * c  # beyond d_model there are zeros, up to a multiple of 128 columns
        on = ""
        if left < step:
            lines += [f"setp.lt.u32 in, lt, {left // 8};"]
            on = "@in "
        lines += [f"{on}st.{space}.v2.b32 [{address}+{step * c}], {{h0, h1}};"]
    return lines


@helper
def join_parts(p, one, predicates, statistics, count, epoch, flag, deadline):
    """Reads the parts of attention's result and joins them: chunk ``c`` is then in ``x{c}_k``, rounded to bfloat16.

    A part is a result ``o`` with the maximum ``m`` and the sum ``l`` of its exponentials (base 2). The whole is
    ``sum 2^(m - M) l o / sum 2^(m - M) l``. ``one`` is the plan by which the threads share a token, and ``p`` the plan
    of all tokens.
    """
    values, wpt, parts = p.d_attention, one.warps_per_token, range(p.direct_parts)
    lines = [f".reg .b32 gb, tag; .reg .u32 hd; and.b32 tag, {epoch}, 255;"]
    lines += [f".reg .f32 x{c}_<4>;" for c in range(len(predicates))]
    lines += [f".reg .f32 M, L, o, f<{len(parts)}>; .reg .pred all; setp.eq.u32 all, tid, tid;"]
    at_once = max(1, _PARTS_AT_ONCE // len(parts))
    for start in range(0, len(predicates), at_once):
        batch = range(start, min(start + at_once, len(predicates)))
        lines += ["{"]
        groups, pairs = [], []
        for c in batch:
            lines += [f".reg .u64 st{c}; add.u32 hd, lt, {32 * wpt * c};"]
            lines += [f"shr.u32 hd, hd, {(p.head_size // 4).bit_length() - 1}; mad.lo.u32 hd, token, {p.heads}, hd;"]
            lines += [f"mad.wide.u32 st{c}, hd, 16, {statistics};"]
            for i in parts:
                on = f"on{c}_{i}"
                lines += [f".reg .pred {on}; setp.gt.and.u32 {on}, {count}, {i}, {predicates[c] or 'all'};"]
                lines += [f".reg .b32 w{c}_{i}_<4>, m{c}_{i}_<4>;"]
                lines += [f"mov.b32 m{c}_{i}_0, {f32(-1e30)}; mov.b32 m{c}_{i}_2, 0;"]
                where = 4 * p.batch * values * i + 512 * wpt * c
                groups.append((f"src+{where}", on, [f"w{c}_{i}_{k}" for k in range(4)]))
                where = 16 * p.batch * p.heads * i
                pairs.append((f"st{c}+{where}", on, [f"m{c}_{i}_{k}" for k in range(4)]))
        declare, loads, verdict = read_pairs(pairs, epoch, "v", "wd")
        lines += [*declare, *poll_words(groups, "tag", flag, deadline, also=(loads, verdict))]
        for c in batch:
            lines += [f"mov.b32 f{i}, m{c}_{i}_0;" for i in parts]
            lines += ["mov.f32 M, f0;", *(f"max.f32 M, M, f{i};" for i in parts[1:]), "mov.f32 L, 0f00000000;"]
            for i in parts:
                lines += [f"sub.f32 f{i}, f{i}, M; ex2.approx.f32 f{i}, f{i}; mov.b32 o, m{c}_{i}_2;"]
                lines += [f"mul.f32 f{i}, f{i}, o; add.f32 L, L, f{i};"]
            # A thread without a chunk has L = 0; it must not make a NaN of it.
            lines += [f"max.f32 L, L, {f32(1e-30)}; rcp.approx.f32 L, L;"]
            lines += [f"mul.f32 f{i}, f{i}, L;" for i in parts]
            for k in range(4):
                for i in parts:
                    lines += [f"and.b32 w{c}_{i}_{k}, w{c}_{i}_{k}, {VALUE}; mov.b32 o, w{c}_{i}_{k};"]
                    add = f"fma.rn.f32 x{c}_{k}, f{i}, o, x{c}_{k};" if i else f"mul.f32 x{c}_{k}, f0, o;"
                    lines += [add]
            for k in (0, 2):
                lines += [f"cvt.rn.bf16x2.f32 h0, x{c}_{k + 1}, x{c}_{k};"]
                lines += [half_of(f"x{c}_{k}", "h0", 0), half_of(f"x{c}_{k + 1}", "h0", 1)]
        lines += ["}"]
    return lines


@gluon.constexpr_function
def quantize_attention(p):
    """PTX: words, statistics and number of parts, epoch, xq, red, flag, deadline -> as :func:`quantize_words`."""

    def asm(outs, ins):
        (words,), (statistics,), (count,), (epoch,), (xq,), (red,), (flag,), (deadline,) = ins
        values = p.d_attention
        inside, predicates = chunks(p, values)
        lines = ["{", *threads(p), *inside]
        lines += [f"mad.lo.u32 xw, token, {p.x_stride(values)}, {xq}; mad.lo.u32 xw, lt, 4, xw;"]
        lines += [f"mad.wide.u32 src, token, {4 * values}, {words}; mad.wide.u32 src, lt, 16, src;"]
        lines += join_parts(p, p, predicates, statistics, count, epoch, flag, deadline)
        for c in range(len(predicates)):
            lines += largest(c, False)
        lines += reduce_token(p, red, False) + scale(False)
        for c in range(len(predicates)):
            lines += store_codes(p, c, c, values, False)
        return "\n".join([*lines, *_finish_codes(red), "}"])

    return assembly(asm)


@gluon.constexpr_function
def normalize_words(p):
    """PTX: words, tag, target, red, flag, deadline, weights of the norm -> the final norm in bfloat16, see Plan."""

    def asm(outs, ins):
        (words,), (tag,), (target,), (red,), (flag,), (deadline,), gains = ins
        inside, predicates = chunks(p, p.d_model)
        lines = ["{", *threads(p), *inside]
        lines += [f"mad.lo.u32 xw, token, {p.head_stride}, {target}; mad.lo.u32 xw, lt, 8, xw;"]
        lines += [f"mad.wide.u32 src, token, {4 * p.d_model}, {words}; mad.wide.u32 src, lt, 16, src;"]
        lines += final_norm(p, predicates, gains, red, (tag, flag, deadline), "shared", "xw")
        return "\n".join([*lines, "bar.sync 0;", "}"])

    return assembly(asm)
