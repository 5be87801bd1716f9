"""Which thread holds which element in the kernels of this folder: the layouts of ``kernels.py`` as plain lists.

The instruction fixes the layouts. ``mma.sync.m16n8k32`` and ``mma.sp.sync.m16n8k64`` multiply A [16 rows, K] by B
[K, 8 columns]. Here a row is a feature of the weight and a column is a token, so the product is computed transposed.
With ``g = lane // 4`` and ``t = lane % 4`` the PTX ISA says (sections "Matrix Fragments for sparse mma.m16n8k64" and
"Matrix Fragments for mma.m16n8k32"):

* A, four registers of four int8: rows g, g + 8, g, g + 8. Registers 0 and 1 hold the dense columns 4t to 4t + 3 (k32),
  or the two kept values of each of the groups 2t and 2t + 1 (k64). Registers 2 and 3 are 16 dense columns or 32 sparse
  columns further. The packed words of :mod:`sbn_kernels.common.packing` hold the codes in this order.
* Metadata of k64, one register, selector 0: 8 groups of row ``g + 8 (t % 2)`` from column ``32 (t // 2)`` on.
* B, one register of four int8 for each 16 of K: column g, rows ``16 i + 4 t`` to ``16 i + 4 t + 3`` of register i.
* C and D, four int32: ``(g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)``.

A layout is a list of bases for the bits of the register, of the lane and of the warp, as Gluon's
``DistributedLinearLayout`` takes them: the element of a register is the sum of the bases of its set bits.
``tests/kernels/ampere`` evaluates the lists and feeds an emulator of the instruction with the result.
"""

from __future__ import annotations

from triton.experimental import gluon


@gluon.constexpr_function
def _powers(first: int, end: int) -> list[int]:
    """``first``, twice, four times ... below ``end``."""
    found = []
    while first < end:
        found.append(first)
        first *= 2
    return found


@gluon.constexpr_function
def accumulators(panels: int, tokens: int, token_warps: int) -> tuple[list[list[int]], ...]:
    """Bases of the accumulators ``[128 panels, tokens]``: C and D of the instruction.

    Args:
        panels: Panels of 128 features in a tile.
        tokens: Tokens in a tile.
        token_warps: Warps along the tokens.

    Returns:
        The bases of registers, lanes and warps. Register ``4 (n + N m) + i`` is the i-th of the fragment of rows
        ``16 m`` and tokens ``8 n``, where N is the number of fragments along the tokens of a warp.
    """
    of_a_warp = tokens // token_warps
    registers = [[0, 1], [8, 0], *([0, n] for n in _powers(8, of_a_warp)), [16, 0], [32, 0]]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    warps = [*([0, n] for n in _powers(of_a_warp, tokens)), *([m, 0] for m in _powers(64, 128 * panels))]
    return registers, lanes, warps


@gluon.constexpr_function
def token_words(panels: int, tokens: int, token_warps: int) -> tuple[list[list[int]], ...]:
    """Bases of a k128 step of tokens, int32 words ``[tokens, 32]`` of four int8: B of the instruction.

    Returns:
        The bases of registers, lanes and warps. Register ``8 n + i`` holds the i-th word of the token fragment n.
    """
    of_a_warp = tokens // token_warps
    registers = [[0, 4], [0, 8], [0, 16], *([n, 0] for n in _powers(8, of_a_warp))]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    warps = [*([n, 0] for n in _powers(of_a_warp, tokens)), *([0, 0] for _ in _powers(64, 128 * panels))]
    return registers, lanes, warps


@gluon.constexpr_function
def weight_words(panels: int, tokens: int, token_warps: int) -> tuple[list[list[int]], ...]:
    """Bases of a k128 step of packed weights, int32 ``[1024 panels]``: A and the metadata of the instruction.

    Returns:
        The bases of registers, lanes and warps. Register ``4 m + i`` is the i-th word of the 16 rows of fragment m.
    """
    registers = [[1], [2], [128], [256]]
    lanes = [[4], [8], [16], [32], [64]]
    warps = [*([0] for _ in _powers(tokens // token_warps, tokens)), *([w] for w in _powers(512, 1024 * panels))]
    return registers, lanes, warps
