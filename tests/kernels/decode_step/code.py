"""The statements of a compiled kernel, read from its PTX for the emulator of a grid."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any


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
