"""Inline PTX of the head: bfloat16 rows times the final hidden states, at the bandwidth of memory.

For one or two tokens a warp takes whole rows, each lane 16 bytes of every 512, and multiplies in float32: reads in long
runs reach 4.5 TB/s on an H200, where pieces of 256 bytes from 16 rows reach 2.8.

For more tokens that is too much arithmetic, and the tensor cores multiply: a warp takes tiles of 16 rows and reads them
128 columns at a time, straight from memory into operand A of ``mma.m16n8k16``. Operand B holds the hidden states of up
to 8 tokens, in shared memory in rows of bfloat16. 16 tokens are two operands B for the same A. Columns are permuted in
such a way that a lane's share of both is 16 neighbouring bytes: lane ``(g, t) = (lane / 4, lane % 4)``, load ``j``, has
rows ``g`` and ``g + 8`` and columns ``32 j + 8 t ..``.
"""

from __future__ import annotations

from triton.experimental import gluon

from sbn_kernels.decode.step.plan import COLUMNS
from sbn_kernels.decode.step.ptx import add_across, assembly

_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


@gluon.constexpr_function
def load_rows(p, step):
    """PTX: head, tile of the first warp -> 32 registers of step ``step`` of this warp's tile; zeros beyond the head."""

    def asm(outs, ins):
        (regs,) = outs
        (head,), (tile,) = ins
        lines = ["{", ".reg .u32 row, g, t; .reg .u64 a; .reg .pred p, c; mov.u32 g, %tid.x; and.b32 t, g, 3;"]
        lines += [f"shr.u32 row, g, 5; add.u32 row, row, {tile}; shr.u32 g, g, 2; and.b32 g, g, 7;"]
        lines += [
            f"mad.lo.u32 row, row, 16, g; mad.wide.u32 a, row, {2 * p.d_model}, {head}; mad.wide.u32 a, t, 16, a;"
        ]
        for half in range(2):
            lines += [f"{'add.u32 row, row, 8; ' if half else ''}setp.lt.u32 p, row, {p.shape.vocab};"]
            for j in range(4):
                at = 16 * half + 4 * j
                four = regs[at : at + 4]
                left = p.d_model - 128 * step - 32 * j
                on = "p"
                lines += [f"mov.b32 {r}, 0;" for r in four]
                if left < 32:
                    lines += [f"setp.lt.and.s32 c, t, {max(0, left // 8)}, p;"]
                    on = "c"
                where = 16 * p.d_model * half + 256 * step + 64 * j
                lines += [f"@{on} ld.global.nc.L1::no_allocate.v4.b32 {{{','.join(four)}}}, [a+{where}];"]
        return "\n".join([*lines, "}"])

    return assembly(asm)


@gluon.constexpr_function
def dot_constraints(p):
    """Constraints of :func:`dot_rows`: four accumulators for each group of 8 tokens, in place."""
    count = 4 * p.token_groups
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["r"] * 33 + ["~{memory}"])


@gluon.constexpr_function
def dot_rows(p, step):
    """PTX: accumulators, 32 registers of rows, hidden states in shared memory -> accumulators."""

    def asm(outs, ins):
        (acc,) = outs
        rows, (xh,) = ins[1:]
        lines = ["{", ".reg .u32 lane, g, t, xa; .reg .b32 x<4>; mov.u32 lane, %tid.x; and.b32 lane, lane, 31;"]
        lines += [f"shr.u32 g, lane, 2; and.b32 t, lane, 3; and.b32 g, g, {min(COLUMNS, p.batch_slots) - 1};"]
        lines += [f"mad.lo.u32 xa, g, {p.head_stride}, {xh}; mad.lo.u32 xa, t, 16, xa;"]
        for j in range(4):
            w, u = rows[4 * j : 4 * j + 4], rows[16 + 4 * j : 16 + 4 * j + 4]
            for q in range(p.token_groups):
                c = "{" + ",".join(acc[4 * q : 4 * q + 4]) + "}"
                where = COLUMNS * q * p.head_stride + 256 * step + 64 * j
                lines += [f"ld.shared.v4.b32 {{x0, x1, x2, x3}}, [xa+{where}];"]
                for e in (0, 2):
                    lines += [f"{_MMA} {c}, {{{w[e]},{u[e]},{w[e + 1]},{u[e + 1]}}}, {{x{e},x{e + 1}}}, {c};"]
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
