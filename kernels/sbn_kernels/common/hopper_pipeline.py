"""Gluon device code that the Hopper kernels share: the ring of buffers, its barriers, and inline PTX around ``wgmma``.

Needs Triton >= 3.9; only device code imports this file.

A producer fills a ring of shared-memory buffers by TMA, two consumers of four warps each multiply. Waits and releases
are inline PTX, because ``mbarrier.wait`` in a loop that also reads shared memory gets a ``bar.sync`` of all consumers
from Triton's analysis, and the two consumers are meant to run apart.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.constexpr_function
def matrix_descriptor(name: str, address: str) -> list[str]:
    """PTX: ``name``, the shared-memory matrix descriptor of a tile of 128-byte rows, in 16-byte units.

    128-byte swizzle (bit 62), 1024 bytes from one group of 8 rows to the next (bits 32 to 45).
    """
    return [
        f".reg .b32 {name}_address;",
        f".reg .b64 {name};",
        f"and.b32 {name}_address, {address}, 0x3ffff;",
        f"shr.u32 {name}_address, {name}_address, 4;",
        f"cvt.u64.u32 {name}, {name}_address;",
        f"or.b64 {name}, {name}, 0x4000004000010000;",
    ]


@gluon.constexpr_function
def await_phase(outs, ins):
    """PTX: waits until the phase of a barrier with the given parity is complete."""
    barrier, parity = ins
    return "\n".join(
        [
            "{",
            ".reg .pred done;",
            "again:",
            f"mbarrier.try_wait.parity.shared::cta.b64 done, [{barrier[0]}], {parity[0]};",
            "@!done bra.uni again;",
            "}",
        ]
    )


@gluon.constexpr_function
def await_multiplications(outs, ins):
    """PTX: waits for every ``wgmma`` of the warp group."""
    return "wgmma.wait_group.sync.aligned 0;"


@gluon.constexpr_function
def release_text(barrier: str, wanted: str, before: str) -> str:
    """PTX: ``before``, then one arrival a warp at ``barrier`` if ``wanted`` is not 0."""
    return "\n".join(
        [
            "{",
            ".reg .pred p, q;",
            ".reg .b32 lane;",
            before,
            "mov.u32 lane, %laneid;",
            "setp.eq.u32 p, lane, 0;",
            f"setp.ne.u32 q, {wanted}, 0;",
            "and.pred p, p, q;",
            f"@p mbarrier.arrive.shared::cta.b64 _, [{barrier}];",
            "}",
        ]
    )


@gluon.constexpr_function
def release(outs, ins):
    """PTX: one arrival a warp at a barrier, if wanted."""
    barrier, wanted = ins
    return release_text(barrier[0], wanted[0], "")


@gluon.constexpr_function
def tied(accumulators, inputs):
    """Constraints of inline assembly: accumulators tied to themselves, then ``inputs`` free registers."""
    return ",".join(["=r"] * accumulators + [str(i) for i in range(accumulators)] + ["r"] * inputs)


@gluon.jit
def ring(STAGES: gl.constexpr):
    """Barriers of a ring between one producer and two consumers of four warps: a stage is full, a stage is empty."""
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=8)
    return full, empty


@gluon.jit
def split_columns(x, PARTS: gl.constexpr):
    """[R, C] -> PARTS tensors [R, C / PARTS], in registers."""
    parts = (x,)
    for _ in gl.static_range(PARTS.bit_length() - 1):
        halves = ()
        for j in gl.static_range(len(parts)):
            part = parts[j]
            halves += part.reshape(part.shape[0], 2, part.shape[1] // 2).permute(0, 2, 1).split()
        parts = halves
    return parts
