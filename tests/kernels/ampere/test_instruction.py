"""The PTX text of a k128 step, executed by the emulator, equals the dense product: layouts, unpacking, metadata."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from sbn_kernels.gemm.sm80.kernels import step_text
from sbn_kernels.gemm.sm80.layouts import accumulators, token_words, weight_words

from tests.kernels.ampere.case import make_case
from tests.kernels.ptx_emulator import Memory, Program
from tests.kernels.ptx_instructions import mma_sp_m16n8k64

PANELS, TOKENS, TOKEN_WARPS, WARPS = 1, 32, 2, 4
LANES = np.arange(32 * WARPS) % 32
WARP = np.arange(32 * WARPS) // 32


def elements(bases: tuple[list[list[int]], ...], register: int) -> np.ndarray:
    """The element that each thread holds in a register, ``[threads, rank]``: the sum of the bases of the set bits."""
    found = np.zeros((32 * WARPS, len(bases[0][0])), np.int64)
    for numbers, basis in zip((np.full(32 * WARPS, register), LANES, WARP), bases, strict=True):
        for bit, element in enumerate(basis):
            found += np.outer(numbers >> bit & 1, element)
    return found


@pytest.mark.parametrize("sparse", [True, False])
def test_a_step_equals_the_dense_product(sparse: bool) -> None:
    case = make_case(TOKENS, 128, 128, sparse)
    tokens = case.x8.numpy().view(np.int32).astype(np.int64)
    words = case.packed.numpy().reshape(-1).astype(np.int64)
    layouts = [function(PANELS, TOKENS, TOKEN_WARPS) for function in (accumulators, weight_words, token_words)]
    acc, w, x = (
        [f"{kind}{i}" for i in range(2 ** len(layout[0]))] for kind, layout in zip("awx", layouts, strict=True)
    )
    program = Program(step_text(((acc),), ((acc), w, x), sparse) + "\nret;", Memory(), [], 0, WARPS, 0, late=True)
    start = np.random.default_rng(0).integers(-1000, 1000, (128, TOKENS))
    for i, name in enumerate(acc):
        row, token = elements(layouts[0], i).T
        program.registers[name] = start[row, token].astype(np.int64).view(np.uint64) & np.uint64(0xFFFFFFFF)
    for i, name in enumerate(w):
        program.registers[name] = words[elements(layouts[1], i)[:, 0]].view(np.uint64) & np.uint64(0xFFFFFFFF)
    for i, name in enumerate(x):
        token, word = elements(layouts[2], i).T
        program.registers[name] = tokens[token, word].view(np.uint64) & np.uint64(0xFFFFFFFF)
    program.run()
    expected = start + (case.codes.double() @ case.x8.double().t()).long().numpy()
    seen = np.zeros((128, TOKENS), np.int64)
    for i, name in enumerate(acc):
        row, token = elements(layouts[0], i).T
        assert np.array_equal(program.registers[name].astype(np.uint32).view(np.int32), expected[row, token])
        np.add.at(seen, (row, token), 1)
    assert (seen == 1).all()  # Each element has one owner.
    counted = sum(n for operation, n in program.counts.items() if operation.startswith("mma.sp"))
    assert counted == (2 * 4 * 2 if sparse else 0)


def test_the_layouts_of_two_panels_and_all_tiles_cover_each_element_once() -> None:
    from sbn_kernels.gemm.sm80.gemm import TILES

    for tile in TILES:
        registers, lanes, warps = accumulators(*tile, TOKEN_WARPS)
        assert 2 ** len(warps) == tile.warps
        assert 2 ** len(registers) * 32 * tile.warps == 128 * tile.panels * tile.tokens
        flat = [row * tile.tokens + token for row, token in registers + lanes + warps]
        assert sorted(flat) == [2**i for i in range(len(flat))]
        registers, lanes, warps = weight_words(*tile, TOKEN_WARPS)
        assert sorted(word for (word,) in registers + lanes + warps if word) == [
            2**i for i in range((1024 * tile.panels).bit_length() - 1)
        ]


def test_the_emulator_refuses_what_the_instruction_does_not_define() -> None:
    one = np.ones((1, 32), np.uint64)
    with pytest.raises(ValueError, match="first position before the second"):
        mma_sp_m16n8k64([one] * 4, [one] * 4, [one] * 4, one, 0)
    with pytest.raises(ValueError, match="selector"):
        mma_sp_m16n8k64([one] * 4, [one] * 4, [one] * 4, one * np.uint64(0xEEEEEEEE), 1)


def test_the_emulated_instruction_is_a_matrix_product_of_the_fragments_of_the_isa() -> None:
    """A one in one place of A and one of B gives a one in one place of D, for places drawn at random."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        row, column, token = generator.integers(16), generator.integers(64), generator.integers(8)
        group, position = column // 4, column % 4
        first = min(position, 2)  # The pair of positions is (position, 3), or (2, 3) for the last position.
        which = int(position == 3)
        a = [np.zeros((1, 32), np.uint64) for _ in range(4)]
        lane = 4 * (row % 8) + group % 8 // 2
        register = 2 * (group // 8) + row // 8
        a[register][0, lane] = 1 << (8 * (2 * (group % 2) + which))
        metadata = np.full((1, 32), 0xEEEEEEEE, np.uint64)  # positions 2 and 3 everywhere
        holder = 4 * (row % 8) + 2 * (group // 8) + row // 8
        shift = 4 * (group % 8)
        metadata[0, holder] = 0xEEEEEEEE & ~(15 << shift) | (first | 12) << shift
        b = [np.zeros((1, 32), np.uint64) for _ in range(4)]
        b[column // 16][0, 4 * token + column % 16 // 4] = 1 << (8 * (column % 4))
        zero = np.zeros((1, 32), np.uint64)
        d = mma_sp_m16n8k64(a, b, [zero] * 4, metadata, 0)
        result = torch.zeros(16, 8, dtype=torch.long)
        for i in range(4):
            for thread in range(32):
                result[thread // 4 + 8 * (i // 2), 2 * (thread % 4) + i % 2] = int(d[i][0, thread])
        assert result.nonzero().tolist() == [[row, token]]
