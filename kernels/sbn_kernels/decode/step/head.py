"""Inline PTX of the head: bfloat16 rows times the final hidden states, at the bandwidth of memory.

For one or two tokens a warp takes whole rows, each lane 16 bytes of every 512, and multiplies in float32: reads in long
runs reach 4.5 TB/s on an H200, where pieces of 256 bytes from 16 rows reach 2.8.

For more tokens that is too much arithmetic, and the tensor cores multiply. Operand A of ``mma.m16n8k16`` is 16 rows of
the head. A warp takes tiles of 16 rows and reads them 256 columns at a time, again in runs of 512 bytes. Its own piece
of shared memory brings them into the order of the operand. Operand B holds the hidden states of up to 8 tokens, in
shared memory in rows of bfloat16. 16 tokens are two operands B for the same A. Columns are permuted, so that a lane's
share of both is 16 neighbouring bytes: lane ``(g, t) = (lane / 4, lane % 4)``, piece ``j``, has rows ``g`` and
``g + 8`` and columns ``32 j + 8 t ..``.
"""

from __future__ import annotations

from triton.experimental import gluon

from sbn_kernels.decode.step.plan import COLUMNS, HEAD_STEP, STAGING_STRIDE
from sbn_kernels.decode.step.ptx import add_across, assembly

_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


@gluon.constexpr_function
def load_rows(p, step):
    """PTX: head, tile of the first warp -> 64 registers of step ``step`` of this warp's tile; zeros beyond the head.

    Register ``4 i + k`` of a lane: row ``i``, columns ``256 step + 8 lane + 2 k`` and the next.
    """

    def asm(outs, ins):
        (regs,) = outs
        (head,), (tile,) = ins
        lines = ["{", ".reg .u32 row, lane; .reg .u64 a; .reg .pred p, c; mov.u32 lane, %tid.x;"]
        lines += [f"shr.u32 row, lane, 5; add.u32 row, row, {tile}; and.b32 lane, lane, 31; mul.lo.u32 row, row, 16;"]
        lines += [f"mad.wide.u32 a, row, {2 * p.d_model}, {head}; mad.wide.u32 a, lane, 16, a;"]
        left = p.d_model - HEAD_STEP * step
        for i in range(16):
            four = regs[4 * i : 4 * i + 4]
            on = "p"
            lines += [f"mov.b32 {r}, 0;" for r in four]
            lines += [f"setp.lt.u32 p, row, {p.shape.vocab}; add.u32 row, row, 1;"]
            if left < HEAD_STEP:
                lines += [f"setp.lt.and.u32 c, lane, {left // 8}, p;"]
                on = "c"
            where = 2 * p.d_model * i + 2 * HEAD_STEP * step
            lines += [f"@{on} ld.global.nc.L1::no_allocate.v4.b32 {{{','.join(four)}}}, [a+{where}];"]
        return "\n".join([*lines, "}"])

    return assembly(asm)


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
        lines = ["{", ".reg .u32 lane, g, t, xa, sa, ra; .reg .b32 x<4>, w<4>, u<4>; mov.u32 lane, %tid.x;"]
        lines += [f"shr.u32 sa, lane, 5; mad.lo.u32 sa, sa, {16 * STAGING_STRIDE}, {staging}; and.b32 lane, lane, 31;"]
        lines += [f"shr.u32 g, lane, 2; and.b32 t, lane, 3; mad.lo.u32 ra, g, {STAGING_STRIDE}, sa;"]
        lines += ["mad.lo.u32 ra, t, 16, ra; mad.lo.u32 sa, lane, 16, sa; bar.warp.sync 0xffffffff;"]
        for i in range(16):
            lines += [f"st.shared.v4.b32 [sa+{STAGING_STRIDE * i}], {{{','.join(rows[4 * i : 4 * i + 4])}}};"]
        lines += ["bar.warp.sync 0xffffffff;", f"and.b32 g, g, {min(COLUMNS, p.batch_slots) - 1};"]
        lines += [f"mad.lo.u32 xa, g, {p.head_stride}, {xh}; mad.lo.u32 xa, t, 16, xa;"]
        # Beyond d_model the rows are zeros, and so are the hidden states up to a multiple of 128 columns.
        for j in range(min(HEAD_STEP, p.head_columns - HEAD_STEP * step) // 32):
            lines += [f"ld.shared.v4.b32 {{w0, w1, w2, w3}}, [ra+{64 * j}];"]
            lines += [f"ld.shared.v4.b32 {{u0, u1, u2, u3}}, [ra+{8 * STAGING_STRIDE + 64 * j}];"]
            for q in range(p.token_groups):
                c = "{" + ",".join(acc[4 * q : 4 * q + 4]) + "}"
                where = COLUMNS * q * p.head_stride + 2 * HEAD_STEP * step + 64 * j
                lines += [f"ld.shared.v4.b32 {{x0, x1, x2, x3}}, [xa+{where}];"]
                for e in (0, 2):
                    lines += [f"{_MMA} {c}, {{w{e},u{e},w{e + 1},u{e + 1}}}, {{x{e},x{e + 1}}}, {c};"]
        return "\n".join([*lines, "}"])

    return assembly(asm)


@gluon.constexpr_function
def load_row(p):
    """PTX: head, row of the first warp -> this warp's row, 4 registers for every 256 columns; zeros beyond the head."""

    def asm(outs, ins):
        (regs,) = outs
        (head,), (row,) = ins
        lines = ["{", ".reg .u32 lane, r; .reg .u64 a; .reg .pred p, c; mov.u32 lane, %tid.x;"]
        lines += [
            f"shr.u32 r, lane, 5; add.u32 r, r, {row}; and.b32 lane, lane, 31; setp.lt.u32 p, r, {p.shape.vocab};"
        ]
        lines += [f"mad.wide.u32 a, r, {2 * p.d_model}, {head}; mad.wide.u32 a, lane, 16, a;"]
        lines += [f"mov.b32 {r}, 0;" for r in regs[4 * -(-p.d_model // 256) :]]
        for j in range(-(-p.d_model // 256)):
            four = regs[4 * j : 4 * j + 4]
            lines += [f"mov.b32 {r}, 0;" for r in four]
            on = "p"
            if p.d_model < 256 * (j + 1):
                lines += [f"setp.lt.and.u32 c, lane, {max(0, p.d_model // 8 - 32 * j)}, p;"]
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
        lines = ["{", ".reg .u32 xa; .reg .b32 x<4>, b; .reg .f32 a<4>, f, e; .reg .pred c; mov.u32 xa, %tid.x;"]
        lines += [f"and.b32 xa, xa, 31; setp.lt.u32 c, xa, {p.d_model // 8 % 32}; mad.lo.u32 xa, xa, 16, {xh};"]
        lines += [f"mov.f32 a{k}, 0f00000000;" for k in range(4)]
        for j in range(-(-p.d_model // 256)):
            on = ""
            if p.d_model < 256 * (j + 1):
                lines += ["mov.b32 x0, 0; mov.b32 x1, 0; mov.b32 x2, 0; mov.b32 x3, 0;"]
                on = "@c "
            lines += [f"{on}ld.shared.v4.b32 {{x0, x1, x2, x3}}, [xa+{512 * j}];"]
            for k in range(4):
                w = regs[4 * j + k]
                lines += [f"shl.b32 b, {w}, 16; mov.b32 e, b; shl.b32 b, x{k}, 16; mov.b32 f, b;"]
                lines += [f"fma.rn.f32 a{2 * (k % 2)}, e, f, a{2 * (k % 2)};"]
                lines += [f"and.b32 b, {w}, 0xffff0000; mov.b32 e, b; and.b32 b, x{k}, 0xffff0000; mov.b32 f, b;"]
                lines += [f"fma.rn.f32 a{2 * (k % 2) + 1}, e, f, a{2 * (k % 2) + 1};"]
        lines += [
            "add.f32 a0, a0, a1; add.f32 a2, a2, a3; add.f32 a0, a0, a2;",
            *add_across("a0", "e", (16, 8, 4, 2, 1)),
        ]
        return "\n".join([*lines, f"mov.f32 {y}, a0;", "}"])

    return assembly(asm)
