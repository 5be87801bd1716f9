"""All kernels of the package: importing this file registers them. And what of them this GPU and this Triton can run.

A kernel for a new GPU is a folder beside the others and one import here. A kernel that lives elsewhere calls
:func:`sbn_kernels.gemm.registry.register` itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import triton
from torch import Tensor

import sbn_kernels.gemm.sm80.gemm
import sbn_kernels.gradients.weight_gradient  # noqa: F401 (registers the kernels of the gradients)
from sbn_kernels.block import norm, rope
from sbn_kernels.decode import head
from sbn_kernels.decode import triton as decode
from sbn_kernels.exchange import triton as exchange
from sbn_kernels.gemm import cusparselt, grouped, portable, registry  # noqa: F401 (grouped registers its kernel)
from sbn_kernels.gemm.sm90 import gemm as sm90
from sbn_kernels.gradients import cross_entropy, transpose
from sbn_kernels.gradients import triton as gradients
from sbn_kernels.prepare import triton as prepare
from sbn_kernels.prompt import attention
from sbn_kernels.prompt import triton as prompt
from sbn_kernels.quantize import triton as quantize
from sbn_kernels.runtime import capability
from sbn_kernels.runtime.capability import Needs, UnsupportedError
from sbn_kernels.sampling import threshold
from sbn_kernels.sampling import triton as sampling
from sbn_kernels.swiglu import triton as swiglu

# the names are those of version 0.1.0
_NEEDS: dict[str, Needs] = {
    "quantize": quantize.NEEDS,
    "prepare": prepare.NEEDS,
    "int8_gemm": portable.NEEDS,
    "cusparselt": cusparselt.NEEDS,
    "sparse_gemm": sm90.SPARSE_NEEDS,
    "ternary_gemm": sm90.DENSE_NEEDS,
    "decode": decode.PORTABLE_NEEDS,
}
OPS = tuple(_NEEDS)
_STEPS: dict[str, tuple[str, Needs]] = {
    "quantize": ("tokens to int8", quantize.NEEDS),
    "prepare": ("weight to mask, codes and packed words", prepare.NEEDS),
    "exchange": ("gamma, codes and mask of a weight whose rows lie on several GPUs", exchange.NEEDS),
    "swiglu": ("SwiGLU and quantisation in one, and the backward", swiglu.NEEDS),
    "quantize_gradient": ("output gradients to int8, in both orders", gradients.NEEDS),
    "transpose": ("tokens and weights turned round", transpose.NEEDS),
    "norm": ("RMSNorm and quantisation in one, and the backward", norm.NEEDS),
    "rope": ("the backward of rotary positions", rope.NEEDS),
    "prompt": ("a prompt's rotary positions, and its way into the cache", prompt.NEEDS),
    "attend": ("attention of prompts to a cache", attention.NEEDS),
    "cross_entropy": ("loss of an 8-bit head in training, with a rounded gradient", cross_entropy.NEEDS),
    "int8_rows": ("an 8-bit head, up to 64 tokens", head.NEEDS),
    "choose_tokens": ("the choice of the next tokens, greedy or drawn", sampling.NEEDS),
    "lowest_logits": ("the smallest logits that top_k and top_p leave", threshold.NEEDS),
}


@dataclass(frozen=True)
class Capabilities:
    """Result of :func:`capabilities`.

    Attributes:
        device: The name of the GPU, or "none".
        compute_capability: For example (9, 0); (0, 0) without a GPU.
        torch: The version of torch.
        triton: The version of Triton.
        reasons: For each op that cannot run, why not.
    """

    device: str
    compute_capability: tuple[int, int]
    torch: str
    triton: str
    reasons: dict[str, str] = field(default_factory=dict)

    def can(self, op: str) -> bool:
        """Whether ``op`` runs here.

        Raises:
            ValueError: If ``op`` is not one of ``OPS``.
        """
        if op not in OPS:
            raise ValueError(f"unknown op {op!r}; ops are {', '.join(OPS)}")
        return op not in self.reasons

    def require(self, op: str) -> None:
        """Checks that ``op`` runs here.

        Raises:
            UnsupportedError: With the reason, if ``op`` cannot run.
        """
        if not self.can(op):
            raise UnsupportedError(f"{op}: {self.reasons[op]}")

    def __str__(self) -> str:
        sm = "".join(map(str, self.compute_capability))
        lines = [f"{self.device} (sm_{sm}), torch {self.torch}, triton {self.triton}"]
        lines += [f"  {op:13s} {self.reasons.get(op, 'yes')}" for op in OPS]
        return "\n".join(lines)


def capabilities(device: torch.device | int | None = None) -> Capabilities:
    """Says what can run with this torch and this Triton.

    Args:
        device: A GPU, or its number; None: the current GPU. Without a GPU the answer is about Triton's interpreter.

    Returns:
        What runs, and for each op that does not, the reason.
    """
    if not torch.cuda.is_available():
        index, name, capability = None, "none", (0, 0)
    else:
        given = device.index if isinstance(device, torch.device) else device
        index = torch.cuda.current_device() if given is None else given
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    reasons = {op: reason for op, needs in _NEEDS.items() if (reason := needs.missing(index))}
    return Capabilities(name, capability, torch.__version__, triton.__version__, reasons)


def runs(op: str, index: int | None) -> bool:
    """Whether one of ``OPS`` runs on GPU ``index`` (None: without a GPU)."""
    if index is None and torch.cuda.is_available():
        return False
    return _NEEDS[op].missing(index) is None


def require(op: str, tensor: Tensor) -> None:
    """Checks that one of ``OPS`` runs where ``tensor`` is.

    Raises:
        UnsupportedError: With the reason, if the op cannot run there.
    """
    capability.require(_NEEDS[op], tensor)


class Row(NamedTuple):
    """One kernel in the report of :func:`report`.

    Attributes:
        kernel: The name of the kernel.
        serves: What the kernel does, in a few words.
        reason: Why the kernel does not run here; None if it runs.
    """

    kernel: str
    serves: str
    reason: str | None


def report(index: int | None) -> list[Row]:
    """Every kernel, with the reason where it does not run.

    Args:
        index: The number of the GPU; None: no GPU.
    """
    rows = []
    for kernel in registry.products():
        pattern = "any pattern" if kernel.pattern is None else f"at most {kernel.pattern[0]}:{kernel.pattern[1]}"
        tokens = "" if kernel.most_tokens is None else f", up to {kernel.most_tokens} tokens"
        untimed = ", not timed on a GPU yet" if kernel.untimed else ""
        serves = f"backend {kernel.backend}: product, {pattern}{tokens}{untimed}"
        rows.append(Row(kernel.name, serves, kernel.needs.missing(index)))
    for several in registry.all_grouped():
        serves = "experts in one launch, any pattern, not timed on a GPU yet"
        rows.append(Row(several.name, serves, several.needs.missing(index)))
    for pair in registry.all_gradients():
        rows.append(Row(f"{pair.name}-gradients", "both products of int8 gradients", pair.needs.missing(index)))
    rows += [Row(name, serves, needs.missing(index)) for name, (serves, needs) in _STEPS.items()]
    return rows
