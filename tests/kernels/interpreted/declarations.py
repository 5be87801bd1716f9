"""Compares what ops do with what they declare: the shapes of their results, and the arguments that they change.

``torch.compile`` plans memory by the shape function of an op, and moves code by its declared changes. A wrong stride or
an undeclared change shows only on a GPU, in a compiled model. Here each call of an op on the CPU is compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

CALLS: Counter[str] = Counter()  # How often each op was compared in this process.


@contextmanager
def compared(names: Iterable[str]) -> Iterator[None]:
    """Compare each call of these ops with their declarations.

    The kernels on the CPU are replaced, below autograd, compilers and modes. So the tests notice nothing else.
    """
    library = torch.library.Library("sbn_kernels", "IMPL")
    try:
        for name in names:
            op = getattr(torch.ops.sbn_kernels, name).default
            library.impl(name, _comparing(op, torch.library.get_kernel(op, "CPU")), "CPU", with_keyset=True)
        yield
    finally:
        library._destroy()


def _comparing(op: Any, kernel: Any) -> Any:
    def run(keys: Any, *arguments: Any) -> Any:
        tensors = {
            declared.name: given
            for declared, given in zip(op._schema.arguments, arguments, strict=True)
            if isinstance(given, Tensor)
        }
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        shapes = [_without_memory(given) if isinstance(given, Tensor) else given for given in arguments]
        results = kernel.call_boxed(keys, *arguments)
        _check_changes(op, tensors, before)
        _check_results(op.name(), _as_list(results), _as_list(op(*shapes)), list(tensors.values()))
        CALLS[op._opname] += 1
        return results

    return run


def _without_memory(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _as_list(results: Any) -> list[Any]:
    return list(results) if isinstance(results, tuple | list) else [results]


def _check_changes(op: Any, tensors: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    declared = {each.name for each in op._schema.arguments if each.alias_info is not None and each.alias_info.is_write}
    for name, tensor in tensors.items():
        same = torch.equal(_bytes(tensor), _bytes(before[name]))  # A NaN does not equal itself.
        assert same or name in declared, f"{op.name()} changes {name} and does not declare it"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _check_results(name: str, results: list[Any], declared: list[Any], arguments: list[Tensor]) -> None:
    assert len(results) == len(declared), f"{name} returns {len(results)} results and declares {len(declared)}"
    taken = {tensor.untyped_storage().data_ptr() for tensor in arguments if tensor.numel()}
    for number, (ours, theirs) in enumerate(zip(results, declared, strict=True)):
        if ours is None or theirs is None:
            assert ours is theirs, f"{name}: result {number} is {type(ours)} and declared as {type(theirs)}"
            continue
        found, wanted = _form(ours), _form(theirs)
        assert found == wanted, f"{name}: result {number} is {found} and declared as {wanted}"
        if ours.numel():
            memory = ours.untyped_storage().data_ptr()
            assert memory not in taken, f"{name}: result {number} shares memory with an argument or another result"
            taken.add(memory)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    """The dtype, the shape, and the strides of the dimensions where a stride matters."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    strides = [stride for size, stride in sizes if size > 1] if tensor.numel() else []
    return tensor.dtype, list(tensor.shape), strides
