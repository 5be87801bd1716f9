"""Launching a kernel again, without Triton's binding of its arguments, which takes most of the host's time of a launch.

``kernel[grid](...)`` names, types and specialises every argument, formats the options and compares globals, each time:
14 to 20 microseconds where the launch itself takes 3 to 6. A :class:`Launcher` keeps the compiled kernel that Triton
chose, under all that its choice depends on: device, dtypes, number of warps, and the exact values of all numbers and
constants, so that no rule of specialisation is repeated here. Of a pointer Triton asks, on CUDA, whether 16 divides it;
only where that is true of all pointers of a launch is it made the short way.

The short way is public, ``compiled[grid](*arguments)``, the same from Triton 3.6 to 3.9. Hooks around launches (of
profilers) are called. What it passes over is a change, after a kernel's first launch, of Triton's debugging and
compiling options, and what Triton does before each launch: pre-run hooks and the comparison of global variables.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

_MOST_COMPILED = 4096  # sizes that vary without end, as tokens in an evaluation, must not collect


class Launcher:
    """Launches ``kernel``, whose parameters are descriptors, pointers, integers and constants, in this order.

    Args:
        kernel: From ``triton.jit`` or ``gluon.jit``.
        options: Of the launch, always the same, as ``enable_fp_fusion``.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel = kernel
        self.options = options
        self.compiles = isinstance(kernel, triton.JITFunction)  # in the interpreter it is something else
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
        """Blocks and layouts of ``descriptors`` must follow from their dtypes and from ``constants``."""
        arguments = (*descriptors, *tensors, *numbers, *constants)
        if not self.compiles:
            self.kernel[grid](*arguments, num_warps=num_warps, **self.options)
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
        compiled = self.kernel[grid](*arguments, num_warps=num_warps, **self.options)
        if address % 16 == 0 and isinstance(compiled, CompiledKernel):
            if len(self.compiled) >= _MOST_COMPILED:
                self.compiled.clear()
            self.compiled[key] = compiled
