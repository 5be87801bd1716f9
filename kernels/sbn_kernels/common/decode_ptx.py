"""Inline PTX that unpacks 2-bit codes into operand A of a tensor-core instruction. Needs Triton >= 3.9 (Gluon)."""

from __future__ import annotations

from triton.experimental import gluon


@gluon.constexpr_function
def unpack_word(name: str, word: str) -> list[str]:
    """PTX: the 16 codes (0, 1, 2 for 0, +1, -1) of ``word`` -> registers ``name0`` to ``name3`` of 4 int8 each."""
    lines = [f".reg .b32 {name}l, {name}h, {name}ls, {name}hs, {name}0, {name}1, {name}2, {name}3;"]
    lines += [f"and.b32 {name}l, {word}, 0x33333333;", f"shr.u32 {name}h, {word}, 2;"]
    lines += [f"and.b32 {name}h, {name}h, 0x33333333;", f"shr.u32 {name}ls, {name}l, 16;"]
    lines += [f"shr.u32 {name}hs, {name}h, 16;"]
    for register, selector in enumerate(("l", "ls", "h", "hs")):
        lines.append(f"prmt.b32 {name}{register}, 0x00ff0100, 0, {name}{selector};")
    return lines
