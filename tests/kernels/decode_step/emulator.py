"""An emulator of PTX in plain Python that runs a whole grid: programs hand data to each other and threads part ways.

``tests/kernels/ptx_emulator.py`` runs one program whose threads stay together. The decode step needs more: its programs
wait for each other, and its threads branch apart. Here every thread has a place of its own in the program, and the
threads at the lowest place go on. A program gives way to the others at every backward branch, so a loop that waits for
another program ends. Only what the decode step compiles to is known; anything else is refused.

Values are numpy arrays of raw bits, uint64, one element a thread. ``%globaltimer`` counts its own reads. Copies to
shared memory come at once. Races between the threads of a program cannot be seen this way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tests.kernels.decode_step.arithmetic import U, arithmetic, bits32, float_bits, floats, s32, width_of
from tests.kernels.decode_step.code import Code

_LANE = np.arange(32)
_G, _T = _LANE // 4, _LANE % 4
_COMPARE = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Memory:
    """Tensors of a kernel at addresses; an access outside of all tensors is refused.

    Args:
        size: The room for all tensors, in bytes.
    """

    BASE, GAP = 1 << 30, 4096

    def __init__(self, size: int = 1 << 26) -> None:
        self._bytes, self._top = np.zeros(size, np.uint8), self.GAP
        self._inside = np.zeros(size, bool)

    def add(self, array: np.ndarray) -> int:
        """Place a copy of an array and return its address, a multiple of 256."""
        raw, at = np.ascontiguousarray(array).view(np.uint8).reshape(-1), self._top
        self._bytes[at : at + len(raw)], self._inside[at : at + len(raw)] = raw, True
        self._top = (at + len(raw) + self.GAP) // 256 * 256
        return self.BASE + at

    def get(self, address: int, like: np.ndarray) -> np.ndarray:
        """The array at an address, in the shape and dtype of another array."""
        start = address - self.BASE
        return self._bytes[start : start + like.nbytes].view(like.dtype).reshape(like.shape).copy()

    def places(self, addresses: np.ndarray, count: int) -> np.ndarray:
        """The places of ``count`` bytes at each address."""
        where = (addresses - self.BASE)[:, None] + np.arange(count)
        if not (where >= 0).all() or not self._inside[where].all():
            raise IndexError("an access outside of every tensor")
        return where

    def read(self, addresses: np.ndarray, count: int) -> np.ndarray:
        return self._bytes[self.places(addresses, count)]

    def write(self, addresses: np.ndarray, values: np.ndarray) -> None:
        self._bytes[self.places(addresses, values.shape[1])] = values


class Program:
    """One program of a grid.

    Args:
        code: The kernel.
        memory: The tensors.
        arguments: The arguments of the kernel, addresses and integers.
        number: The number of the program.
        shared: Bytes of shared memory, which hold anything at first.
        threads: The number of threads.
    """

    now = 0  # the clock of all programs

    def __init__(
        self, code: Code, memory: Memory, arguments: Sequence[int], number: int, shared: int, threads: int = 256
    ) -> None:
        self.code, self.memory, self.arguments, self.threads = code, memory, arguments, threads
        self.registers = [np.zeros(threads, U) for _ in range(code.count)]
        self.shared = np.random.default_rng(number).integers(0, 256, shared, dtype=np.uint8)
        self.special = {"%tid.x": np.arange(threads, dtype=U), "%ctaid.x": np.full(threads, number, U)}
        self.barriers: dict[int, int] = {}

    def run(self) -> Iterator[None]:
        """Execute the program; yields where other programs may go on."""
        ended = len(self.code.statements)
        places, everybody = np.zeros(self.threads, np.int64), np.ones(self.threads, bool)
        at, together = 0, True  # as long as all threads are at one place, ``places`` is not kept
        while at < ended:
            here = everybody if together else places == at
            guard, operation, operands = self.code.statements[at]
            active = here if guard is None else here & (self.registers[guard[1]].astype(bool) ^ guard[0])
            if operation in ("bra", "ret"):
                target = operands if operation == "bra" else ended
                leave, stay = active.any(), (here & ~active).any()
                if together:
                    places[:] = at
                places[here] = at + 1
                places[active] = target
                together = together and not (leave and stay)
                if leave and target <= at:
                    yield
            else:
                if active.any():
                    self._execute(operation, operands, active)
                if together:
                    at += 1
                    continue
                places[here] = at + 1
            at = int(places.min())
            together = together or bool((places == at).all())

    def _value(self, operand: tuple[Any, ...]) -> np.ndarray:
        if operand[0] == "register":
            return self.registers[operand[1]]
        if operand[0] == "number":
            return np.full(self.threads, operand[1], U)
        if operand[1] == "%globaltimer":
            Program.now += 1
            return np.full(self.threads, Program.now, U)
        return self.special[operand[1]]

    def _set(self, operand: tuple[Any, ...], value: np.ndarray, active: np.ndarray) -> None:
        if operand[0] == "sink":
            return
        self.registers[operand[1]] = np.where(active, value.astype(U), self.registers[operand[1]])

    def _address(self, operand: tuple[Any, ...]) -> np.ndarray:
        return self._value(operand[1]).view(np.int64) + operand[2]

    def _execute(self, operation: str, operands: list[Any], active: np.ndarray) -> None:
        parts = operation.split(".")
        kind = parts[0]
        if kind in ("bar", "fence") or "prefetch" in parts:
            return
        if kind in ("mov", "ld", "st", "setp", "mma", "mbarrier", "cp", "red", "atom"):
            getattr(self, f"_{kind}")(parts, operands, active)
            return
        values = [self._value(operand) for operand in operands[1:]]
        if kind == "shfl":
            result = values[0].reshape(-1, 32)[:, _LANE ^ int(values[1][0])].reshape(-1)
        elif kind == "redux":
            warps = values[0].reshape(-1, 32)
            assert len(set(active.reshape(-1, 32).sum(1)) - {0, 32}) == 0, "a part of a warp reduces"
            if parts[2] == "max":
                result = np.repeat(warps.max(1), 32)
            else:
                signed = s32(warps.reshape(-1)).reshape(-1, 32)
                result = np.repeat(bits32(signed.min(1) if parts[2] == "min" else signed.sum(1)), 32)
        else:
            result = arithmetic(kind, parts, values)
        self._set(operands[0], result, active)

    def _mov(self, parts: list[str], operands: list[Any], active: np.ndarray) -> None:
        target, source = operands
        width = 64 if parts[1] == "pred" else width_of(parts[1])
        if source[0] == "vector":
            part = width // len(source[1])
            values = [(self._value(one) & U((1 << part) - 1)) << U(part * i) for i, one in enumerate(source[1])]
            self._set(target, np.bitwise_or.reduce(values), active)
        elif target[0] == "vector":
            part, value = width // len(target[1]), self._value(source)
            for i, one in enumerate(target[1]):
                self._set(one, (value >> U(part * i)) & U((1 << part) - 1), active)
        else:
            self._set(target, self._value(source) & U((1 << width) - 1), active)

    def _ld(self, parts: list[str], operands: list[Any], active: np.ndarray) -> None:
        target, source = operands
        if parts[1] == "param":
            self._set(target, np.full(self.threads, self.arguments[source[1]], U), active)
            return
        targets = target[1] if target[0] == "vector" else [target]
        size = width_of(parts[-1]) // 8
        count, address = size * len(targets), self._address(source)[active]
        assert (address % count == 0).all(), "misaligned load"
        raw = np.zeros((self.threads, count), np.uint8)
        if "shared" in parts:
            raw[active] = self.shared[address[:, None] + np.arange(count)]
        else:
            raw[active] = self.memory.read(address, count)
        for i, one in enumerate(targets):
            piece = np.ascontiguousarray(raw[:, size * i : size * (i + 1)])
            self._set(one, piece.view(_UNSIGNED[size]).reshape(-1), active)

    def _st(self, parts: list[str], operands: list[Any], active: np.ndarray) -> None:
        target, source = operands
        sources, size = source[1] if source[0] == "vector" else [source], width_of(parts[-1]) // 8
        raw = np.concatenate(
            [np.ascontiguousarray(self._value(one)).view(np.uint8).reshape(-1, 8)[:, :size] for one in sources], 1
        )[active]
        address = self._address(target)[active]
        assert (address % raw.shape[1] == 0).all(), "misaligned store"
        if "shared" in parts:
            self.shared[address[:, None] + np.arange(raw.shape[1])] = raw
        else:
            self.memory.write(address, raw)

    def _red(self, parts: list[str], operands: list[Any], active: np.ndarray) -> None:
        """A reduction in memory: the larger of two integers, or a sum."""
        type_ = np.int64 if parts[-1] == "s64" else np.uint32
        for thread in np.flatnonzero(active):
            address = self._address(operands[0])[thread : thread + 1]
            old = self.memory.read(address, np.dtype(type_).itemsize).view(type_)
            value = self._value(operands[1])[thread : thread + 1].astype(type_)
            new = np.maximum(old, value) if parts[-2] == "max" else old + value
            self.memory.write(address, new.view(np.uint8).reshape(1, -1))

    def _atom(self, parts: list[str], operands: list[Any], active: np.ndarray) -> None:
        """The same for one thread, which gets the old value."""
        assert active.sum() == 1, "several threads at once"
        old = self.memory.read(self._address(operands[1])[active], width_of(parts[-1]) // 8)
        self._set(operands[0], np.full(self.threads, int.from_bytes(old.tobytes(), "little"), U), active)
        self._red(parts, operands[1:], active)

    def _setp(self, parts: list[str], operands: list[Any], active: np.ndarray) -> None:
        a, b = (self._value(operand) for operand in operands[1:3])
        kind = parts[-1]
        if kind == "s64":
            a, b = a.view(np.int64), b.view(np.int64)
        else:
            mask = U((1 << width_of(kind)) - 1) if width_of(kind) < 64 else U(2**64 - 1)
            a, b = (s32(x) if kind == "s32" else floats(x) if kind == "f32" else x & mask for x in (a, b))
        result = _COMPARE[parts[1]](a, b)
        if parts[2] == "and":
            result = result & self._value(operands[3]).astype(bool)
        self._set(operands[0], result, active)

    def _mbarrier(self, parts: list[str], operands: list[Any], active: np.ndarray) -> None:
        """An mbarrier of one arrival, which counts the copies that have come: its parity is that number's."""
        if parts[1] == "init":
            for address in self._address(operands[0])[active]:
                self.barriers[int(address)] = 0
        elif parts[1] == "try_wait":
            address, parity = self._address(operands[1]), self._value(operands[2])
            come = np.array([self.barriers.get(int(a), 0) for a in address], U)
            self._set(operands[0], (come & U(1)) != (parity & U(1)), active)

    def _cp(self, parts: list[str], operands: list[Any], active: np.ndarray) -> None:
        target, source, size, barrier = (self._value(o) if o[0] != "memory" else self._address(o) for o in operands[:4])
        for thread in np.flatnonzero(active):
            assert target[thread] % 16 == source[thread] % 16 == int(size[thread]) % 16 == 0, "misaligned copy"
            count = int(size[thread])
            piece = self.memory.read(source[thread : thread + 1].astype(np.int64), count)
            self.shared[int(target[thread]) : int(target[thread]) + count] = piece[0]
            self.barriers[int(barrier[thread])] += 1

    def _mma(self, parts: list[str], operands: list[Any], active: np.ndarray) -> None:
        d = operands[0][1]
        a, b, c = ([self._value(one).reshape(-1, 32) for one in vector[1]] for vector in operands[1:4])
        warps = len(a[0])
        depth = 32 if parts[3] == "m16n8k32" else 16
        left, right = np.zeros((warps, 16, depth)), np.zeros((warps, depth, 8))
        per_register = depth // 8
        for i, registers in ((0, a), (1, b)):
            for r, register in enumerate(registers):
                words = np.ascontiguousarray(register.astype(np.uint32))[..., None]
                if depth == 32:
                    values = words.view(np.int8 if i else np.uint8).astype(np.float64)
                else:
                    halves = words.view(np.uint16).astype(np.uint32) << np.uint32(16)
                    values = halves.view(np.float32).astype(np.float64)
                for e in range(per_register):
                    if i:
                        right[:, per_register * 4 * r + per_register * _T + e, _G] = values[:, :, e]
                    else:
                        column = per_register * _T + e + per_register * 4 * (r // 2)
                        left[:, _G + 8 * (r % 2), column] = values[:, :, e]
        with np.errstate(all="ignore"):
            product = left @ right
            for i in range(4):
                part = product[:, _G + 8 * (i // 2), 2 * _T + i % 2]
                if depth == 32:
                    result = bits32((part + s32(c[i].reshape(-1)).reshape(-1, 32)).astype(np.int64))
                else:
                    result = float_bits(part + floats(c[i].reshape(-1)).reshape(-1, 32))
                self._set(d[i], result.reshape(-1), active)


def run_grid(programs: Sequence[Program], missing: Sequence[int] = ()) -> None:
    """Execute programs together, in turns; those in ``missing`` never start, as if the GPU held them back."""
    running = [program.run() for i, program in enumerate(programs) if i not in missing]
    while running:
        running = [program for program in running if next(program, "ended") != "ended"]
