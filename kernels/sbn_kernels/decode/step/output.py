"""Device helpers of the decode step: the last norm, the head, and the choice of the most likely token; see ``head``."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sbn_kernels.decode.step.handover import final_states, share_states
from sbn_kernels.decode.step.head import (
    choose,
    choose_constraints,
    dot_constraints,
    dot_row,
    dot_rows,
    load_row,
    load_rows,
)
from sbn_kernels.decode.step.rows import stamp


@gluon.jit
def _largest_key(best, logit, row, P: gl.constexpr):
    """The larger of ``best`` and the key of a logit; see ``head``."""
    bits = logit.to(gl.float32).to(gl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(gl.int64) << 32) | (0x7FFFFFFF - row).to(gl.int64)
    return gl.where((row < P.shape.vocab) & (key > best), key, best)


@gluon.jit
def _scale(head_scale, row, P: gl.constexpr):
    """The scales of rows of a head of 8 bits."""
    return gl.load(head_scale + row, mask=row < P.shape.vocab, other=0.0)


@gluon.jit
def head_of_few(base, head, head_scale, logits, gain, words, tag, flag, deadline, best, chosen, trace,
          P: gl.constexpr):  # fmt: skip
    """Computes the final norm and the head for one or two tokens. The first rows are loaded ahead of the norm."""
    COLUMNS: gl.constexpr = 4096 // P.head_bits  # of 512 bytes
    REGS: gl.constexpr = (P.d_model + COLUMNS - 1) // COLUMNS * 4
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
    scales = ()
    for i in gl.static_range(AHEAD):
        rows += (gl.inline_asm(load_row(P), LOAD, [head, first + i * STRIDE], W, is_pure=False),)
        if P.head_bits == 8:
            scales += (_scale(head_scale, first + i * STRIDE + warp + lane * 0, P),)
    final_states(base, words, gain, tag, flag, deadline, P)
    stamp(trace, P.layers, 1, P)
    keys = ()
    for _token in gl.static_range(BATCH):
        keys += (gl.full([P.warps, 32], -(2**63), gl.int64, R1),)
    for start in range(first, P.shape.vocab, AHEAD * STRIDE):
        coming = ()
        next_scales = ()
        for i in gl.static_range(AHEAD):
            row = start + i * STRIDE + warp + lane * 0
            larger = ()
            for token in gl.static_range(BATCH):
                args = [rows[i], base + P.at_tokens + token * P.head_stride]
                y = gl.inline_asm(dot_row(P), ("=&f", "r", "r"), args, Y, is_pure=False)
                if P.head_bits == 8:
                    y = y * scales[i]
                y = y.to(logits.dtype.element_ty)
                gl.store(logits + token * P.shape.vocab + row, y, mask=(row < P.shape.vocab) & (lane == 0))
                larger += (_largest_key(keys[token], y, row, P),)
            keys = larger
            coming += (gl.inline_asm(load_row(P), LOAD, [head, start + (AHEAD + i) * STRIDE], W, is_pure=False),)
            if P.head_bits == 8:
                next_scales += (_scale(head_scale, row + AHEAD * STRIDE, P),)
        rows = coming
        if P.head_bits == 8:
            scales = next_scales
    if BATCH == 1:
        args = [keys[0], base + P.at_staging, best, chosen]  # type: ignore[misc]
    else:
        args = [keys[0], keys[1], base + P.at_staging, best, chosen]  # type: ignore[misc]
    gl.inline_asm(choose(P), choose_constraints(P), args, (), is_pure=False)


@gluon.jit
def head_of_many(base, head, head_scale, logits, gain, words, shared, places, epoch, flag, deadline, best, chosen,
          trace, P: gl.constexpr):  # fmt: skip
    """Computes the final norm and the head for three tokens or more."""
    R64: gl.constexpr = gl.BlockedLayout([1, 1, 64], [1, 32, 1], [P.warps, 1, 1], [2, 1, 0])
    SUMS: gl.constexpr = 4 * P.token_groups
    R4: gl.constexpr = gl.BlockedLayout([1, 1, SUMS], [1, 32, 1], [P.warps, 1, 1], [2, 1, 0])
    W: gl.constexpr = gl.distributed_type(gl.int32, [P.warps, 32, 64], R64)
    A: gl.constexpr = gl.distributed_type(gl.float32, [P.warps, 32, SUMS], R4)
    LOAD: gl.constexpr = "=&r," * 64 + "l,r,~{memory}"
    COLUMNS: gl.constexpr = 4096 // P.head_bits  # of 512 bytes
    STEPS: gl.constexpr = (P.head_columns + COLUMNS - 1) // COLUMNS
    TILES: gl.constexpr = (P.shape.vocab + 15) // 16
    STRIDE: gl.constexpr = P.programs * P.warps
    warp = gl.arange(0, P.warps, gl.SliceLayout(1, gl.SliceLayout(2, R4)))[:, None, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, R4)))[None, :, None]
    item = gl.arange(0, SUMS, gl.SliceLayout(0, gl.SliceLayout(1, R4)))[None, None, :]
    first = gl.program_id(0) * P.warps
    rows = gl.inline_asm(load_rows(P, 0), LOAD, [head, first], W, is_pure=False)
    if P.shared_codes:
        share_states(base, words, shared + P.at_final, places + 8 * P.batch, gain, epoch & 255, epoch, flag, deadline,
                     P)  # fmt: skip
    else:
        final_states(base, words, gain, epoch & 255, flag, deadline, P)
    stamp(trace, P.layers, 1, P)
    keys = gl.full([P.warps, 32, SUMS], -(2**63), gl.int64, R4)
    for tile in range(first, TILES, STRIDE):
        acc = gl.zeros([P.warps, 32, SUMS], gl.float32, R4)
        row = (tile + warp) * 16 + lane // 4 + item // 2 % 2 * 8
        if P.head_bits == 8:
            scale = _scale(head_scale, row, P)
        for s in gl.static_range(STEPS):
            coming = gl.inline_asm(
                load_rows(P, (s + 1) % STEPS), LOAD, [head, tile + (s + 1) // STEPS * STRIDE], W, is_pure=False
            )
            args = [acc, rows, base + P.at_tokens, base + P.at_staging]
            acc = gl.inline_asm(dot_rows(P, s), dot_constraints(P), args, A, is_pure=False)
            rows = coming
        token = lane % 4 * 2 + item % 2 + item // 4 * 8
        where = logits + token.to(gl.int64) * P.shape.vocab + row
        if P.head_bits == 8:
            acc = acc * scale
        y = acc.to(logits.dtype.element_ty)
        gl.store(where, y, mask=(row < P.shape.vocab) & (token < P.batch))
        keys = _largest_key(keys, y, row, P)
    # The staging rows are not in use any more.
    args = [keys, base + P.at_staging, best, chosen]
    gl.inline_asm(choose(P), choose_constraints(P), args, (), is_pure=False)
