"""The check of addresses, which ``conftest.py`` does for each kernel that a test compiles, finds what it looks for."""

from __future__ import annotations

import os
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

from tests.kernels.addresses import narrow_products

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)


@triton.jit
def narrow_kernel(x_pointer, stride, heads, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = x_pointer + tl.program_id(1).to(tl.int64) * stride
    at += row * stride  # too narrow
    tl.store(at, 1.0, mask=row < heads)


@triton.jit
def wide_kernel(x_pointer, stride, heads, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row * heads < stride  # No address is made of this product.
    tl.store(x_pointer + row.to(tl.int64) * stride + row * 4, 1.0, mask=inside)


def build(kernel: Any) -> Any:
    signature = {"x_pointer": "*fp32", "stride": "i32", "heads": "i32", "BLOCK": "constexpr"}
    source = ASTSource(kernel, signature, {(3,): 64})
    return compile_unchecked(source, target=GPUTarget("cuda", 90, 32))


compile_unchecked = triton.compile  # conftest.py replaces the function for the time of each test


def test_a_narrow_product_is_found() -> None:
    (line,) = narrow_products(build(narrow_kernel))
    assert line.startswith("test_addresses.py:")
    assert line.endswith("at += row * stride  # too narrow")


def test_wide_products_and_products_for_masks_are_not() -> None:
    assert narrow_products(build(wide_kernel)) == set()


def test_every_compilation_of_a_test_is_checked() -> None:
    source = ASTSource(narrow_kernel, {"x_pointer": "*fp32", "stride": "i32", "heads": "i32"}, {(3,): 64})
    with pytest.raises(AssertionError, match=r"computes an offset in 32 bits: .*too narrow"):
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
