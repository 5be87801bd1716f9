"""Every call of a kernel refuses tensors on several devices. No GPU is needed: the tensors only say where they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sbn_kernels.decode.step.plan import Shape
from sbn_kernels.decode.step.step import DecodeStep
from sbn_kernels.decode.step.weights import PackedWeights
from sbn_kernels.prompt import rotate_and_store
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.every_op import NAMES

# What an argument of a type can be. The check comes before everything else, so the values do not matter.
VALUES: dict[str, Any] = {
    "int": 1, "float": 1.0, "bool": False, "str": "", "List[int]": [], "Optional[Tensor]": None,
    "ScalarType": torch.float32, "number": 1,
}  # fmt: skip


class Elsewhere(Tensor):
    """A tensor in the memory of the CPU that says it is on the second GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def get_device(self) -> int:
        return 1

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:1")


def calls(op: str) -> Iterator[tuple[list[str], list[Any], int]]:
    """Names and values of the arguments of calls, and the place of the argument that must be elsewhere."""
    arguments = getattr(torch.ops.sbn_kernels, op).default._schema.arguments
    names = [argument.name for argument in arguments]
    kinds = [str(argument.type) for argument in arguments]
    for place, kind in enumerate(kinds):
        if place and kind in ("Tensor", "Optional[Tensor]"):
            yield names, [torch.zeros(2, 2) if kind == "Tensor" else VALUES[kind] for kind in kinds], place


@pytest.mark.parametrize("op", NAMES)
def test_each_op_compares_the_devices_of_all_tensors(op: str) -> None:
    for names, values, place in calls(op):
        values[place] = torch.zeros(2, 2).as_subclass(Elsewhere)
        message = f"^{op} needs all tensors on one device: {names[0]} is on cpu, and {names[place]} on cuda:1$"
        with pytest.raises(ValueError, match=message):
            getattr(torch.ops.sbn_kernels, op)(*values)


@pytest.mark.parametrize("op", NAMES)
def test_the_compiler_gets_the_same_answer(op: str) -> None:
    with FakeTensorMode():
        for names, values, place in calls(op):
            values = [torch.zeros(2, 2, device="cuda:0") if isinstance(x, Tensor) else x for x in values]
            values[place] = torch.zeros(2, 2, device="cuda:1")
            message = f"{op} needs all tensors on one device: {names[0]} is on cuda:0, and {names[place]} on cuda:1"
            with pytest.raises(ValueError, match=message):
                getattr(torch.ops.sbn_kernels, op)(*values)


def test_ops_with_several_tensors_were_found() -> None:
    found = [op for op in NAMES for _ in calls(op)]
    assert {"int8_gemm", "attend", "choose_tokens", "prepare_weight", "hopper_gemm"} <= set(found)
    assert found.count("int8_gemm") == 4
    assert found.count("prepare_weight") == 4  # the masks, what to keep, and gamma, all of which can be None


def test_a_prompt_is_stored_in_caches_on_its_own_device() -> None:
    cache, table, one = torch.zeros(1, 1, 2, 16), torch.zeros(8, 16), torch.zeros(1).long()
    message = "rotate_and_store needs all tensors on one device: qkv is on cpu, and values on cuda:1"
    with pytest.raises(ValueError, match=message):
        rotate_and_store(torch.zeros(1, 2, 48), None, table, table, cache, cache.as_subclass(Elsewhere), one, 1, one)


@pytest.mark.parametrize("where", ["head", "keys", "lengths"])
def test_a_decode_step_has_one_device(where: str) -> None:
    weights = PackedWeights(Shape(1, 896, 4864, 14, 2, 64, 1003), *(torch.zeros(2) for _ in range(6)))
    cache, lengths = torch.zeros(1), torch.zeros(1).long()
    elsewhere = torch.zeros(1).as_subclass(Elsewhere)
    caches = [(elsewhere if where == "keys" else cache, cache)]
    if where == "head":
        weights.head = elsewhere
    name = "the keys of layer 0" if where == "keys" else where
    with pytest.raises(ValueError, match=f"words is on cpu, and {name} on cuda:1"):
        DecodeStep(weights, caches, 64, lengths=elsewhere if where == "lengths" else lengths)
