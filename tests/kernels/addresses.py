"""Finds addresses in compiled kernels that overflow 32 bits in large tensors.

A row times a stride must be computed in 64 bits. Products of 32 bits remain where an address is made of an index: the
number of a row, column or tile.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import sbn_kernels

PACKAGE, TESTS = Path(sbn_kernels.__file__).parent, Path(__file__).parent
# Lines whose products are such indices, or numbers in one row of a matrix. Their products are not offsets of rows.
INDICES = (
    "per = group * column_tiles",  # tiles of a matrix
    "first = tile // per * group",
    "row = tl.minimum(expert, experts - 1) * features",  # rows of the weights of all experts
    "where = row // padded * stride + row % padded",  # scales of all rows of all matrices
    "head * size",  # features of one token
    "(heads + head) * size",
    "(heads + key_heads + head) * size",
)
_VALUE = re.compile(r"%[\w#]+")


def narrow_products(compiled: Any) -> set[str]:
    """Return the source lines where two numbers of 32 bits are multiplied for an address, and that INDICES lacks.

    Constants do not count: a constant is the size of a block. Kernels in Gluon are not looked at: their parts use the
    same names for other values, and most of their addresses are coordinates of tensor descriptors.
    """
    text = compiled.asm.get("ttir", "")
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
    made = dict(re.findall(r"^\s*(%[\w#]+)(?::\d+)? = (.*)$", text, re.MULTILINE))
    offsets = [offset for kind, offset in re.findall(r"tt\.(addptr) %[\w#]+, (%[\w#]+)", text)]
    found, todo, seen = set(), offsets, set()
    while todo:
        value = todo.pop()
        if value in seen or value not in made:
            continue
        seen.add(value)
        operation = made[value]
        if operation.startswith("tt.load"):
            continue  # The number comes from memory.
        if operation.startswith("arith.muli"):
            if re.search(r": (?:tensor<[^>]*?)?i64", operation):
                continue  # Whatever the factors are, their product has 64 bits.
            factors = _VALUE.findall(operation)[:2]
            if not any(_is_constant(factor, made) for factor in factors):
                found.add(_line(operation, places))
        todo += _VALUE.findall(operation)
    return {line for line in found if not any(index in line for index in INDICES)}


def _is_constant(value: str, made: dict[str, str]) -> bool:
    operation = made.get(value, "")
    if re.match(r"tt\.(splat|broadcast|expand_dims) ", operation):
        return _is_constant(_VALUE.findall(operation)[0], made)
    return operation.startswith("arith.constant")


def _line(operation: str, places: dict[str, str]) -> str:
    """The line of the kernel's source, with its file and number."""
    todo = re.findall(r"#loc\d*", operation)
    while todo:
        place = places.get(todo.pop(0), "")
        source = re.search(r'"([^"]+\.py)":(\d+)', place)
        if source and (lines := _lines(source[1])):
            return f"{Path(source[1]).name}:{source[2]}: {lines[int(source[2]) - 1].strip()}"
        todo += re.findall(r"#loc\d*", place)
    return operation


@cache
def _lines(path: str) -> list[str]:
    """The lines of a file of the kernels or of their tests.

    Triton's cache may name a file of another checkout, where the same kernel was compiled first.
    """
    inside = path.rpartition("/sbn_kernels/")[2]
    file = PACKAGE / inside if inside != path else TESTS / Path(path).name
    return file.read_text().splitlines() if file.exists() else []
