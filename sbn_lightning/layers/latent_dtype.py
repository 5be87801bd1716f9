"""Warns of latent weights in 16 bits, in which most updates of a training are lost.

bfloat16 has 8 significant bits, so a step smaller than about 0.2 % of a weight rounds away. Near the end of a training
nearly every step is smaller. Small changes of latent weights decide which weights the mask keeps, so they need float32.

A conversion warns if it can see the problem. A model may also get 16 bits later (``precision="bf16-true"`` of Lightning
casts after the conversion), or come from a folder that is only to be run. The first step of an optimiser that owns such
weights therefore warns too, once for each weight. ``fully_shard`` of PyTorch gives the optimiser shards, and a layer
computes with other tensors. There only the conversion warns.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# The weights that layers with a mask compute with, and the weights about which a warning was given. The values mean
# nothing.
_latent = WeakIdKeyDictionary()
_told = WeakIdKeyDictionary()


def has_16_bits(weight: Tensor) -> bool:
    """Whether a weight is of a floating-point dtype with 16 bits."""
    return weight.is_floating_point() and weight.dtype.itemsize < 4


def what_is_lost(dtype: torch.dtype) -> str:
    """Return the warning, with the ways out.

    Args:
        dtype: The dtype of the latent weights.
    """
    return (
        f"the latent weights are {str(dtype).removeprefix('torch.')}, in which most updates of a training round away. "
        "Train float32 weights: from_pretrained(..., dtype=torch.float32), model.float(), or in Lightning "
        'precision="bf16-mixed" and not "bf16-true". Nothing is wrong if the model is only to be run, or if the '
        "optimiser keeps float32 copies or rounds stochastically"
    )


def note_latent(weight: Tensor) -> None:
    """Remember that a weight is the latent weight of a layer with a mask."""
    if weight not in _latent:
        _latent[weight] = True


def note_told(weights: Iterable[Tensor]) -> None:
    """Remember weights about which a conversion has warned, so that the optimiser does not warn again."""
    for weight in weights:
        _told[weight] = True


def warn_of_lost_updates(weights: Iterable[Tensor]) -> None:
    """Warn if an optimiser has latent weights in 16 bits, on the first rank only.

    Args:
        weights: The weights of an optimiser.
    """
    found = [weight for weight in weights if has_16_bits(weight) and weight in _latent and weight not in _told]
    if not found:
        return
    note_told(found)
    alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    if alone or torch.distributed.get_rank() == 0:
        warnings.warn(what_is_lost(found[0].dtype), stacklevel=2)
