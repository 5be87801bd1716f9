"""What PTX instructions compute, on numpy arrays of raw bits: uint64, one element a thread. From the PTX ISA."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

LANES = 32
_LANE = np.arange(LANES)
G, T = _LANE // 4, _LANE % 4


def signed(bits: np.ndarray, width: int) -> np.ndarray:
    kind = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}[width]
    return bits.astype({8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[width]).view(kind).astype(np.int64)


def bits_of(values: np.ndarray, width: int) -> np.ndarray:
    mask = np.uint64((1 << width) - 1)
    return values.astype(np.int64).view(np.uint64) & mask if values.dtype.kind == "i" else values & mask


def floats(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.float32)


def _bytes_of(registers: Sequence[np.ndarray]) -> np.ndarray:
    """Registers of four int8, each ``[warps, 32]`` -> int64 ``[warps, 32, registers, 4]``."""
    words = np.stack(registers, -1).astype(np.uint32)
    return np.ascontiguousarray(words)[..., None].view(np.int8).reshape(*words.shape, 4).astype(np.int64)


def _operand_b(b: Sequence[np.ndarray]) -> np.ndarray:
    """Fragments of B -> ``[warps, K, 8]``: register i of lane (g, t) holds rows 16 i + 4 t to + 3 of column g."""
    values = _bytes_of(b)
    matrix = np.zeros((len(values), 16 * len(b), 8), np.int64)
    for i in range(len(b)):
        for byte in range(4):
            matrix[:, 16 * i + 4 * T + byte, G] = values[:, _LANE, i, byte]
    return matrix


def _result(product: np.ndarray, c: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``[warps, 16, 8]`` plus the fragments of C -> the fragments of D."""
    fragments = []
    for i in range(4):
        sums = product[:, G + 8 * (i // 2), 2 * T + i % 2] + signed(c[i], 32)
        assert np.abs(sums).max() < 2**31
        fragments.append(bits_of(sums, 32))
    return fragments


def mma_m16n8k32(a: Sequence[np.ndarray], b: Sequence[np.ndarray], c: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``mma.sync.m16n8k32.row.col.s32.s8.s8.s32``; every register is ``[warps, 32]``."""
    values = _bytes_of(a)
    dense = np.zeros((len(values), 16, 32), np.int64)
    for register in range(4):
        for byte in range(4):
            dense[:, G + 8 * (register % 2), 4 * T + byte + 16 * (register // 2)] = values[:, _LANE, register, byte]
    return _result(dense @ _operand_b(b), c)


def mma_sp_m16n8k64(
    a: Sequence[np.ndarray], b: Sequence[np.ndarray], c: Sequence[np.ndarray], metadata: np.ndarray, selector: int
) -> list[np.ndarray]:
    """``mma.sp::ordered_metadata.sync.m16n8k64.row.col.s32.s8.s8.s32``; every register is ``[warps, 32]``.

    Register r of A in lane (g, t) holds the kept values of row ``g + 8 (r % 2)`` among the eight dense columns from
    ``8 t + 32 (r // 2)`` on: two groups of four, two values each. The metadata of lane (g, t) are eight pairs of 2-bit
    positions, of row ``g + 8 (t % 2)`` and the groups from column ``32 (t // 2)`` on.
    """
    if selector != 0:
        raise ValueError(f"m16n8k64 on 8-bit values takes metadata of all threads: the selector is 0, not {selector}")
    values = _bytes_of(a)
    warps = len(values)
    first, second = np.zeros((warps, 16, 16), np.int64), np.zeros((warps, 16, 16), np.int64)
    for i in range(8):
        first[:, G + 8 * (T % 2), 8 * (T // 2) + i] = (metadata >> np.uint64(4 * i)) & np.uint64(3)
        second[:, G + 8 * (T % 2), 8 * (T // 2) + i] = (metadata >> np.uint64(4 * i + 2)) & np.uint64(3)
    if not (first < second).all():
        raise ValueError("ordered metadata need the first position before the second")
    dense = np.zeros((warps, 16, 64), np.int64)
    w = np.arange(warps)[:, None]
    for register in range(4):
        row = G + 8 * (register % 2)
        for byte in range(4):
            group = 2 * T + 8 * (register // 2) + byte // 2
            position = (second if byte % 2 else first)[:, row, group]
            dense[w, row, 4 * group + position] = values[:, _LANE, register, byte]
    return _result(dense @ _operand_b(b), c)


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """``prmt.b32``: each nibble of the selector picks a byte of {b, a}; its high bit would replicate the sign."""
    both = np.stack([(a >> np.uint64(8 * i)) & np.uint64(255) for i in range(4)] + [
        (b >> np.uint64(8 * i)) & np.uint64(255) for i in range(4)
    ])  # fmt: skip
    found = np.zeros_like(selector)
    for i in range(4):
        nibble = (selector >> np.uint64(4 * i)) & np.uint64(15)
        assert not (nibble & np.uint64(8)).any(), "sign replication is not emulated"
        found |= np.take_along_axis(both, nibble[None].astype(np.int64), 0)[0] << np.uint64(8 * i)
    return found


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)


def _divide(kind: str, width: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (signed(a, width) / signed(b, width)).astype(np.int64)  # PTX rounds towards zero


INTEGER: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda kind, width, a, b: a + b,
    "sub": lambda kind, width, a, b: a - b,
    "mul.lo": lambda kind, width, a, b: a * b,
    "mul.hi": lambda kind, width, a, b: (
        signed(a, width) * signed(b, width) >> width
        if kind.startswith("s")
        else (a & np.uint64(0xFFFFFFFF)) * (b & np.uint64(0xFFFFFFFF)) >> np.uint64(32)
    ),
    "mad.lo": lambda kind, width, a, b, c: a * b + c,
    "and": lambda kind, width, a, b: a & b,
    "or": lambda kind, width, a, b: a | b,
    "xor": lambda kind, width, a, b: a ^ b,
    "not": lambda kind, width, a: ~a,
    "shl": lambda kind, width, a, b: np.where(b < width, a << np.minimum(b, 63).astype(np.uint64), np.uint64(0)),
    "shr": lambda kind, width, a, b: (
        signed(a, width) >> np.minimum(b, width - 1).astype(np.int64)
        if kind.startswith("s")
        else (a & np.uint64((1 << width) - 1)) >> np.minimum(b, 63).astype(np.uint64)
    ),
    "min": lambda kind, width, a, b: np.minimum(signed(a, width), signed(b, width)),
    "max": lambda kind, width, a, b: np.maximum(signed(a, width), signed(b, width)),
    "div": _divide,
}
