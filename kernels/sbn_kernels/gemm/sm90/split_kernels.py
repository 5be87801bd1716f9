"""Device code of the Hopper products for few tokens with the sum over K split, in Gluon. Needs Triton >= 3.9.

The loops are those of ``kernels.py``. Here a program walks one part of K for one panel of 128 rows and all tokens, and
stores its int32 sums unscaled. Threads store the sums from registers in 32-byte pieces, so the epilogue takes no shared
memory, and with at most 64 tokens two programs fit a multiprocessor.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sbn_kernels.common.hopper_pipeline import ring
from sbn_kernels.gemm.sm90.kernels import finish_steps, load_steps, no_metadata, sum_steps


@gluon.jit
def _producer(x, w, xs, ws, full, empty, k_steps, per_split, STAGES: gl.constexpr):
    first = gl.program_id(1) * per_split
    end = gl.minimum(first + per_split, k_steps)
    stage = 0  # a variable: as an argument, a literal would be a constant in the function
    phase = 1
    load_steps(x, w, xs, ws, full, empty, 0, gl.program_id(0), k_steps, first, end, stage, phase, STAGES)


@gluon.jit
def _consumer(
    part_pointer, xs, ws, full, empty, k_steps, per_split, zero,
    BT: gl.constexpr, STAGES: gl.constexpr, SPARSE: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    first = gl.program_id(1) * per_split
    end = gl.minimum(first + per_split, k_steps)
    stage = 0
    phase = 0
    held = no_metadata()
    acc, held, stage, phase = sum_steps(
        xs, ws, full, empty, first, end, stage, phase, held, zero, BT, STAGES, SPARSE, HALF
    )
    acc = finish_steps(acc, empty, stage, BT, STAGES)
    part = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
    rows = 64 * HALF + gl.arange(0, 64, gl.SliceLayout(1, acc.type.layout))
    columns = gl.arange(0, BT, gl.SliceLayout(0, acc.type.layout))
    gl.store(part_pointer + part.to(gl.int64) * (128 * BT) + rows[:, None] * BT + columns[None, :], acc)


@gluon.jit(do_not_specialize=("k_steps", "per_split", "zero"))
def ternary_gemm_split_kernel(
    x, w, part_pointer, k_steps, per_split, zero,
    BT: gl.constexpr, STAGES: gl.constexpr, SPARSE: gl.constexpr,
):  # fmt: skip
    """part [splits, panels, 128, BT] int32 = T @ x^T over ``per_split`` k steps each; the last part may have fewer.

    ``x`` and ``w`` are tensor descriptors (blocks [BT, 128] int8, [32, 32] int32); ``zero`` is 0. The grid is
    (panels, splits). Launch with 4 warps: those of the first consumer.
    """
    xs = gl.allocate_shared_memory(gl.int8, [STAGES, BT, 128], x.layout)
    ws = gl.allocate_shared_memory(gl.int32, [STAGES, 32, 32], w.layout)
    full, empty = ring(STAGES)
    gl.warp_specialize(
        [
            (_consumer, (part_pointer, xs, ws, full, empty, k_steps, per_split, zero, BT, STAGES, SPARSE, 0)),
            (_consumer, (part_pointer, xs, ws, full, empty, k_steps, per_split, zero, BT, STAGES, SPARSE, 1)),
            (_producer, (x, w, xs, ws, full, empty, k_steps, per_split, STAGES)),
        ],
        [4, 4],
    )
