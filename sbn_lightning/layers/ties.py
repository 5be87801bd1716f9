"""Breaks ties between weights at the edge of a mask.

A mask keeps the N largest magnitudes of a group. A file with 4-bit weights holds few magnitudes, so in many groups the
smallest weight that is kept and the largest one that is not are equal: in 15 % of the groups of 2:4 in a GGUF file of
the type Q4_1, and in 0.4 % if the weights have the dtype bfloat16. The mask takes the first one of equal weights. The
first optimiser step then makes them differ, and so decides all these masks anew at once, each without regard to the
others. The loss jumps, and a short training does not recover (docs/pretrained.md has the figures).

Noise of 1 % of a matrix's standard deviation decides the masks beforehand. That is little beside the rounding to 4 bits
itself, whose error is about 8 %. A tie of zeros decides nothing, so it does not count.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.masked_linear import masked_layers
from sbn_lightning.sparsity.pattern import NMPattern

__all__ = ["break_ties", "find_ties", "of_ties", "tied_groups"]

LEAST = 0.01  # The share of a matrix's groups that must be tied. Weights in bfloat16 have half as many ties.
_ROWS = 256  # How many rows of a matrix are looked at.


def tied_groups(weight: Tensor, pattern: NMPattern) -> float:
    """Return the share of groups in which equal magnitudes other than zero lie on both sides of the mask's edge.

    Args:
        weight: The weights, ``[..., in_features]``.
        pattern: The pattern of the mask.
    """
    if pattern.is_dense or not weight.numel():
        return 0.0
    largest = weight.detach().abs().unflatten(-1, (-1, pattern.m)).topk(pattern.n + 1, dim=-1).values
    kept, masked = largest[..., -2], largest[..., -1]
    return float(((kept == masked) & (kept > 0)).float().mean())


def find_ties(model: nn.Module) -> dict[str, float]:
    """Return the masked layers in which more than 1 % of the groups are tied, with the share of these groups.

    Up to 256 rows of each weight are looked at.

    Args:
        model: The model. Weights on the meta device, which a checkpoint will fill, do not count. Of sharded weights the
            rows of this process count.
    """
    found = {}
    for name, layer in masked_layers(model):
        weight = layer.weight.detach()
        weight = weight.to_local() if isinstance(weight, DTensor) else weight
        if weight.is_meta or not len(weight):
            continue
        some = weight[:: -(-len(weight) // _ROWS)]
        if (tied := tied_groups(some, layer.pattern)) > LEAST:
            found[name] = tied
    return found


def break_ties(model: nn.Module, noise: float = 0.01) -> dict[str, float]:
    """Add noise to the weights of the masked layers in which more than 1 % of the groups are tied (:func:`find_ties`).

    Other layers stay as they are. The noise has a normal distribution. It depends only on the name of the layer, so all
    processes draw the same. Call the function once, when a model has the weights of another one, before training starts
    and before weights are sharded.

    Args:
        model: The model, changed in place.
        noise: The standard deviation of the noise, as a share of the standard deviation of each weight; 0 changes
            nothing.

    Returns:
        The changed layers, with the share of groups that were tied.

    Raises:
        ConfigError: If ``noise`` is negative, or a weight is sharded already.
    """
    if noise < 0:
        raise ConfigError(f"break_ties={noise} is a share of a standard deviation, so it cannot be negative")
    found = find_ties(model) if noise else {}
    layers = dict(masked_layers(model)) if found else {}
    for name in found:
        weight = layers[name].weight.detach()
        if isinstance(weight, DTensor):
            raise ConfigError(f"the weight of {name} is sharded; call break_ties before shard")
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        weight.add_(drawn, alpha=noise * float(weight.float().std()))
    return found


def of_ties(found: Mapping[str, float], noise: float | None = None) -> str:
    """Say in how many layers ties are.

    Args:
        found: The layers and the shares of tied groups.
        noise: The argument of :func:`break_ties`; None if the ties are still there.
    """
    told = (
        f"{len(found)} layers, such as {next(iter(found))}, have equal weights on both sides of the mask's edge in up "
        f"to {max(found.values()):.0%} of their groups, as weights from a file with few bits do"
    )
    return told if noise is None else f"{told}; noise of {noise:g} of the standard deviation decides between them"
