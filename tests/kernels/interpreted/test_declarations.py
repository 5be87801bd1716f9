"""The comparison of ops with their declarations, which ``conftest.py`` turns on for every test here, finds mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sbn_kernels.quantize import quantize_tokens
from sbn_kernels.runtime.ops import kernel_fake, kernel_op
from torch import Tensor

from tests.kernels.interpreted import declarations
from tests.kernels.interpreted.declarations import compared


def _right(x: Tensor) -> Tensor:
    return x * 2


def _changes(x: Tensor) -> Tensor:
    return x.add_(1) * 2


def _nothing(x: Tensor) -> None:
    x.add_(1)


def _itself(x: Tensor) -> Tensor:
    return x.view(-1, 2)


def _twice(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    return y[:, :1], y[:, 1:]


def _columns(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], x.shape[0]).t()


# Name -> op, shape function, the arguments it declares to change, and the complaint.
CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[str, ...], str | None]] = {
    "right": (_right, torch.empty_like, (), None),
    "declared": (_nothing, lambda x: None, ("x",), None),
    "undeclared": (_changes, torch.empty_like, (), "changes x and does not declare it"),
    "undeclared_nothing": (_nothing, lambda x: None, (), "changes x and does not declare it"),
    "shape": (_right, lambda x: x.new_empty(3, 1), (), "result 0 is .*declared as"),
    "dtype": (_right, lambda x: x.new_empty(x.shape, dtype=torch.int8), (), "result 0 is .*declared as"),
    "stride": (_columns, torch.empty_like, (), "result 0 is .*declared as"),
    "alias": (_itself, torch.empty_like, (), "result 0 shares memory"),
    "one_memory": (_twice, lambda x: (x.new_empty(3, 2)[:, :1], x.new_empty(3, 2)[:, 1:]), (), "result 1 shares"),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_are_found(case: str) -> None:
    function, shapes, mutates, complaint = CASES[case]
    name = f"declarations_{case}"
    kernel_op(name, mutates)(function)
    kernel_fake(name)(lambda x: shapes(x))
    op = getattr(torch.ops.sbn_kernels, name)
    op(torch.ones(3, 2))  # Nothing is compared without being told to.
    with compared([name]):
        if complaint is None:
            op(torch.ones(3, 2))
        else:
            with pytest.raises(AssertionError, match=f"{name}.*{complaint}"):
                op(torch.ones(3, 2))
    assert declarations.CALLS[name] == (complaint is None)


def test_every_test_here_compares() -> None:
    before = declarations.CALLS["quantize_tokens"]
    quantize_tokens(torch.randn(2, 16))
    assert declarations.CALLS["quantize_tokens"] == before + 1
