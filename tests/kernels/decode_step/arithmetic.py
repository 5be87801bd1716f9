"""What PTX instructions compute, on numpy arrays of raw bits: uint64, one element a thread."""

from __future__ import annotations

import re

import numpy as np

U = np.uint64
LOW = U(0xFFFFFFFF)


def floats(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.float32)


def float_bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.astype(np.float32)).view(np.uint32).astype(U)


def s32(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.int32).astype(np.int64)


def bits32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int64).view(U) & LOW


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = float_bits(values)
    rounded = (bits + U(0x7FFF) + ((bits >> U(16)) & U(1))) >> U(16)
    return np.where(np.isnan(values), U(0x7FFF), rounded) & U(0xFFFF)


def width_of(kind: str) -> int:
    return int(re.sub(r"\D", "", kind))


def arithmetic(kind: str, parts: list[str], x: list[np.ndarray]) -> np.ndarray:
    """What an instruction without access to memory computes from the bits of its operands."""
    last = parts[-1]
    if kind == "selp":
        return np.where(x[2].astype(bool), x[0], x[1])
    if kind == "cvt":
        return _convert(parts[1:], x)
    if kind == "prmt":
        return _permute(*x)
    if kind == "dp4a":
        types = (np.uint8 if parts[1] == "u32" else np.int8, np.int8)
        a, b = (
            np.ascontiguousarray(v.astype(np.uint32)).view(t).reshape(-1, 4).astype(np.int64)
            for v, t in zip(x, types, strict=False)
        )
        return bits32((a * b).sum(1) + s32(x[2]))
    if kind == "bfe":
        field = (x[0] >> x[1]) & ((U(1) << x[2]) - U(1))
        sign = U(1) << (x[2] - U(1)) if last[0] == "s" else U(0)
        return ((field ^ sign) - sign) & LOW
    if last == "f32":
        return float_bits(_float_arithmetic(kind, [floats(v) for v in x]))
    width = 1 if last == "pred" else width_of(last)
    mask = U((1 << width) - 1)
    if kind in ("and", "or", "xor"):
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[kind](x[0], x[1]) & mask
    if kind == "not":
        return ~x[0] & mask
    if kind == "shl":
        return np.where(x[1] < U(width), x[0] << np.minimum(x[1], U(63)), U(0)) & mask
    if kind == "shr" and last[0] != "s":
        return np.where(x[1] < U(width), (x[0] & mask) >> np.minimum(x[1], U(63)), U(0))
    return _integer_arithmetic(kind, parts[1], last[0] == "s", width, x)


def _convert(parts: list[str], x: list[np.ndarray]) -> np.ndarray:
    if parts == ["rn", "f32", "s32"]:
        return float_bits(s32(x[0]))
    if parts == ["rn", "bf16", "f32"]:
        return _to_bfloat16(floats(x[0]))
    if parts == ["rn", "bf16x2", "f32"]:
        return _to_bfloat16(floats(x[1])) | _to_bfloat16(floats(x[0])) << U(16)
    if parts == ["f32", "bf16"]:
        return (x[0] & U(0xFFFF)) << U(16)
    target, source = parts
    value = x[0] & U((1 << width_of(source)) - 1)
    if source == "s32":
        value = s32(value).view(U)
    return value & U((1 << width_of(target)) - 1)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = np.stack([v >> U(8 * i) & U(255) for v in (a, b) for i in range(4)])
    nibbles = [(selector >> U(4 * i) & U(15)).astype(np.int64) for i in range(4)]
    return np.bitwise_or.reduce(
        [np.take_along_axis(both, nibble[None], 0)[0] << U(8 * i) for i, nibble in enumerate(nibbles)]
    )


def _float_arithmetic(kind: str, y: list[np.ndarray]) -> np.ndarray:
    wide = [v.astype(np.float64) for v in y]
    with np.errstate(all="ignore"):
        if kind == "fma":
            return wide[0] * wide[1] + wide[2]
        if kind in ("mul", "add", "sub", "div"):
            return {"mul": np.multiply, "add": np.add, "sub": np.subtract, "div": np.divide}[kind](*y)
        if kind in ("max", "min"):
            return {"max": np.fmax, "min": np.fmin}[kind](*y)
        if kind == "rsqrt":
            return 1 / np.sqrt(wide[0])
        return {"neg": np.negative, "rcp": np.reciprocal, "ex2": np.exp2}[kind](wide[0])


def _integer_arithmetic(kind: str, form: str, signed: bool, width: int, x: list[np.ndarray]) -> np.ndarray:
    if form == "wide":
        a, b = (s32(v) if signed else (v & LOW).view(np.int64) for v in x[:2])
        return (a * b).view(U) + (x[2] if kind == "mad" else U(0))
    if width == 64:
        c = [v.view(np.int64) if signed else v for v in x]
    else:
        c = [s32(v) if signed else (v & LOW).view(np.int64) for v in x]
    if form == "hi":
        assert width == 32
        return np.array([int(p) * int(q) >> 32 & 0xFFFFFFFF for p, q in zip(c[0], c[1], strict=True)], U)
    if kind in ("add", "sub", "mul", "min", "max"):
        c = c[:2]
        operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum}[kind]
        result = operation(*c)
        if form == "relu":
            result = np.maximum(result, 0)
    elif kind == "mad":
        result = c[0] * c[1] + c[2]
    elif kind == "shr":
        result = c[0] >> np.minimum(x[1], U(width - 1)).astype(np.int64)
    elif kind == "div":
        divisor = np.where(c[1] == 0, 1, c[1])
        result = (np.abs(c[0]) // np.abs(divisor)) * np.sign(c[0]) * np.sign(divisor) if signed else c[0] // divisor
    else:
        raise NotImplementedError(f"{kind}.{form}")
    return result.astype(np.int64).view(U) & (LOW if width == 32 else U(2**64 - 1)) if signed or width == 32 else result
