"""The whole kernel, without a GPU: it compiles for every GPU it is meant for, and its PTX computes the dense product.

The emulator executes every instruction of the compiled kernel: addresses, copies, barriers, ``ldmatrix``, unpacking,
``mma.sp``, scales, the exchange of the epilogue and the stores.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from sbn_kernels.gemm.sm80.gemm import BAND, TILES, TOKEN_WARPS, Tile, choose_tile, stages_of

from tests.kernels.ampere.case import make_case
from tests.kernels.ptx_emulator import Memory, Program
from tests.kernels.test_aot import build, needs_gluon, spilled_bytes

TYPES = {"x_pointer": "*i32"}
# Bytes of shared memory that a program can have, and that a multiprocessor has.
SHARED = {80: (166912, 167936), 86: (101376, 102400), 89: (101376, 102400), 90: (232448, 233472)}


def compile_for(capability: int, tile: Tile, sparse: bool, bias: bool = False, stages: int | None = None):
    from sbn_kernels.gemm.sm80.kernels import ampere_gemm_kernel
    from triton.experimental.gluon._runtime import GluonASTSource

    constants = {"PANELS": tile.panels, "BT": tile.tokens, "TOKEN_WARPS": TOKEN_WARPS, "BAND": BAND, "SPARSE": sparse}
    constants |= {"BIAS": bias, "STAGES": stages or stages_of(tile, *SHARED[capability])}
    return build(ampere_gemm_kernel, constants, capability, TYPES, GluonASTSource, tile.warps)


@needs_gluon
@pytest.mark.parametrize(
    ("capability", "tile", "sparse"),
    [(80, 0, True), (80, 1, False), (86, 0, True), (89, 1, True), (90, 0, True), (90, 2, False)],
)
def test_the_kernel_compiles(capability: int, tile: int, sparse: bool, tmp_path: Path) -> None:
    """The intended instructions are there, the assembler takes them, nothing spills, shared memory suffices."""
    compiled = compile_for(capability, TILES[tile], sparse)
    ptx = compiled.asm["ptx"]
    assert re.search(rf"^\.target sm_{capability}", ptx, re.MULTILINE)
    name = "mma.sp::ordered_metadata.sync.aligned.m16n8k64" if sparse else "mma.sync.aligned.m16n8k32"
    groups = TILES[tile].tokens // TOKEN_WARPS // 8
    assert ptx.count(f"{name}.row.col.s32.s8.s8.s32") == (2 if sparse else 4) * 4 * groups
    assert "ldmatrix.sync.aligned.m8n8.x4.shared.b16" in ptx
    assert set(re.findall(r"cp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx)) == {"0x10"}
    assert len(re.findall(r"st\.global\.v4", ptx)) > 0  # stores of 16 bytes
    assert spilled_bytes(compiled, tmp_path) == 0
    assert compiled.metadata.shared <= SHARED[capability][0]


@needs_gluon
@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(
    ("shape", "tile", "stages", "sparse", "bias"),
    [((21, 404, 139), Tile(1, 16), 3, True, False), ((37, 136, 262), Tile(2, 32), 2, False, True)],
    ids=str,
)
def test_the_compiled_kernel_computes_the_dense_product(
    shape: tuple[int, int, int], tile: Tile, stages: int, sparse: bool, bias: bool, late: bool
) -> None:
    tokens, columns, out = shape
    case = make_case(*shape, sparse)
    compiled = compile_for(80, tile, sparse, bias, stages)
    stride, pieces = -(-columns // 16) * 16, -(-out // 8)
    x = np.random.default_rng(0).integers(-128, 128, (tokens, stride)).astype(np.int8)  # noise beyond the columns
    x[:, :columns] = case.x8.numpy()
    y = np.full((tokens, 8 * pieces), 0x7FC0, np.uint16)  # every element is not a number
    memory = Memory()
    addresses = [
        memory.add(array)
        for array in (
            x, case.packed.numpy().copy(), y, case.scale.numpy(), case.row_scale.numpy(),
            case.bias.view(torch.int16).numpy(),
        )
    ]  # fmt: skip
    panels, k_steps, _ = case.packed.shape
    arguments = [*addresses, tokens, out, k_steps, panels, stride // 16, pieces]
    for program in range(-(-tokens // tile.tokens) * -(-panels // tile.panels)):
        Program(compiled.asm["ptx"], memory, arguments, program, tile.warps, compiled.metadata.shared, late).run()
    result = torch.from_numpy(y.view(np.int16)).view(torch.bfloat16)[:, :out]
    assert torch.equal(result, case.expected(bias, torch.bfloat16))


def test_tiles_and_stages() -> None:
    """Large products get the large tile, few tokens a small one; the ring fits each GPU."""
    assert choose_tile(8192, 112, 108) == Tile(2, 128)
    assert choose_tile(8, 112, 108).tokens == 16
    assert choose_tile(128, 32, 108).panels == 1
    for tile in TILES:
        for shared in SHARED.values():
            stages = stages_of(tile, *shared)
            assert 2 <= stages <= 4
            assert stages * tile.stage_bytes <= shared[0]
    assert [stages_of(Tile(1, 128), *SHARED[capability]) for capability in (80, 86)] == [4, 2]
