"""An emulator of PTX in plain Python that runs a whole grid: programs hand data to each other and threads part ways.

``tests/kernels/ptx_emulator.py`` runs one program whose threads stay together. The decode step needs more: its programs
wait for each other, and its threads branch apart. Here every thread has a place of its own in the program, and the
threads at the lowest place go on. A program gives way to the others at every backward branch, so a loop that waits for
another program ends. Only what the decode step compiles to is known; anything else is refused.

Values are numpy arrays of raw bits, uint64, one element a thread. ``%globaltimer`` counts its own reads. Copies to
shared memory come at once. Races between the threads of a program cannot be seen this way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

U = np.uint64
LOW = U(0xFFFFFFFF)
_LANE = np.arange(32)
_G, _T = _LANE // 4, _LANE % 4
_COMPARE = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def _floats(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.float32)


def _float_bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.astype(np.float32)).view(np.uint32).astype(U)


def _s32(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.int32).astype(np.int64)


def _bits32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int64).view(U) & LOW


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = _float_bits(values)
    rounded = (bits + U(0x7FFF) + ((bits >> U(16)) & U(1))) >> U(16)
    return np.where(np.isnan(values), U(0x7FFF), rounded) & U(0xFFFF)


def _width(kind: str) -> int:
    return int(re.sub(r"\D", "", kind))


def _pieces(text: str) -> Iterator[str]:
    """Statements, labels (with their colon), and the braces of blocks."""
    statement, inside = "", 0
    for ch in text:
        if ch == "{" and (inside or statement.strip()):
            inside, statement = inside + 1, statement + ch
        elif ch == "}" and inside:
            inside, statement = inside - 1, statement + ch
        elif ch in "{}":
            yield ch
            statement = ""
        elif ch == ";":
            yield statement.strip()
            statement = ""
        elif ch == ":" and re.fullmatch(r"\s*[$\w]+", statement):
            yield statement.strip() + ":"
            statement = ""
        else:
            statement += ch


def _split(text: str) -> list[str]:
    """Operands; commas inside of braces and brackets do not separate."""
    return [part for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


class Code:
    """The statements of a kernel; registers and labels of inner blocks have scopes of their own.

    Args:
        ptx: The text of a module with one kernel.
    """

    def __init__(self, ptx: str) -> None:
        body = ptx[ptx.index(".visible .entry") :]
        body = body[body.index("\n{") + 1 :].split("$L__func_end0")[0]
        body = re.sub(r"//[^\n]*", "", body)
        body = re.sub(r"^\s*\.(loc|file|section|pragma)[^\n]*$", "", body, flags=re.M)
        self._parents: dict[int, int | None] = {0: None}
        self._registers: dict[tuple[int, str], int] = {}
        labels: dict[tuple[int, str], int] = {}
        stack, found = [0], []
        for piece in _pieces(body):
            scope = stack[-1]
            if piece == "{":
                self._parents[len(self._parents)] = scope
                stack.append(len(self._parents) - 1)
            elif piece == "}":
                stack.pop()
            elif piece.endswith(":"):
                labels[scope, piece[:-1]] = len(found)
            elif piece.startswith(".reg"):
                self._declare(scope, piece)
            elif piece and not piece.startswith("."):
                found.append((scope, piece))
        self.count = len(self._registers)
        self.statements = [self._statement(scope, text, labels) for scope, text in found]

    def _declare(self, scope: int, text: str) -> None:
        for name in text.split(None, 2)[2].split(","):
            many = re.fullmatch(r"([%\w]+)<(\d+)>", name.strip())
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
            for each in names:
                self._registers[scope, each] = len(self._registers)

    def _find(self, table: dict[tuple[int, str], int], scope: int | None, name: str) -> int | None:
        while scope is not None:
            if (scope, name) in table:
                return table[scope, name]
            scope = self._parents[scope]
        return None

    def _statement(self, scope: int, text: str, labels: dict[tuple[int, str], int]) -> tuple[Any, str, Any]:
        guard = None
        if found := re.match(r"@(!?)(%?\w+)\s+(.*)$", text, re.S):
            guard, text = (found[1] == "!", self._find(self._registers, scope, found[2])), found[3]
        operation, _, operands = text.partition(" ") if " " in text else (text, "", "")
        operation, operands = re.match(r"([a-z][\w.:]*)\s*(.*)$", text, re.S).groups()  # type: ignore[union-attr]
        if operation.startswith("bra"):
            return guard, "bra", self._find(labels, scope, operands.strip())
        return guard, operation, [self._operand(scope, part.strip()) for part in _split(operands)]

    def _operand(self, scope: int, text: str) -> tuple[Any, ...]:
        if text.startswith("{"):
            return "vector", [self._operand(scope, part.strip()) for part in text[1:-1].split(",")]
        if text.startswith("["):
            if "_param_" in text:
                return "parameter", int(text[1:-1].rsplit("_", 1)[1])
            base, _, offset = text[1:-1].partition("+")
            return "memory", self._operand(scope, base.strip()), int(offset or "0", 0)
        if text in ("%tid.x", "%ctaid.x", "%globaltimer"):
            return "special", text
        if (register := self._find(self._registers, scope, text)) is not None:
            return "register", register
        if text == "_":
            return "sink", 0
        if text == "global_smem":
            return "number", 0
        if text.startswith("0f"):
            return "number", int(text[2:], 16)
        return "number", int(text.rstrip("U"), 0) & ((1 << 64) - 1)


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
                signed = _s32(warps.reshape(-1)).reshape(-1, 32)
                result = np.repeat(_bits32(signed.min(1) if parts[2] == "min" else signed.sum(1)), 32)
        else:
            result = self._arithmetic(kind, parts, values)
        self._set(operands[0], result, active)

    def _mov(self, parts: list[str], operands: list[Any], active: np.ndarray) -> None:
        target, source = operands
        width = 64 if parts[1] == "pred" else _width(parts[1])
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
        size = _width(parts[-1]) // 8
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
        sources, size = source[1] if source[0] == "vector" else [source], _width(parts[-1]) // 8
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
        old = self.memory.read(self._address(operands[1])[active], _width(parts[-1]) // 8)
        self._set(operands[0], np.full(self.threads, int.from_bytes(old.tobytes(), "little"), U), active)
        self._red(parts, operands[1:], active)

    def _setp(self, parts: list[str], operands: list[Any], active: np.ndarray) -> None:
        a, b = (self._value(operand) for operand in operands[1:3])
        kind = parts[-1]
        if kind == "s64":
            a, b = a.view(np.int64), b.view(np.int64)
        else:
            mask = U((1 << _width(kind)) - 1) if _width(kind) < 64 else U(2**64 - 1)
            a, b = (_s32(x) if kind == "s32" else _floats(x) if kind == "f32" else x & mask for x in (a, b))
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
                    result = _bits32((part + _s32(c[i].reshape(-1)).reshape(-1, 32)).astype(np.int64))
                else:
                    result = _float_bits(part + _floats(c[i].reshape(-1)).reshape(-1, 32))
                self._set(d[i], result.reshape(-1), active)

    def _arithmetic(self, kind: str, parts: list[str], x: list[np.ndarray]) -> np.ndarray:
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
            return _bits32((a * b).sum(1) + _s32(x[2]))
        if kind == "bfe":
            field = (x[0] >> x[1]) & ((U(1) << x[2]) - U(1))
            sign = U(1) << (x[2] - U(1)) if last[0] == "s" else U(0)
            return ((field ^ sign) - sign) & LOW
        if last == "f32":
            return _float_bits(_float_arithmetic(kind, [_floats(v) for v in x]))
        width = 1 if last == "pred" else _width(last)
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
        return _float_bits(_s32(x[0]))
    if parts == ["rn", "bf16", "f32"]:
        return _to_bfloat16(_floats(x[0]))
    if parts == ["rn", "bf16x2", "f32"]:
        return _to_bfloat16(_floats(x[1])) | _to_bfloat16(_floats(x[0])) << U(16)
    if parts == ["f32", "bf16"]:
        return (x[0] & U(0xFFFF)) << U(16)
    target, source = parts
    value = x[0] & U((1 << _width(source)) - 1)
    if source == "s32":
        value = _s32(value).view(U)
    return value & U((1 << _width(target)) - 1)


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
        a, b = (_s32(v) if signed else (v & LOW).view(np.int64) for v in x[:2])
        return (a * b).view(U) + (x[2] if kind == "mad" else U(0))
    if width == 64:
        c = [v.view(np.int64) if signed else v for v in x]
    else:
        c = [_s32(v) if signed else (v & LOW).view(np.int64) for v in x]
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


def run_grid(programs: Sequence[Program], missing: Sequence[int] = ()) -> None:
    """Execute programs together, in turns; those in ``missing`` never start, as if the GPU held them back."""
    running = [program.run() for i, program in enumerate(programs) if i not in missing]
    while running:
        running = [program for program in running if next(program, "ended") != "ended"]
