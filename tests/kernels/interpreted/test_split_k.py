"""The sum over K in parts, without a GPU: the adding kernel is interpreted, and PyTorch replaces the Hopper kernel."""

import pytest
import sbn_kernels as sk
import torch
from sbn_kernels.gemm.sm90 import gemm as hopper_gemm
from sbn_kernels.gemm.sm90.split_k import add_splits, choose_splits, split_tile
from sbn_kernels.runtime.capability import gluon_missing

from tests.kernels.interpreted.test_against_twins import gemm_case, within_one_rounding

pytestmark = pytest.mark.usefixtures("poisoned_buffers")


@pytest.mark.parametrize(("tokens", "columns", "out"), [(9, 300, 70), (16, 64, 128), (17, 130, 129), (64, 1024, 9)])
@pytest.mark.parametrize("splits", [1, 2, 5, 16])
def test_adding_parts_of_k(tokens: int, columns: int, out: int, splits: int) -> None:
    """Parts are as the Hopper kernel leaves them: whole panels of rows, with zeros where there is no row or token."""
    x8, scale, codes, row_scale, bias, exact = gemm_case(tokens, columns, out)
    parts = torch.zeros(splits, -(-out // 128) * 128, split_tile(tokens), dtype=torch.int32)
    pieces = zip(parts, x8.tensor_split(splits, 1), codes.tensor_split(splits, 1), strict=True)
    for part, x, t in pieces:
        part[:out, :tokens] = t.int() @ x.int().t()
    y = add_splits(parts, scale, row_scale, None, torch.empty(tokens, out))
    assert torch.equal(y, exact)
    y = add_splits(parts, scale, row_scale, bias, torch.empty(tokens, out))
    assert torch.equal(y, exact + bias)
    assert within_one_rounding(add_splits(parts, scale, row_scale, bias, torch.empty_like(y).bfloat16()), exact + bias)


class FakeKernel:
    """Writes what the docstring of ``ternary_gemm_split_kernel`` says, and counts launches."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, int]] = []

    def __call__(self, grid, tensors, numbers, constants, num_warps=4, descriptors=()) -> None:
        self.grids.append(grid[:2])
        (parts,), (k_steps, per_split, zero), (tile, _, _), (x, w) = tensors, numbers, constants, descriptors
        (tokens, columns), panels = x.shape, parts.shape[1] // 128
        assert (x.block_shape, w.block_shape) == ([tile, 128], [32, 32])
        assert parts.shape == (grid[1], grid[0] * 128, tile)
        assert list(w.shape) == [panels * k_steps * 32, 32]
        assert tokens <= tile
        assert (grid[2], zero, num_warps) == (1, 0, 4)
        codes = sk.unpack(w.base.view(panels, k_steps, 1024), panels * 128, k_steps * 128, "dense")
        assert (k_steps - 1) * 128 < columns <= k_steps * 128
        x8 = torch.zeros(tile, k_steps * 128, dtype=torch.int32)
        x8[:tokens, :columns] = x.base[:, :columns]
        for split in range(grid[1]):
            k = slice(split * per_split * 128, (split + 1) * per_split * 128)
            assert x8[:, k].shape[1] > 0, "no part is empty"
            parts[split] = codes[:, k].int() @ x8[:, k].t()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    if gluon_missing() is not None:
        pytest.skip(str(gluon_missing()))
    fake = FakeKernel()
    monkeypatch.setattr(hopper_gemm, "require", lambda *_: None)
    monkeypatch.setattr(hopper_gemm, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(hopper_gemm, "_split_kernel", lambda: fake)
    return fake


@pytest.mark.parametrize(("tokens", "columns", "out"), [(1, 96, 8), (9, 1000, 129), (17, 700, 9), (64, 260, 130)])
@pytest.mark.parametrize("splits", [2, 3, 16])
def test_the_launch_with_a_given_number_of_parts(
    tokens: int, columns: int, out: int, splits: int, kernel: FakeKernel
) -> None:
    x8, scale, codes, row_scale, bias, exact = gemm_case(tokens, columns, out)
    y = sk.ternary_gemm(x8, scale, sk.pack_dense(codes), row_scale, out, bias, torch.float32, splits=splits)
    assert torch.equal(y, exact + bias)
    ((panels, parts),) = kernel.grids
    assert panels == -(-out // 128)
    assert parts <= splits


def test_the_launch_by_the_choice(kernel: FakeKernel) -> None:
    x8, scale, codes, row_scale, _, exact = gemm_case(16, 4864, 96)
    packed = sk.pack_dense(codes)
    assert torch.equal(sk.ternary_gemm(x8, scale, packed, row_scale, 96, out_dtype=torch.float32), exact)
    ones = torch.ones_like(row_scale)
    expected = sk.ternary_gemm(x8, scale, packed, ones, 96, out_dtype=torch.float32)
    assert torch.equal(sk.ternary_gemm(x8, scale, packed, None, 96, out_dtype=torch.float32), expected)
    kernel.grids = kernel.grids[:1]
    assert kernel.grids == [(1, choose_splits(16, 96, 4864, 132))]
    assert kernel.grids[0][1] > 1
    with pytest.raises(ValueError, match="token_tile"):
        sk.ternary_gemm(x8, scale, packed, row_scale, 96, token_tile=16, splits=2)
