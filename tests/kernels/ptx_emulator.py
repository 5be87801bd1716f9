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
from collections.abc import Sequence

import numpy as np

from tests.kernels.ptx_instructions import (
    INTEGER,
    LANES,
    G,
    T,
    bits_of,
    floats,
    mma_m16n8k32,
    mma_sp_m16n8k64,
    prmt,
    signed,
    to_bfloat16,
)

_STATEMENT = re.compile(r"^(?:@(!?)(\S+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)


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
            a, b = signed(a, width), signed(b, width)
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
            a, b = (floats(v) for v in values)
            return {"mul.rn": a * b, "add.rn": a + b}[name].view(np.uint32).astype(np.uint64)
        if name in ("mul.wide", "mad.wide"):
            a, b = (signed(v, width) if kind.startswith("s") else v & np.uint64(0xFFFFFFFF) for v in values[:2])
            product = (a * b).astype(np.int64).view(np.uint64)
            return product + values[2] if parts[0] == "mad" else product
        return bits_of(INTEGER[name](kind, width, *values), width)

    def _convert(self, parts: list[str], values: list[np.ndarray]) -> np.ndarray:
        if parts[1:] == ["rn", "f32", "s32"]:
            return signed(values[0], 32).astype(np.float32).view(np.uint32).astype(np.uint64)
        if parts[1:] == ["rn", "bf16x2", "f32"]:
            high, low = (to_bfloat16(floats(v)) for v in values)
            return low | (high << np.uint64(16))
        if parts[1:] == ["rn", "bf16", "f32"]:
            return to_bfloat16(floats(values[0]))
        if parts[1:] == ["f32", "bf16"]:
            return values[0] << np.uint64(16)
        if parts[1] == "rn":
            raise NotImplementedError(".".join(parts))
        target, source = int(parts[1][1:]), parts[2]
        value = values[0]
        if source.startswith("s"):
            return bits_of(signed(value, int(source[1:])), target)
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
