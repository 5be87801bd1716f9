"""Random operands of a product, on any device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sbn_kernels.common.packing import pack_dense, pack_sparse24
from sbn_kernels.gemm.reference import gemm_reference
from torch import Tensor


class Case(NamedTuple):
    """Tokens of the whole int8 range (with many -128), a ternary weight in its packed form, scales and a bias."""

    x8: Tensor
    scale: Tensor
    codes: Tensor
    packed: Tensor
    row_scale: Tensor
    bias: Tensor

    def expected(self, bias: bool, dtype: torch.dtype) -> Tensor:
        """The result of the plain-PyTorch twin."""
        return gemm_reference(self.x8, self.scale, self.codes, self.row_scale, self.bias if bias else None, dtype)


def make_case(tokens: int, columns: int, out: int, sparse: bool, device: str = "cpu") -> Case:
    """Make the operands; the seed follows from the shape."""
    generator = torch.Generator().manual_seed(tokens + columns + out)
    x8 = torch.randint(-128, 128, (tokens, columns), dtype=torch.int8, generator=generator)
    x8[:, ::5] = -128
    codes = torch.randint(-1, 2, (out, columns), dtype=torch.int8, generator=generator)
    mask = torch.ones_like(codes, dtype=torch.bool)
    if sparse:
        mask = (torch.rand(out, columns // 4, 4, generator=generator).argsort(-1) < 2).flatten(-2)
    codes *= mask
    packed = pack_sparse24(codes, mask) if sparse else pack_dense(codes)
    scale, row_scale = (torch.rand(n, generator=generator) + 0.1 for n in (tokens, out))
    bias = torch.randn(out, generator=generator).bfloat16()
    return Case(*(t.to(device) for t in (x8, scale, codes, packed, row_scale, bias)))
