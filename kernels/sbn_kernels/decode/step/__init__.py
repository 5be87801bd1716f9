"""One decode step of a ternary transformer, embedding to logits, as one persistent kernel for NVIDIA Hopper.

A caller gathers the tensors of a model into :class:`Weights` and packs them once with :func:`pack`. :func:`supports`
says whether the kernel can compute a shape and a batch on a device. :class:`DecodeStep` then runs on caches that the
caller owns.

* :mod:`~sbn_kernels.decode.step.kernel` describes the kernel. Its device helpers are in ``context``, ``handover``,
  ``output`` and ``rows``, and the inline PTX is in ``attention``, ``gemv``, ``head``, ``ptx``, ``shared`` and
  ``tokens``. These modules need Triton 3.9; they are imported when a step is made.
* :mod:`~sbn_kernels.decode.step.plan` says which models the kernel can compute.
* :mod:`~sbn_kernels.decode.step.reference` is the same computation in plain PyTorch.
"""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "DecodeStep": "step",
    "Layer": "weights",
    "PackedWeights": "weights",
    "Shape": "plan",
    "StepTimeoutError": "step",
    "StepUnavailableError": "step",
    "Ternary": "weights",
    "Weights": "weights",
    "pack": "weights",
    "supports": "step",
}

__all__ = [
    "DecodeStep",
    "Layer",
    "PackedWeights",
    "Shape",
    "StepTimeoutError",
    "StepUnavailableError",
    "Ternary",
    "Weights",
    "pack",
    "supports",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
