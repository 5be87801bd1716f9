"""Inline PTX of the head: rows of 16 or 8 bits times the final hidden states, at the bandwidth of memory.

For one or two tokens a warp takes whole rows, each lane 16 bytes of every 512, and multiplies in float32: reads in long
runs reach 4.5 TB/s on an H200, where pieces of 256 bytes from 16 rows reach 2.8.

For more tokens that is too much arithmetic, and the tensor cores multiply. Operand A of ``mma.m16n8k16`` is 16 rows of
the head. A warp takes tiles of 16 rows and reads them 256 columns at a time, again in runs of 512 bytes. Its own piece
of shared memory brings them into the order of the operand. Operand B holds the hidden states of up to 8 tokens, in
shared memory in rows of bfloat16. 16 tokens are two operands B for the same A. Columns are permuted, so that a lane's
share of both is 16 neighbouring bytes: lane ``(g, t) = (lane / 4, lane % 4)``, piece ``j``, has rows ``g`` and
``g + 8`` and columns ``32 j + 8 t ..``.

A head of 8 bits has int8 codes, so 16 bytes are 16 columns. A code whose sign bit is flipped is the unsigned byte of
the code plus 128. The float with the upper bits ``0x4B0000`` and this byte below them is 8,388,608 plus the byte, so a
subtraction gives the code exactly. The upper half of this float32 is the code in bfloat16. For the tensor cores a
lane's 16 columns come in two halves, each in the order of 8 bfloat16 columns. The sum is multiplied by the scale of the
row.

The most likely token comes with the logits. A *key* is 64 bits: the logit, so that integers have the order of the
logits, and below it the row, so that the first of equal rows has the larger key. The programs join their largest keys
in memory, and the last program writes down the tokens.
"""

from __future__ import annotations

from triton.experimental import gluon

from sbn_kernels.decode.step.plan import COLUMNS, HEAD_STEP, STAGING_STRIDE
from sbn_kernels.decode.step.ptx import add_across, assembly, helper

LOWEST = "0x8000000000000000"  # less than the key of any row
_SIGNS = "0x80808080"  # the sign bits of four int8
_BYTE, _ZERO_CODE = "0x4B000000", "0f4B000080"  # the float of byte 0, and the float of byte 128, which is code 0
_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


@gluon.constexpr_function
def load_rows(p, step):
    """PTX: head, tile of the first warp -> 64 registers of step ``step`` of this warp's tile; zeros beyond the head.

    Register ``4 i + k`` of a lane: row ``i``, columns ``256 step + 8 lane + 2 k`` and the next; of a head of 8 bits
    columns ``512 step + 16 lane + 4 k`` and the next three.
    """

    def asm(outs, ins):
        (regs,) = outs
        (head,), (tile,) = ins
        lines = ["{", ".reg .u32 row, lane; .reg .u64 a; .reg .pred p, c; mov.u32 lane, %tid.x;"]
        lines += [f"shr.u32 row, lane, 5; add.u32 row, row, {tile}; and.b32 lane, lane, 31; mul.lo.u32 row, row, 16;"]
        lines += [f"mad.wide.u32 a, row, {p.d_model * p.head_bits // 8}, {head}; mad.wide.u32 a, lane, 16, a;"]
        left = p.d_model - 4096 // p.head_bits * step
        for i in range(16):
            four = regs[4 * i : 4 * i + 4]
            on = "p"
            lines += [f"mov.b32 {r}, 0;" for r in four]
            lines += [f"setp.lt.u32 p, row, {p.shape.vocab}; add.u32 row, row, 1;"]
            if left < 4096 // p.head_bits:
                lines += [f"setp.lt.and.u32 c, lane, {left * p.head_bits // 128}, p;"]
                on = "c"
            where = p.d_model * p.head_bits // 8 * i + 512 * step
            lines += [f"@{on} ld.global.nc.L1::no_allocate.v4.b32 {{{','.join(four)}}}, [a+{where}];"]
        return "\n".join([*lines, "}"])

    return assembly(asm)


@helper
def _code(word, byte, target):
    """The float32 of one of the four codes of a word whose sign bits are flipped."""
    return [f"prmt.b32 {target}, {word}, {_BYTE}, 0x744{byte}; sub.f32 {target}, {target}, {_ZERO_CODE};"]


@helper
def _widen(words, targets, scratch, flipped):
    """Two words of four codes -> four pairs of bfloat16."""
    lines = []
    for i, target in enumerate(targets):
        if i % 2 == 0:
            lines += [f"xor.b32 {flipped}, {words[i // 2]}, {_SIGNS};"]
        for k, register in enumerate(scratch):
            lines += _code(flipped, 2 * (i % 2) + k, register)
        lines += [f"prmt.b32 {target}, {scratch[0]}, {scratch[1]}, 0x7632;"]
    return lines


@gluon.constexpr_function
def dot_constraints(p):
    """Constraints of :func:`dot_rows`: four accumulators for each group of 8 tokens, in place."""
    count = 4 * p.token_groups
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["r"] * 66 + ["~{memory}"])


@gluon.constexpr_function
def dot_rows(p, step):
    """PTX: accumulators, 64 registers of rows, hidden states and staging in shared memory -> accumulators."""

    def asm(outs, ins):
        (acc,) = outs
        rows, (xh,), (staging,) = ins[1:]
        halves = 16 // p.head_bits
        lines = ["{", ".reg .u32 lane, g, t, xa, sa, ra; .reg .b32 x<4>, w<4>, u<4>; mov.u32 lane, %tid.x;"]
        lines += [f"shr.u32 sa, lane, 5; mad.lo.u32 sa, sa, {16 * STAGING_STRIDE}, {staging}; and.b32 lane, lane, 31;"]
        lines += [f"shr.u32 g, lane, 2; and.b32 t, lane, 3; mad.lo.u32 ra, g, {STAGING_STRIDE}, sa;"]
        lines += ["mad.lo.u32 ra, t, 16, ra; mad.lo.u32 sa, lane, 16, sa;"]
        lines += [f"and.b32 g, g, {min(COLUMNS, p.batch_slots) - 1};"]
        lines += [f"mad.lo.u32 xa, g, {p.head_stride}, {xh}; mad.lo.u32 xa, t, {16 * halves}, xa;"]
        for half in range(halves):
            lines += ["bar.warp.sync 0xffffffff;"]
            for i in range(16):
                four = rows[4 * i : 4 * i + 4]
                if halves == 2:
                    lines += _widen(four[2 * half : 2 * half + 2], ("w0", "w1", "w2", "w3"), ("u0", "u1"), "u2")
                    four = ("w0", "w1", "w2", "w3")
                lines += [f"st.shared.v4.b32 [sa+{STAGING_STRIDE * i}], {{{','.join(four)}}};"]
            lines += ["bar.warp.sync 0xffffffff;"]
            # Beyond d_model the hidden states are zeros up to a multiple of 128 columns, and the rows are finite.
            for j in range(min(HEAD_STEP, (p.head_columns - HEAD_STEP * halves * step) // halves) // 32):
                lines += [f"ld.shared.v4.b32 {{w0, w1, w2, w3}}, [ra+{64 * j}];"]
                lines += [f"ld.shared.v4.b32 {{u0, u1, u2, u3}}, [ra+{8 * STAGING_STRIDE + 64 * j}];"]
                for q in range(p.token_groups):
                    c = "{" + ",".join(acc[4 * q : 4 * q + 4]) + "}"
                    where = COLUMNS * q * p.head_stride + halves * (2 * HEAD_STEP * step + 64 * j) + 16 * half
                    lines += [f"ld.shared.v4.b32 {{x0, x1, x2, x3}}, [xa+{where}];"]
                    for e in (0, 2):
                        lines += [f"{_MMA} {c}, {{w{e},u{e},w{e + 1},u{e + 1}}}, {{x{e},x{e + 1}}}, {c};"]
        return "\n".join([*lines, "}"])

    return assembly(asm)


@gluon.constexpr_function
def load_row(p):
    """PTX: head, row of the first warp -> this warp's row, 4 registers for every 512 bytes; zeros beyond the head."""

    def asm(outs, ins):
        (regs,) = outs
        (head,), (row,) = ins
        lines = ["{", ".reg .u32 lane, r; .reg .u64 a; .reg .pred p, c; mov.u32 lane, %tid.x;"]
        lines += [
            f"shr.u32 r, lane, 5; add.u32 r, r, {row}; and.b32 lane, lane, 31; setp.lt.u32 p, r, {p.shape.vocab};"
        ]
        columns = 4096 // p.head_bits
        lines += [f"mad.wide.u32 a, r, {p.d_model * p.head_bits // 8}, {head}; mad.wide.u32 a, lane, 16, a;"]
        lines += [f"mov.b32 {r}, 0;" for r in regs[4 * -(-p.d_model // columns) :]]
        for j in range(-(-p.d_model // columns)):
            four = regs[4 * j : 4 * j + 4]
            lines += [f"mov.b32 {r}, 0;" for r in four]
            on = "p"
            if p.d_model < columns * (j + 1):
                lines += [f"setp.lt.and.u32 c, lane, {p.d_model * p.head_bits // 128 - 32 * j}, p;"]
                on = "c"
            lines += [f"@{on} ld.global.nc.L1::no_allocate.v4.b32 {{{','.join(four)}}}, [a+{512 * j}];"]
        return "\n".join([*lines, "}"])

    return assembly(asm)


@gluon.constexpr_function
def dot_row(p):
    """PTX: registers of a row, hidden states in shared memory -> their product, the same in every lane."""

    def asm(outs, ins):
        ((y,),) = outs
        regs, (xh,) = ins
        lines = ["{", ".reg .u32 xa; .reg .b32 x<4>, b, w; .reg .f32 a<4>, f, e; .reg .pred c; mov.u32 xa, %tid.x;"]
        columns, halves = 4096 // p.head_bits, 16 // p.head_bits
        lines += [f"and.b32 xa, xa, 31; setp.lt.u32 c, xa, {p.d_model * p.head_bits // 128 % 32};"]
        lines += [f"mad.lo.u32 xa, xa, {16 * halves}, {xh};"]
        lines += [f"mov.f32 a{k}, 0f00000000;" for k in range(4)]
        for j, half in ((j, half) for j in range(-(-p.d_model // columns)) for half in range(halves)):
            on = ""
            if p.d_model < columns * (j + 1):
                lines += ["mov.b32 x0, 0; mov.b32 x1, 0; mov.b32 x2, 0; mov.b32 x3, 0;"]
                on = "@c "
            lines += [f"{on}ld.shared.v4.b32 {{x0, x1, x2, x3}}, [xa+{512 * halves * j + 16 * half}];"]
            for k in range(4):
                first, second = 2 * (k % 2), 2 * (k % 2) + 1
                if halves == 1:
                    w = regs[4 * j + k]
                    low, high = [f"shl.b32 b, {w}, 16; mov.b32 e, b;"], [f"and.b32 b, {w}, 0xffff0000; mov.b32 e, b;"]
                else:
                    if k % 2 == 0:
                        lines += [f"xor.b32 w, {regs[4 * j + 2 * half + k // 2]}, {_SIGNS};"]
                    low, high = ([*_code("w", 2 * (k % 2) + i, "b"), "mov.b32 e, b;"] for i in range(2))
                lines += [*low, f"shl.b32 b, x{k}, 16; mov.b32 f, b; fma.rn.f32 a{first}, e, f, a{first};"]
                lines += [*high, f"and.b32 b, x{k}, 0xffff0000; mov.b32 f, b; fma.rn.f32 a{second}, e, f, a{second};"]
        lines += [
            "add.f32 a0, a0, a1; add.f32 a2, a2, a3; add.f32 a0, a0, a2;",
            *add_across("a0", "e", (16, 8, 4, 2, 1)),
        ]
        return "\n".join([*lines, f"mov.f32 {y}, a0;", "}"])

    return assembly(asm)


@helper
def _larger_across(key, distances):
    """Makes a 64-bit key the largest one of the lanes whose numbers differ by ``distances``."""
    lines = []
    for distance in distances:
        lines += [f"mov.b64 {{lo, hi}}, {key}; shfl.sync.bfly.b32 lo, lo, {distance}, 31, 0xffffffff;"]
        lines += [f"shfl.sync.bfly.b32 hi, hi, {distance}, 31, 0xffffffff; mov.b64 k, {{lo, hi}};"]
        lines += [f"max.s64 {key}, {key}, k;"]
    return lines


@gluon.constexpr_function
def choose(p):
    """PTX: a thread's largest keys, shared memory, keys of all programs and their number, result -> tokens.

    The keys belong to a batch as in the accumulators of :func:`dot_rows`, or one to each token for one or two tokens.
    Behind the keys in memory stands the number of programs that have joined theirs. The last program leaves the keys as
    they were before the step.
    """

    def asm(outs, ins):
        *tensors, (sm,), (joined,), (result,) = ins
        keys = [register for registers in tensors for register in registers]
        lines = ["{", ".reg .u32 tid, warp, lane, sa, la; .reg .b32 lo, hi, n; .reg .b64 k, m; .reg .u64 a, b;"]
        lines += [".reg .pred p, on; mov.u32 tid, %tid.x; shr.u32 warp, tid, 5; and.b32 lane, tid, 31;"]
        lines += [f"mad.lo.u32 sa, warp, {8 * 16}, {sm}; bar.sync 0;"]
        if p.batch <= 2:
            lines += ["setp.eq.u32 p, lane, 0;"]
            lines += [f"@p st.shared.b64 [sa+{8 * token}], {keys[token]};" for token in range(p.batch)]
        else:
            lines += ["setp.lt.u32 p, lane, 4; mad.lo.u32 la, lane, 16, sa;"]
            for q in range(p.token_groups):
                for low in range(2):
                    lines += [f"max.s64 m, {keys[4 * q + low]}, {keys[4 * q + 2 + low]};"]
                    lines += [*_larger_across("m", (4, 8, 16)), f"@p st.shared.b64 [la+{64 * q + 8 * low}], m;"]
        lines += ["bar.sync 0; setp.ge.u32 p, tid, 32; @p bra DONE;"]
        lines += [f"setp.lt.u32 on, lane, {p.batch}; mad.lo.u32 la, lane, 8, {sm}; mov.b64 m, {LOWEST};"]
        for warp in range(p.warps):
            lines += [f"@on ld.shared.b64 k, [la+{8 * 16 * warp}]; @on max.s64 m, m, k;"]
        lines += [f"mad.wide.u32 a, lane, 8, {joined}; mad.wide.u32 b, lane, 8, {result};"]
        lines += ["@on red.relaxed.gpu.global.max.s64 [a], m; bar.warp.sync 0xffffffff;"]
        lines += ["setp.eq.u32 p, lane, 0; mov.b32 n, 0; @p fence.acq_rel.gpu;"]
        lines += [f"@p atom.relaxed.gpu.global.add.u32 n, [{joined}+{8 * p.batch}], 1;"]
        lines += [f"redux.sync.max.u32 n, n, 0xffffffff; setp.ne.u32 p, n, {p.programs - 1}; @p bra DONE;"]
        lines += ["fence.acq_rel.gpu; @on ld.relaxed.gpu.global.b64 k, [a]; @on mov.b64 {lo, hi}, k;"]
        lines += ["sub.u32 lo, 0x7fffffff, lo; cvt.u64.u32 k, lo; @on st.global.b64 [b], k;"]
        lines += [f"mov.b64 m, {LOWEST}; @on st.global.b64 [a], m; setp.eq.u32 p, lane, 0; mov.b32 n, 0;"]
        lines += [f"@p st.global.b32 [{joined}+{8 * p.batch}], n;"]
        return "\n".join([*lines, "DONE:", "}"])

    return assembly(asm)


@gluon.constexpr_function
def choose_constraints(p):
    """Constraints of :func:`choose`."""
    return "l," * (p.batch if p.batch <= 2 else 4 * p.token_groups) + "r,l,l,~{memory}"
