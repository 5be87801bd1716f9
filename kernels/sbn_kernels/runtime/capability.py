"""What this GPU and this Triton can run, and for what they cannot, the reason in one line.

Kernels never choose silently: an op called where it cannot run raises ``UnsupportedError`` with the text that
``capabilities`` reports; the choice between ops belongs to the caller.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

OPS = ("quantize", "prepare", "int8_gemm", "cusparselt", "sparse_gemm", "ternary_gemm", "decode")


class UnsupportedError(RuntimeError):
    """The op cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Capabilities:
    """Result of :func:`capabilities`.

    Attributes:
        device: Name of the GPU, or "none".
        compute_capability: For example (9, 0); (0, 0) without a GPU.
        torch: Version of torch.
        triton: Version of Triton.
        reasons: For each op that cannot run, why not.
    """

    device: str
    compute_capability: tuple[int, int]
    torch: str
    triton: str
    reasons: dict[str, str] = field(default_factory=dict)

    def can(self, op: str) -> bool:
        """Whether ``op`` (one of ``OPS``) runs here."""
        if op not in OPS:
            raise ValueError(f"unknown op {op!r}; ops are {', '.join(OPS)}")
        return op not in self.reasons

    def require(self, op: str) -> None:
        """Raises:
        UnsupportedError: With the reason, if ``op`` cannot run here.
        """
        if not self.can(op):
            raise UnsupportedError(f"{op}: {self.reasons[op]}")

    def __str__(self) -> str:
        sm = "".join(map(str, self.compute_capability))
        lines = [f"{self.device} (sm_{sm}), torch {self.torch}, triton {self.triton}"]
        lines += [f"  {op:13s} {self.reasons.get(op, 'yes')}" for op in OPS]
        return "\n".join(lines)


@torch.compiler.assume_constant_result
def gluon_missing() -> str | None:
    """What Gluon lacks for the inline-PTX kernels; None if nothing."""
    return _gluon_missing()


@functools.cache
def _gluon_missing() -> str | None:
    try:
        from triton.experimental.gluon import language as gl
    except ImportError:
        return f"needs Triton >= 3.9 (Gluon with inline_asm on shared memory); this is Triton {triton.__version__}"
    if not hasattr(gl, "inline_asm"):
        return f"needs Triton >= 3.9 (Gluon with inline_asm on shared memory); this is Triton {triton.__version__}"
    return None


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported)."""
    return _interpreting()


@functools.cache  # Triton looks into the environment each time
def _interpreting() -> bool:
    return bool(triton.knobs.runtime.interpret)


@torch.compiler.assume_constant_result
def runs(op: str, index: int | None) -> bool:
    """Whether ``op`` runs on GPU ``index`` (None: on no GPU); a constant to ``torch.compile``."""
    if index is None and torch.cuda.is_available():
        return False
    return _runs(op, index)


@functools.cache
def _runs(op: str, index: int | None) -> bool:
    return capabilities(index).can(op)


def require(op: str, tensor: Tensor) -> None:
    """Raises:
    UnsupportedError: If ``op`` cannot run where ``tensor`` is, with the reason.
    """
    _require(op, tensor.get_device())


@functools.cache  # of successes
def _require(op: str, index: int) -> None:
    capabilities(index if index >= 0 else None).require(op)


def capabilities(device: torch.device | int | None = None) -> Capabilities:
    """Says what can run on ``device`` (default: the current GPU) with this torch and Triton."""
    if not torch.cuda.is_available():
        free = ("quantize", "prepare", "int8_gemm", "decode") if interpreting() else ()
        reasons = {op: "no CUDA GPU is visible to torch" for op in OPS if op not in free}
        return Capabilities("none", (0, 0), torch.__version__, triton.__version__, reasons)
    index = device.index if isinstance(device, torch.device) else device
    return _of(torch.cuda.current_device() if index is None else index)


@functools.cache
def multiprocessors(index: int) -> int:
    """Streaming multiprocessors of GPU ``index``."""
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _of(index: int) -> Capabilities:
    capability = torch.cuda.get_device_capability(index)
    reasons = {}
    if torch.version.hip is not None:
        reasons = dict.fromkeys(OPS, "written for NVIDIA GPUs; this torch is built for ROCm")
    if capability < (8, 0) and not reasons:
        why = f"needs compute capability >= 8.0, not {capability[0]}.{capability[1]}"
        reasons = dict.fromkeys(("int8_gemm", "cusparselt", "decode"), why)
    for op in ("sparse_gemm", "ternary_gemm"):
        if op not in reasons and capability != (9, 0):
            reasons[op] = f"needs a Hopper GPU (compute capability 9.0), not {capability[0]}.{capability[1]}"
        if op not in reasons and (missing := gluon_missing()):
            reasons[op] = missing
    if "cusparselt" not in reasons and not torch.backends.cusparselt.is_available():
        reasons["cusparselt"] = "this torch is built without cuSPARSELt"
    return Capabilities(torch.cuda.get_device_name(index), capability, torch.__version__, triton.__version__, reasons)
