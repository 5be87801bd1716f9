"""Launches a kernel again without Triton's binding of its arguments, which takes most of the host's time of a launch.

``kernel[grid](...)`` names, types and specialises every argument, formats the options and compares globals, each time:
14 to 20 microseconds where the launch itself takes 3 to 6. A :class:`Launcher` keeps the compiled kernel that Triton
chose, under everything the choice depends on: device, dtypes, number of warps, and the exact values of all numbers and
constants. So no rule of Triton's specialisation is repeated here. For pointers on CUDA, Triton specialises on whether
16 divides the address; the short way is taken only where 16 divides every pointer of the launch.

The short way is public: ``compiled[grid](*arguments)``, the same from Triton 3.6 to 3.9. Hooks that profilers put
around launches are called. The short way does not notice a change of Triton's debugging and compiling options after a
kernel's first launch, and leaves out pre-run hooks and the comparison of global variables.

Every launcher says whether the compiler may fuse a multiplication and an addition into one rounding
(``enable_fp_fusion``). Triton's default changes from yes to no in version 3.10, and results must not change with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from sbn_kernels.runtime.capability import interpreting

_MOST_COMPILED = 4096  # sizes that keep changing, such as the tokens of an evaluation, must not fill the memory
_early: ContextVar[bool] = ContextVar("early", default=False)  # Whether kernels with ``overlaps`` are launched early.


@contextmanager
def launching_early(device: torch.device) -> Iterator[None]:
    """Launch kernels that can wait in the device before the kernels in front of them have ended, from Hopper on.

    Args:
        device: The device of the kernels.
    """
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) and not interpreting()
    before = _early.set(able)
    try:
        yield
    finally:
        _early.reset(before)


class Launcher:
    """Launches a kernel whose parameters are descriptors, pointers, integers and constants, in this order.

    Args:
        kernel: The function that ``triton.jit`` or ``gluon.jit`` returned.
        enable_fp_fusion: Whether the compiler may fuse a multiplication and an addition into one rounding.
        overlaps: Whether the kernel can be launched early, see :func:`launching_early`. The last parameter of such a
            kernel is the constant ``EARLY``, which the launcher gives. With ``EARLY`` the kernel has to wait as
            :mod:`sbn_kernels.common.overlap` says.
        options: Other options that are the same at each launch, for example ``maxnreg``.
    """

    def __init__(self, kernel: Any, *, enable_fp_fusion: bool, overlaps: bool = False, **options: Any) -> None:
        self.kernel = kernel
        self.overlaps = overlaps
        self.options = {"enable_fp_fusion": enable_fp_fusion, **options}
        self.compiles = isinstance(kernel, triton.JITFunction)  # in the interpreter the kernel has another class
        self.compiled: dict[tuple[Any, ...], CompiledKernel] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor, ...],
        numbers: tuple[int, ...],
        constants: tuple[int, ...],
        num_warps: int = 4,
        descriptors: tuple[Any, ...] = (),
    ) -> None:
        """Launches the kernel on the current device.

        Args:
            grid: The number of programs along each axis.
            tensors: The arguments that become pointers.
            numbers: The integer arguments.
            constants: The values of the compile-time parameters.
            num_warps: Warps of a program.
            descriptors: TMA descriptors; their blocks and layouts must follow from their dtypes and ``constants``.
        """
        options = self.options
        if self.overlaps:
            early = _early.get()
            constants = (*constants, early)
            if early:
                options = {**options, "launch_pdl": True}
        arguments = (*descriptors, *tensors, *numbers, *constants)
        if not self.compiles:
            self.kernel[grid](*arguments, num_warps=num_warps, **options)
            return
        address = 0
        for tensor in tensors:
            address |= tensor.data_ptr()
        types = [tensor.dtype for tensor in tensors] + [descriptor.base.dtype for descriptor in descriptors]
        key = (torch.cuda.current_device(), num_warps, numbers, constants, *types)
        compiled = self.compiled.get(key)
        if compiled is not None and address % 16 == 0:
            compiled[grid](*arguments)
            return
        compiled = self.kernel[grid](*arguments, num_warps=num_warps, **options)
        if address % 16 == 0 and isinstance(compiled, CompiledKernel):
            if len(self.compiled) >= _MOST_COMPILED:
                self.compiled.clear()
            self.compiled[key] = compiled
