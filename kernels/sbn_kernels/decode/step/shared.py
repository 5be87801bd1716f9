"""Inline PTX by which one program quantises a token for all, and by which the others wait for the codes.

For a larger batch this takes less time than quantising every token everywhere: see ``plan.Phase.shared``. The registers
are those of ``tokens``.
"""

from __future__ import annotations

from triton.experimental import gluon

from sbn_kernels.decode.step.ptx import EMPTY, assembly, helper, pair_store, poll_pairs
from sbn_kernels.decode.step.tokens import (
    AT_ONCE,
    chunks,
    final_norm,
    join_parts,
    largest,
    norm_weights,
    read_chunks,
    reduce_token,
    rstd,
    scale,
    store_codes,
    threads,
)


@helper
def _share(one, values, norm, predicates, codes, other, place, epoch, red):
    """Quantises the chunks ``x{c}_k`` of one token, which all warps hold, and writes the codes for all programs."""
    count = len(predicates)
    lines = []
    for c in range(count):
        lines += largest(c, norm)
    lines += reduce_token(one, red, norm)
    if norm:
        lines += rstd(one, values)
    lines += scale(norm)
    lines += [f".reg .u64 gw, ow; mad.wide.u32 gw, lt, 4, {codes}; mad.wide.u32 ow, lt, 4, {other};"]
    for c in range(count):
        lines += store_codes(one, c, c, values, norm, "global.b32 [gw")
    lines += ["redux.sync.add.s32 total, total, 0xffffffff;"]
    lines += [f"mad.lo.u32 ra, warp, 4, {red}; @first st.shared.b32 [ra+64], total; bar.sync 0;"]
    lines += ["setp.ne.u32 in, tid, 0; @in bra DONE; .reg .b32 n<8>;"]
    for half in range(2):
        regs = ",".join(f"n{4 * half + k}" for k in range(4))
        lines += [f"ld.shared.v4.b32 {{{regs}}}, [{red}+{64 + 16 * half}];"]
    lines += ["mov.b32 total, n0;", *(f"add.s32 total, total, n{k};" for k in range(1, 8))]
    lines += ["mov.b32 mb, s;", *pair_store(place, "total", "mb", epoch), "DONE:"]
    empty = f"0x{EMPTY:02x}{EMPTY:02x}{EMPTY:02x}{EMPTY:02x}"
    lines += [f"mov.b32 q0, {empty};"]
    step, filled = 128 * one.warps_per_token, -(-values // 128) * 128
    for c in range(count):
        left = filled - step * c
        on = "" if left >= step else f"setp.lt.u32 in, lt, {left // 4}; @in "
        lines += [f"{on}st.global.b32 [ow+{step * c}], q0;"]
    return lines


@gluon.constexpr_function
def share_codes(p, values, norm):
    """PTX: words, tag, codes, other, place, epoch, red, flag, deadline, weights of the norm if any -> codes in memory.

    All warps quantise one token, and ``place`` gets the sum of the codes and the scale, as pairs with the epoch. The
    other programs wait for the pairs (:func:`await_tokens`) and then read the codes, which may still be on their way:
    see ``ptx.begin_anew_without``. For that the place of the next layer's codes, ``other``, is emptied. All programs
    have read the codes of the layer before from there, because those codes have led to the words that arrive here.

    A reader must see that a place is empty. The fence makes the emptying of the phase before visible before the codes
    of this phase are. A reader sees these codes, has a fence behind them, and reads the emptied place a layer later.
    ``p`` is the plan of one token.
    """

    def asm(outs, ins):
        (words,), (tag,), (codes,), (other,), (place,), (epoch,), (red,), (flag,), (deadline,) = ins[:9]
        inside, predicates = chunks(p, values)
        count = len(predicates)
        lines = ["fence.acq_rel.gpu;", "{", *threads(p), *inside]
        lines += [f"mad.wide.u32 src, lt, 16, {words};"]
        lines += [f".reg .b32 w{c}_<4>; .reg .f32 x{c}_<4>;" for c in range(count)]
        lines += norm_weights(p, ins[9], count) if norm else [".reg .b32 gb;"]
        for start in range(0, count, AT_ONCE):
            lines += read_chunks(p, range(start, min(start + AT_ONCE, count)), True, predicates, (tag, flag, deadline))
        lines += _share(p, values, norm, predicates, codes, other, place, epoch, red)
        return "\n".join([*lines, "}"])

    return assembly(asm)


@gluon.constexpr_function
def share_attention(p):
    """PTX: as :func:`share_codes`, for the parts of attention's result: words, statistics and number of parts first.

    ``p`` is the plan of all tokens.
    """

    def asm(outs, ins):
        (words,), (statistics,), (count,), (codes,), (other,), (place,), (epoch,), (red,), (flag,), (deadline,) = ins
        one = p.token_plan
        inside, predicates = chunks(one, p.d_attention)
        lines = ["fence.acq_rel.gpu;", "{", *threads(one), *inside, f"mad.wide.u32 src, lt, 16, {words};"]
        lines += join_parts(p, one, predicates, statistics, count, epoch, flag, deadline)
        lines += _share(one, p.d_attention, False, predicates, codes, other, place, epoch, red)
        return "\n".join([*lines, "}"])

    return assembly(asm)


@gluon.constexpr_function
def share_final(p):
    """PTX: words, tag, target, place, epoch, red, flag, deadline, weights of the norm -> bfloat16 in memory.

    The same as :func:`share_codes` for the last norm. Its results are not quantised, so a fence orders them before the
    pairs.
    """

    def asm(outs, ins):
        (words,), (tag,), (target,), (place,), (epoch,), (red,), (flag,), (deadline,), gains = ins
        inside, predicates = chunks(p, p.d_model)
        lines = ["{", *threads(p), *inside, ".reg .u64 gw;", f"mad.wide.u32 gw, lt, 8, {target};"]
        lines += [f"mad.wide.u32 src, lt, 16, {words};"]
        lines += final_norm(p, predicates, gains, red, (tag, flag, deadline), "global", "gw")
        lines += ["bar.sync 0; setp.ne.u32 in, tid, 0; @in bra DONE; fence.acq_rel.gpu;"]
        return "\n".join([*lines, *pair_store(place, "total", "total", epoch), "DONE:", "}"])

    return assembly(asm)


@gluon.constexpr_function
def await_tokens(p, acquire):
    """PTX: places of all tokens, epoch, statistics in shared memory, flag, deadline -> sums and scales of all tokens.

    One thread waits for one token. With ``acquire`` all threads of the program may afterwards read what was written
    before the pairs. Codes do without, because a reader sees by their values whether they have come.
    """
    fence = "fence.acq_rel.gpu;" if acquire else ""

    def asm(outs, ins):
        (places,), (epoch,), (statistics,), (flag,), (deadline,) = ins
        lines = ["{", ".reg .u32 tid, sa; .reg .u64 a; .reg .pred in; .reg .b32 m<4>; mov.u32 tid, %tid.x;"]
        lines += [f"setp.ge.u32 in, tid, {p.batch}; @in bra DONE;"]
        lines += [f"mad.wide.u32 a, tid, 16, {places}; mad.lo.u32 sa, tid, 8, {statistics};"]
        lines += poll_pairs([("a", None, [f"m{k}" for k in range(4)])], epoch, flag, deadline)
        return "\n".join([*lines, fence, "st.shared.v2.b32 [sa], {m0, m2};", "DONE:", "bar.sync 0;", "}"])

    return assembly(asm)


@gluon.constexpr_function
def copy_final(p):
    """PTX: shared final hidden states, target in shared memory -> rows of ``head_stride`` bytes, see Plan."""

    def asm(outs, ins):
        (source,), (target,) = ins
        pieces = p.head_columns // 8  # of 16 bytes in a token
        lines = ["{", ".reg .u32 n, token, part, sa; .reg .u64 a; .reg .pred in; .reg .b32 w<4>; mov.u32 n, %tid.x;"]
        lines += [f"AGAIN: setp.ge.u32 in, n, {p.batch * pieces}; @in bra DONE;"]
        lines += [f"div.u32 token, n, {pieces}; mul.lo.u32 part, token, {pieces}; sub.u32 part, n, part;"]
        lines += [f"mad.wide.u32 a, n, 16, {source}; ld.relaxed.gpu.global.v4.b32 {{w0, w1, w2, w3}}, [a];"]
        lines += [f"mad.lo.u32 sa, token, {p.head_stride}, {target}; mad.lo.u32 sa, part, 16, sa;"]
        lines += [f"st.shared.v4.b32 [sa], {{w0, w1, w2, w3}}; add.u32 n, n, {32 * p.warps}; bra AGAIN;"]
        return "\n".join([*lines, "DONE:", "bar.sync 0;", "}"])

    return assembly(asm)
