"""Layers that read the same tokens quantise them once: q, k and v, or gate and up, outside of ``torch.compile``.

A model that this package did not write has a layer for each of them, and every layer gets the same tensor. The last
quantised tensor is remembered until it changes or is gone. The result is the same as without: the quantiser is a
function of the tensor alone.

A tensor counts as the same if it is the same object and its version counter has not moved, so an operation in place
brings a new quantisation. Recomputation under activation checkpointing makes new tensors, and a hook that replaces the
tokens of one layer passes another tensor. Only a write that torch does not count (``x.data.mul_()``) between two layers
would go unseen.

Nothing is shared inside ``torch.compile``, where the compiler finds equal expressions itself, nor during the capture of
a CUDA graph: a replay has to quantise what its static tensors hold by then.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Quantized = tuple[Tensor, Tensor]


class _Entry(NamedTuple):
    tokens: weakref.ref[Tensor]
    version: int
    bits: int
    stream: object
    quantized: Quantized


class _Last(threading.local):
    """The last entry of each thread. An entry holds its tokens weakly and is dropped when they are gone."""

    entry: _Entry | None = None


_last = _Last()


def quantized_once(x: Tensor, bits: int, quantize: Callable[[Tensor, int], Quantized]) -> Quantized:
    """Return int8 tokens and their scales, those of the last call if it had the same tokens.

    Args:
        x: The tokens as the layer got them, ``[..., features]``.
        bits: Bits of a quantised token.
        quantize: The quantiser, a function of ``[tokens, features]`` and the number of bits.

    Returns:
        int8 ``[tokens, features]`` and the scales ``[tokens]``.
    """
    with torch.no_grad():
        if not _can_share(x):
            return quantize(x.detach().reshape(-1, x.shape[-1]), bits)
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        found = _last.entry
        if found is not None and found.tokens() is x and found[1:4] == (x._version, bits, stream):
            return found.quantized
        quantized = quantize(x.detach().reshape(-1, x.shape[-1]), bits)
        _last.entry = _Entry(weakref.ref(x, _forget), x._version, bits, stream, quantized)
        return quantized


def _can_share(x: Tensor) -> bool:
    """Whether the identity and the version of a tensor say all about its values."""
    if type(x) not in (Tensor, nn.Parameter) or x.is_inference():
        return False  # A tensor of inference mode has no version.
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _forget(tokens: weakref.ref[Tensor]) -> None:
    if _last.entry is not None and _last.entry.tokens is tokens:
        _last.entry = None
