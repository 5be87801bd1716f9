"""The fast path of a launcher launches the same compiled kernel with the same arguments as Triton's own path.

No GPU is needed: Triton compiles for a GPU that is not there, and a launch is recorded instead of executed.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from sbn_kernels.common.overlap import begin
from sbn_kernels.runtime.launch import Launcher, launching_early
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

LAUNCHES: list[tuple[Any, ...]] = []


class Utils:
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


class Driver:
    """The part of Triton's driver that a launch calls."""

    device = 0
    utils = Utils()

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        # grid and stream, then the properties of the kernel, then its arguments
        return lambda *a: LAUNCHES.append(
            (metadata.hash, *a[:4], *(x.data_ptr() if hasattr(x, "data_ptr") else x for x in a[9:]))
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 7 + device


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    fake = Driver()
    monkeypatch.setattr(driver, "_active", fake)
    monkeypatch.setattr(torch.cuda, "current_device", fake.get_current_device)
    monkeypatch.setattr("triton.compiler.compiler.max_shared_mem", lambda device: 232448)  # not for its cache
    LAUNCHES.clear()
    yield fake
    for function in (copy_kernel, early_kernel):
        for compiled, *_ in function.device_caches.values():
            for kernel in compiled.values():
                kernel.module = None  # not for a real driver to unload
        function.device_caches.clear()


@triton.jit
def copy_kernel(x_pointer, y_pointer, rows, stride, BLOCK: tl.constexpr, ADD: tl.constexpr):
    at = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y_pointer + at, tl.load(x_pointer + at, mask=at < rows) + ADD, mask=at < rows)


@triton.jit
def early_kernel(x_pointer, y_pointer, rows, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    begin(EARLY)
    at = tl.arange(0, BLOCK)
    tl.store(y_pointer + at, tl.load(x_pointer + at, mask=at < rows), mask=at < rows)


X, Y = torch.zeros(64), torch.zeros(64)
CASES = [
    ((X, Y), (64, 16), (32, False), 4),
    ((X, Y), (64, 16), (32, True), 4),
    ((X, Y), (64, 16), (32, False), 8),
    ((X, Y), (64, 1), (32, False), 4),  # an argument of 1 is compiled in as a constant
    ((X, Y), (64, 2), (32, False), 4),
    ((X, Y), (63, 16), (32, False), 4),
    ((X, Y), (2**40, 16), (32, False), 4),
    ((X.half(), Y), (64, 16), (32, False), 4),
    ((X, Y[1:]), (64, 16), (32, False), 4),  # memory that does not start on a 16-byte boundary
    ((X[4:], Y), (64, 16), (32, False), 4),
]


def test_the_short_way_launches_the_same(gpu: Driver) -> None:
    launcher = Launcher(copy_kernel, enable_fp_fusion=True)
    for _ in range(3):
        for tensors, numbers, constants, warps in CASES:
            for device in (0, 1):
                gpu.device = device
                copy_kernel[(5, 2, 1)](*tensors, *numbers, *constants, num_warps=warps, enable_fp_fusion=True)
                launcher((5, 2, 1), tensors, numbers, constants, warps)
                own, other = LAUNCHES[-2:]
                assert own == other
                assert own[1:5] == (5, 2, 1, 7 + device)
    assert len({launch[0] for launch in LAUNCHES}) == len(CASES) - 1  # strides 2 and 16 differ, offsets by 4 do not


def test_the_second_launch_is_the_short_one(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Launcher(copy_kernel, enable_fp_fusion=True)
    own = []
    run = copy_kernel.run
    monkeypatch.setattr(copy_kernel, "run", lambda *args, **kwargs: own.append(1) or run(*args, **kwargs))
    tensors, numbers, constants, _ = CASES[0]
    for _ in range(3):
        launcher((1, 1, 1), tensors, numbers, constants)
    assert (len(own), len(LAUNCHES)) == (1, 3)
    for _ in range(3):  # misaligned memory always takes Triton's path
        launcher((1, 1, 1), (X, Y[1:]), numbers, constants)
    assert (len(own), len(LAUNCHES)) == (4, 6)
    assert all(isinstance(compiled, CompiledKernel) for compiled in launcher.compiled.values())


def test_sizes_without_end_do_not_collect(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbn_kernels.runtime.launch._MOST_COMPILED", 4)
    launcher = Launcher(copy_kernel, enable_fp_fusion=True)
    for rows in range(2, 40):
        launcher((1, 1, 1), (X, Y), (rows, 16), (32, False))
        assert 1 <= len(launcher.compiled) <= 4
    assert len(LAUNCHES) == 38


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_kernels_begin_early_only_where_they_are_told_to(
    gpu: Driver, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    """A kernel that is launched early waits in the device; a kernel that is not has no such instruction."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    launcher = Launcher(early_kernel, enable_fp_fusion=True, overlaps=True)

    def compiled() -> CompiledKernel:
        launcher((1, 1, 1), (X, Y), (64,), (64,))
        return next(each for each in launcher.compiled.values() if each.metadata.hash == LAUNCHES[-1][0])

    before = compiled()
    with launching_early(torch.device("cuda")):
        within = compiled()
    assert compiled() is before
    for kernel, early in ((before, False), (within, capability == (9, 0))):
        assert bool(kernel.metadata.launch_pdl) == early
        assert ("griddepcontrol.wait" in kernel.asm["ptx"]) == early
    assert len(launcher.compiled) == 1 + (capability == (9, 0))
