"""An emulator of PTX in plain Python: runs a compiled kernel without a GPU, with all threads of a program in lockstep.

The emulator knows the instructions that the kernels of ``gemm/sm80`` compile to, and refuses any other. It is written
from the PTX ISA. Values are numpy arrays of raw bits, uint64, one element a thread. A branch must be taken by all
threads or by none.

``cp.async`` copies are the delicate part, and two extremes are emulated. ``late``: what a copy brings becomes visible
at the first barrier after the wait for its group, not before. ``early``: at once, so that a copy that overwrites a
buffer too early is seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

LANES = 32
_LANE = np.arange(LANES)
G, T = _LANE // 4, _LANE % 4
_STATEMENT = re.compile(r"^(?:@(!?)(\S+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)


def _signed(bits: np.ndarray, width: int) -> np.ndarray:
    kind = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}[width]
    return bits.astype({8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[width]).view(kind).astype(np.int64)


def _bits(values: np.ndarray, width: int) -> np.ndarray:
    mask = np.uint64((1 << width) - 1)
    return values.astype(np.int64).view(np.uint64) & mask if values.dtype.kind == "i" else values & mask


def _floats(bits: np.ndarray) -> np.ndarray:
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
        sums = product[:, G + 8 * (i // 2), 2 * T + i % 2] + _signed(c[i], 32)
        assert np.abs(sums).max() < 2**31
        fragments.append(_bits(sums, 32))
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


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)


class Memory:
    """Tensors of a kernel at addresses; an access outside of all tensors is refused."""

    def __init__(self) -> None:
        self._buffers: list[tuple[int, np.ndarray]] = []

    def add(self, array: np.ndarray) -> int:
        """Place an array and return its address, a multiple of 256."""
        address = 1 << 20
        for first, taken in self._buffers:
            address = max(address, (first + taken.nbytes + 4096) // 256 * 256)
        self._buffers.append((address, array.reshape(-1).view(np.uint8)))
        return address

    def _find(self, address: int, count: int) -> tuple[np.ndarray, int]:
        for first, array in self._buffers:
            if first <= address and address + count <= first + array.nbytes:
                return array, address - first
        raise IndexError(f"an access of {count} bytes at {address:#x} is outside of every tensor")

    def read(self, address: int, count: int) -> np.ndarray:
        array, start = self._find(address, count)
        return array[start : start + count].copy()

    def write(self, address: int, values: np.ndarray) -> None:
        array, start = self._find(address, len(values))
        array[start : start + len(values)] = values


class Program:
    """One program of a kernel.

    Args:
        ptx: The text of the kernel.
        memory: The tensors.
        arguments: The arguments of the kernel in their order, addresses and integers.
        program: The number of the program along x.
        warps: Warps of the program.
        shared: Bytes of shared memory.
        late: When copies become visible; see the module.
    """

    def __init__(
        self, ptx: str, memory: Memory, arguments: Sequence[int], program: int, warps: int, shared: int, late: bool
    ) -> None:
        self.memory, self.arguments, self.late = memory, arguments, late
        self.threads = LANES * warps
        self.registers: dict[str, np.ndarray] = {
            "%tid.x": np.arange(self.threads, dtype=np.uint64),
            "%ctaid.x": np.full(self.threads, program, np.uint64),
        }
        # What shared memory holds before the first write must not matter.
        self.shared = np.random.default_rng(program).integers(0, 256, shared, dtype=np.uint8)
        self._open: list[tuple[np.ndarray, np.ndarray]] = []
        self._groups: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self._waited: list[tuple[np.ndarray, np.ndarray]] = []
        self.statements, self.labels = parse(ptx)
        self.counts: dict[str, int] = {}

    def run(self) -> None:
        """Execute the program to its ``ret``."""
        at = 0
        while True:
            guard, operation, operands = self.statements[at]
            at += 1
            active = np.ones(self.threads, bool)
            if guard is not None:
                active = self.registers[guard[1]].astype(bool) ^ guard[0]
            self.counts[operation] = self.counts.get(operation, 0) + 1
            if operation == "ret":
                return
            if operation.startswith("bra"):
                assert active.all() or not active.any(), "threads part ways"
                if active.any():
                    at = self.labels[operands]
                continue
            self._execute(operation, operands, active)

    # Operands.

    def _value(self, name: str, width: int = 64) -> np.ndarray:
        if name in self.registers:
            return self.registers[name]
        if name == "global_smem":
            return np.zeros(self.threads, np.uint64)
        if name.startswith("0f"):
            return np.full(self.threads, int(name[2:], 16), np.uint64)
        return np.full(self.threads, int(name, 0) & ((1 << 64) - 1), np.uint64) & np.uint64((1 << width) - 1)

    def _address(self, text: str) -> np.ndarray:
        base, _, offset = text.strip("[] ").partition("+")
        return self._value(base.strip()).view(np.int64) + int(offset or 0)

    def _set(self, name: str, value: np.ndarray, active: np.ndarray) -> None:
        if name == "_":
            return
        old = self.registers.get(name, np.zeros(self.threads, np.uint64))
        self.registers[name] = np.where(active, value, old)

    # Instructions.

    def _execute(self, operation: str, operands: str, active: np.ndarray) -> None:
        parts = operation.split(".")
        args = split_operands(operands)
        if operation.startswith(("mma.", "mma:")) or parts[0] == "mma":
            self._multiply(operation, args)
        elif parts[0] == "ld":
            self._load(parts, args, active)
        elif parts[0] == "st":
            self._store(parts, args, active)
        elif parts[0] == "ldmatrix":
            self._ldmatrix(args)
        elif parts[0] == "cp":
            self._copy(operation, args, active)
        elif parts[0] == "bar":
            self._land(self._waited)
            self._waited = []
        elif parts[0] == "mov":
            self._move(args, int(re.sub(r"\D", "", parts[-1]) or 64), active)
        elif parts[0] == "setp":
            self._compare(parts, args, active)
        else:
            self._set(args[0], self._arithmetic(parts, args[1:]), active)

    def _move(self, args: list[str], width: int, active: np.ndarray) -> None:
        target, source = args
        if source.startswith("{"):
            low, high = (self._value(name) for name in split_operands(source[1:-1]))
            half = width // 2
            self._set(target, (low & np.uint64((1 << half) - 1)) | (high << np.uint64(half)), active)
        elif target.startswith("{"):
            half = width // 2
            for i, name in enumerate(split_operands(target[1:-1])):
                part = (self._value(source) >> np.uint64(half * i)) & np.uint64((1 << half) - 1)
                self._set(name, part, active)
        else:
            self._set(target, self._value(source, width), active)

    def _compare(self, parts: list[str], args: list[str], active: np.ndarray) -> None:
        width = int(parts[2][1:])
        a, b = (self._value(name, width) for name in args[1:])
        if parts[2][0] == "s":
            a, b = _signed(a, width), _signed(b, width)
        compare = {"lt": np.less, "gt": np.greater, "ne": np.not_equal, "eq": np.equal, "le": np.less_equal}
        compare["ge"] = np.greater_equal
        self._set(args[0], compare[parts[1]](a, b).astype(np.uint64), active)

    def _arithmetic(self, parts: list[str], names: list[str]) -> np.ndarray:
        kind = parts[-1]
        width = 1 if kind == "pred" else int(re.sub(r"^[a-z]+", "", kind).split("x")[0])
        name = ".".join(parts[:-1])
        values = [self._value(n, 64) for n in names]
        if parts[0] == "cvt":
            return self._convert(parts, values)
        if parts[0] == "selp":
            return np.where(values[2].astype(bool), values[0], values[1])
        if parts[0] == "prmt":
            return prmt(*values)
        if parts[0] == "bfe":
            field = (values[0] >> values[1]) & ((np.uint64(1) << values[2]) - np.uint64(1))
            if kind.startswith("s"):
                sign = np.uint64(1) << (values[2] - np.uint64(1))
                field = (field ^ sign) - sign
            return field & np.uint64((1 << width) - 1)
        if kind == "f32":
            a, b = (_floats(v) for v in values)
            return {"mul.rn": a * b, "add.rn": a + b}[name].view(np.uint32).astype(np.uint64)
        if name in ("mul.wide", "mad.wide"):
            a, b = (_signed(v, width) if kind.startswith("s") else v & np.uint64(0xFFFFFFFF) for v in values[:2])
            product = (a * b).astype(np.int64).view(np.uint64)
            return product + values[2] if parts[0] == "mad" else product
        return _bits(_INTEGER[name](kind, width, *values), width)

    def _convert(self, parts: list[str], values: list[np.ndarray]) -> np.ndarray:
        if parts[1:] == ["rn", "f32", "s32"]:
            return _signed(values[0], 32).astype(np.float32).view(np.uint32).astype(np.uint64)
        if parts[1:] == ["rn", "bf16x2", "f32"]:
            high, low = (_to_bfloat16(_floats(v)) for v in values)
            return low | (high << np.uint64(16))
        if parts[1:] == ["rn", "bf16", "f32"]:
            return _to_bfloat16(_floats(values[0]))
        if parts[1:] == ["f32", "bf16"]:
            return values[0] << np.uint64(16)
        if parts[1] == "rn":
            raise NotImplementedError(".".join(parts))
        target, source = int(parts[1][1:]), parts[2]
        value = values[0]
        if source.startswith("s"):
            return _bits(_signed(value, int(source[1:])), target)
        return value & np.uint64((1 << min(target, int(source[1:]))) - 1)

    # Memory.

    def _load(self, parts: list[str], args: list[str], active: np.ndarray) -> None:
        if parts[1] == "param":
            index = int(args[1].strip("[]").rsplit("_", 1)[1])
            self._set(args[0], np.full(self.threads, self.arguments[index], np.uint64), active)
            return
        names = split_operands(args[0][1:-1]) if args[0].startswith("{") else [args[0]]
        size = int(re.sub(r"\D", "", parts[-1])) // 8
        address = self._address(args[1])
        raw = np.zeros((self.threads, size * len(names)), np.uint8)
        for thread in np.flatnonzero(active):
            raw[thread] = self._read(parts[1], int(address[thread]), size * len(names))
        for i, name in enumerate(names):
            self._set(name, _from_bytes(raw[:, size * i : size * (i + 1)]), active)

    def _store(self, parts: list[str], args: list[str], active: np.ndarray) -> None:
        names = split_operands(args[1][1:-1]) if args[1].startswith("{") else [args[1]]
        size = int(re.sub(r"\D", "", parts[-1])) // 8
        address = self._address(args[0])
        raw = np.concatenate([_to_bytes(self._value(name), size) for name in names], 1)
        for thread in np.flatnonzero(active):
            if parts[1] == "shared":
                self.shared[address[thread] : address[thread] + raw.shape[1]] = raw[thread]
            else:
                assert address[thread] % raw.shape[1] == 0, "misaligned store"
                self.memory.write(int(address[thread]), raw[thread])

    def _read(self, space: str, address: int, count: int) -> np.ndarray:
        assert address % count == 0, "misaligned load"
        if space == "shared":
            return self.shared[address : address + count]
        return self.memory.read(address, count)

    def _ldmatrix(self, args: list[str]) -> None:
        """``ldmatrix.m8n8.x4``: the lanes 8 i to 8 i + 7 of a warp give the rows of matrix i; lane l gets 4 bytes."""
        address = self._address(args[1]).reshape(-1, LANES)
        names = split_operands(args[0][1:-1])
        for i, name in enumerate(names):
            rows = address[:, 8 * i + G] + 4 * T
            raw = self.shared[rows.reshape(-1)[:, None] + np.arange(4)]
            self.registers[name] = _from_bytes(raw)

    def _copy(self, operation: str, args: list[str], active: np.ndarray) -> None:
        if operation == "cp.async.commit_group":
            self._groups.append(self._open)
            self._open = []
        elif operation == "cp.async.wait_group":
            while len(self._groups) > int(args[0]):
                self._waited += self._groups.pop(0)
        else:
            target, source = self._address(args[0]), self._address(args[1])
            wanted = self._value(args[3]) if len(args) > 3 else np.full(self.threads, 16, np.uint64)
            raw = np.zeros((self.threads, 16), np.uint8)
            for thread in np.flatnonzero(active & (wanted > 0)):
                assert target[thread] % 16 == 0
                raw[thread] = self._read("global", int(source[thread]), 16)
            copy = (target[active], raw[active])
            if self.late:
                self._open.append(copy)
            else:
                self._land([copy])

    def _land(self, copies: list[tuple[np.ndarray, np.ndarray]]) -> None:
        for target, raw in copies:
            self.shared[target[:, None] + np.arange(16)] = raw

    def _multiply(self, operation: str, args: list[str]) -> None:
        d, a, b, c = (split_operands(text[1:-1]) for text in args[:4])
        registers = [[self._value(name).reshape(-1, LANES) for name in names] for names in (a, b, c)]
        if operation == "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32":
            metadata = self._value(args[4]).reshape(-1, LANES)
            result = mma_sp_m16n8k64(*registers, metadata, int(args[5], 0))
        elif operation == "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32":
            result = mma_m16n8k32(*registers)
        else:
            raise NotImplementedError(operation)
        for name, value in zip(d, result, strict=True):
            self.registers[name] = value.reshape(-1)


def _divide(kind: str, width: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (_signed(a, width) / _signed(b, width)).astype(np.int64)  # PTX rounds towards zero


_INTEGER: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda kind, width, a, b: a + b,
    "sub": lambda kind, width, a, b: a - b,
    "mul.lo": lambda kind, width, a, b: a * b,
    "mul.hi": lambda kind, width, a, b: (
        _signed(a, width) * _signed(b, width) >> width
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
        _signed(a, width) >> np.minimum(b, width - 1).astype(np.int64)
        if kind.startswith("s")
        else (a & np.uint64((1 << width) - 1)) >> np.minimum(b, 63).astype(np.uint64)
    ),
    "min": lambda kind, width, a, b: np.minimum(_signed(a, width), _signed(b, width)),
    "max": lambda kind, width, a, b: np.maximum(_signed(a, width), _signed(b, width)),
    "div": _divide,
}


def _from_bytes(raw: np.ndarray) -> np.ndarray:
    value = np.zeros(len(raw), np.uint64)
    for i in range(raw.shape[1]):
        value |= raw[:, i].astype(np.uint64) << np.uint64(8 * i)
    return value


def _to_bytes(value: np.ndarray, size: int) -> np.ndarray:
    return np.ascontiguousarray(value.astype("<u8")).view(np.uint8).reshape(-1, 8)[:, :size]


def split_operands(text: str) -> list[str]:
    """``{%r1, %r2}, [%r3], 4`` -> its operands; a group in braces is one operand."""
    return [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)]


def parse(ptx: str) -> tuple[list[tuple[tuple[bool, str] | None, str, str]], dict[str, int]]:
    """The statements of a kernel with their guards, and the index that each label stands for."""
    body = re.sub(r"//[^\n]*", "", ptx)
    if ".entry" in body:
        body = body[body.index(".entry") :]
        body = body[body.index("\n{") + 2 : body.rindex("ret;") + 4]
    statements: list[tuple[tuple[bool, str] | None, str, str]] = []
    labels: dict[str, int] = {}
    for line in re.split(r";|\n", body.replace("\t", " ")):
        line = line.strip()
        if label := re.match(r"^([$\w.]+):$", line):
            labels[label[1]] = len(statements)
            continue
        line = line.removeprefix("{ ").strip() if line.startswith("{ ") else line
        if not line or line in "{}" or line.startswith((".reg", ".loc", ".pragma", ".file", ".section")):
            continue
        found = _STATEMENT.match(line)
        if found is None:
            raise NotImplementedError(line)
        guard = (bool(found[1]), found[2]) if found[2] else None
        statements.append((guard, found[3], found[4].strip()))
    return statements, labels
