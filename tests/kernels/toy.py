"""A toy kernel shows all that is needed to add a kernel. ``docs/extending/kernel.md`` explains the same lines.

The toy stores a 2:4 weight as signed bytes that are one too large, which no other kernel reads, and multiplies in
plain PyTorch.
"""

from collections.abc import Iterator

import pytest
import torch
from sbn_kernels.gemm.reference import gemm_reference
from sbn_kernels.gemm.registry import Product, registered
from sbn_kernels.runtime.capability import Needs
from torch import Tensor

CALLS: list[int] = []


def pack(codes: Tensor) -> Tensor:
    """int8 codes ``[out, in]`` -> the toy's own form."""
    return codes + 1


def multiply(
    x8: Tensor,
    scale: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Compute the product, and record the number of tokens."""
    CALLS.append(len(x8))
    assert weight.shape == (out_features, x8.shape[1])
    return gemm_reference(x8, scale, weight - 1, row_scale, bias, out_dtype)


TOY = Product(
    name="toy",
    backend="sparse",
    needs=Needs("toy", least=(0, 0), interpreter=True),
    form="bytes that are one too large",
    multiply=multiply,
    pack=pack,
    pattern=(2, 4),
    denser="portable",
    rank=100,  # before every other kernel that can serve the layer
)


@pytest.fixture
def toy() -> Iterator[None]:
    """The toy is registered for one test."""
    CALLS.clear()
    with registered(TOY):
        yield
