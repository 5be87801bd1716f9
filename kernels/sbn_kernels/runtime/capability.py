"""What a kernel needs of the machine, and whether this machine has it.

A kernel declares a :class:`Needs` beside its code. Nothing falls back in silence: an op that is called where it cannot
run raises :class:`UnsupportedError` with the reason in one line. The choice between kernels belongs to the caller, who
asks :mod:`sbn_kernels.gemm.registry`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """Makes the result of a function a constant to ``torch.compile``; torch's own decorator has no types."""
    marked: F = torch.compiler.assume_constant_result(function)
    return marked


class UnsupportedError(RuntimeError):
    """The op cannot run here; the message says what is missing."""


@dataclass(frozen=True, eq=False)  # each is one object: comparing fields would cost every launch a microsecond
class Needs:
    """What a kernel needs of the machine.

    Attributes:
        op: The name of the kernel in error messages.
        least: The lowest compute capability the kernel runs on.
        only: The one compute capability the kernel is written for; None: every one from ``least`` on.
        gluon: Whether the kernel is written in Gluon with inline PTX, which needs Triton 3.9.
        cusparselt: Whether the kernel calls cuSPARSELt through torch.
        interpreter: Whether the kernel also runs in Triton's interpreter, on a machine without a GPU.
    """

    op: str
    least: tuple[int, int] = (8, 0)
    only: tuple[int, int] | None = None
    gluon: bool = False
    cusparselt: bool = False
    interpreter: bool = False

    def missing(self, index: int | None) -> str | None:
        """Says why the kernel cannot run.

        Args:
            index: The number of the GPU; None: no GPU, which leaves Triton's interpreter.

        Returns:
            The reason in one line, or None if the kernel runs.
        """
        return _missing(self, index)


@functools.cache
def _missing(needs: Needs, index: int | None) -> str | None:
    if index is None:
        return None if interpreting() and needs.interpreter else "no CUDA GPU is visible to torch"
    if torch.version.hip is not None:
        return "written for NVIDIA GPUs; this torch is built for ROCm"
    here = torch.cuda.get_device_capability(index)
    if needs.only is not None and here != needs.only:
        family = "a Hopper GPU (compute capability 9.0)" if needs.only == (9, 0) else f"compute capability {needs.only}"
        return f"needs {family}, not {here[0]}.{here[1]}"
    if here < needs.least:
        return f"needs compute capability >= {needs.least[0]}.{needs.least[1]}, not {here[0]}.{here[1]}"
    if needs.cusparselt and not torch.backends.cusparselt.is_available():
        return "this torch is built without cuSPARSELt"
    if needs.gluon:
        return "Triton's interpreter runs no inline PTX" if interpreting() else gluon_missing()
    return None


def place(tensor: Tensor) -> int | None:
    """The number of the GPU that holds ``tensor``; None for a tensor that is on no GPU."""
    return tensor.device.index if tensor.is_cuda else None


def require(needs: Needs, tensor: Tensor) -> None:
    """Checks that a kernel runs where ``tensor`` is.

    Raises:
        UnsupportedError: With the name of the kernel and the reason, if the kernel does not run there.
    """
    index = place(tensor)
    if index is None and torch.cuda.is_available() and not interpreting():
        raise UnsupportedError(f"{needs.op}: tensors are on the {tensor.device.type.upper()}")
    if reason := needs.missing(index):
        raise UnsupportedError(f"{needs.op}: {reason}")


@constant
def gluon_missing() -> str | None:
    """What Gluon lacks for kernels with inline PTX; None if nothing. A constant to ``torch.compile``."""
    return _gluon_missing()


@functools.cache
def _gluon_missing() -> str | None:
    try:
        from triton.experimental.gluon import language as gl
    except ImportError:
        gl = None
    if hasattr(gl, "inline_asm"):
        return None
    return f"needs Triton >= 3.9 (Gluon with inline_asm on shared memory); this is Triton {triton.__version__}"


@constant
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 when Triton was imported."""
    return _interpreting()


@functools.cache  # Triton reads the environment each time it is asked
def _interpreting() -> bool:
    return bool(triton.knobs.runtime.interpret)


@constant
def multiprocessors(index: int) -> int:
    """The number of streaming multiprocessors of GPU ``index``. A constant to ``torch.compile``."""
    return _multiprocessors(index)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
