"""One file and one registration add a kernel. Training layers and packed layers then use it."""

import copy

import pytest
import torch
from sbn_kernels.catalog import report
from sbn_kernels.gemm import registry

from sbn_lightning.backends.integer import KernelBackend
from sbn_lightning.backends.selection import choose, describe, table
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.packed import packed_layer
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from tests.kernels.toy import CALLS, TOY

CPU = torch.device("cpu")


def test_the_one_function_chooses_it_and_says_so(toy: None) -> None:
    layers = {"a": SparseBitLinear(32, 24, pattern="2:4"), "b": SparseBitLinear(32, 24, pattern="6:8")}
    choices = choose({"a": layers["a"]}, "sparse", CPU, torch.float32, 8)
    assert choices["a"].kernel == "toy"
    assert "sparse (toy)" in table({"a": layers["a"]}, choices)
    with pytest.raises(ConfigError, match=r'"sparse" cannot run layer b: .* take 2:4, not 6:8'):
        choose(layers, "sparse", CPU, torch.float32, 8)
    assert ("toy", None) in [(row.kernel, row.reason) for row in describe()]


def test_a_layer_trains_on_it_and_a_packed_layer_runs_on_it(toy: None) -> None:
    torch.manual_seed(0)
    layer = SparseBitLinear(32, 24, pattern="2:4")
    expected = copy.deepcopy(layer)
    layer.backend = choose({"": layer}, "sparse", CPU, torch.float32, 8)[""].make("bf16")
    assert isinstance(layer.backend, KernelBackend)
    assert layer.backend.name == "sparse"
    for each in (layer, expected):
        each(torch.ones(5, 32)).sum().backward()
    assert CALLS == [5]
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, expected.weight.grad)

    packed = packed_layer(expected)
    packed.backend = "kernels"
    x = torch.randn(3, 32)
    torch.testing.assert_close(packed(x), expected(x), rtol=1e-5, atol=1e-6)
    assert CALLS == [5, 3]


def test_before_a_ramp_is_sparse_enough_the_denser_kernel_serves(toy: None) -> None:
    layer = SparseBitLinear(32, 24, pattern="2:4")
    layer.backend = KernelBackend("toy")
    layer.set_density(4)
    layer(torch.randn(5, 32))
    assert CALLS == []
    layer.set_density(2)
    layer(torch.randn(5, 32))
    assert CALLS == [5]


def test_a_kernel_that_lacks_something_is_passed_over_with_its_reason() -> None:
    tomorrow = registry.Product(
        name="tomorrow",
        backend="sparse",
        needs=registry.Needs("tomorrow", only=(99, 0)),
        form="codes",
        multiply=TOY.multiply,
        pack=TOY.pack,
        rank=1000,
    )
    with registry.registered(tomorrow):
        assert registry.products("sparse")[0].name == "tomorrow"
        reasons = {row.kernel: row.reason for row in report(None)}
        assert reasons["tomorrow"] == "no CUDA GPU is visible to torch"
        with pytest.raises(ValueError, match="registered already"):
            registry.register(tomorrow)
        with pytest.raises(ConfigError, match='"sparse" cannot run on the CPU'):
            choose({"a": SparseBitLinear(32, 24, pattern="2:4")}, "sparse", CPU, torch.float32, 8)
    assert "tomorrow" not in [kernel.name for kernel in registry.products()]
