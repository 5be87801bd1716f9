"""``larger`` lets a NaN through. The quick interpreter replaces the reductions that are made of ``larger``."""

import torch
import triton
import triton.language as tl
from sbn_kernels.common.maxima import larger


@triton.jit
def pairs_kernel(a, b, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, larger(tl.load(a + at), tl.load(b + at)))


def test_larger_is_the_maximum_and_lets_a_nan_through() -> None:
    nan, inf = float("nan"), float("inf")
    a = torch.tensor([1.0, -2.0, nan, 3.0, inf, nan, -inf, 0.0])
    b = torch.tensor([2.0, -5.0, 1.0, nan, nan, nan, -1.0, -1.0])
    out = torch.empty_like(a)
    pairs_kernel[(1,)](a, b, out, COUNT=8)
    assert torch.equal(out.isnan(), a.isnan() | b.isnan())
    assert torch.equal(out.nan_to_num(9.0), torch.maximum(a, b).nan_to_num(9.0))
