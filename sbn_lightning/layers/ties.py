"""Breaks ties between weights at the edge of a mask.

A mask keeps the N largest magnitudes of a group. A file with 4-bit weights holds few magnitudes, so in many groups the
smallest weight that is kept and the largest one that is not are equal. At 2:4 this holds for 15 % of the groups of a
GGUF file of the type Q4_1, and for 0.4 % if the weights have the dtype bfloat16. The mask keeps the first one of equal
weights. The first optimiser step makes the weights differ, and so decides all these masks anew at once, each without
regard to the others. The loss jumps, and a short training does not recover (docs/pretrained.md has the figures).

Noise of 1 % of a matrix's standard deviation decides the masks beforehand. The noise is little beside the error of the
rounding to 4 bits, which is about 8 %. Zeros that are tied do not count, because a masked zero changes nothing. Weights
that are not trained keep their masks, and codes that rank a group (``mask_source="ternary"``) stay equal with noise, so
both are left alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.masked_linear import MaskedLinear, masked_layers
from sbn_lightning.sparsity.pattern import NMPattern

__all__ = ["break_ties", "find_ties", "of_ties", "tied_groups"]

# The tied groups that a matrix must have, as a share of its weights: 1 % of the groups of 2:4, and 2 % of those of 4:8.
# Larger groups have more ties. Weights in bfloat16 have half as many at each M.
LEAST = 0.0025
_ROWS = 256  # How many rows of a matrix are looked at.
_AT_ONCE = 2**24  # How many numbers of the noise are in memory.


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
    """Return the masked layers in which more than M / 4 % of the groups are tied, with the share of these groups.

    Up to 256 rows of each weight are looked at.

    Args:
        model: The model. Weights on the meta device, which a checkpoint will fill, frozen weights, and layers whose
            codes rank the weights do not count. Of sharded weights the rows of this process count.
    """
    found = {}
    for name, layer in _concerned(model):
        weight = layer.weight.detach()
        if tied := _tied(weight.to_local() if isinstance(weight, DTensor) else weight, layer.pattern):
            found[name] = tied
    return found


@torch.no_grad()
def break_ties(model: nn.Module, noise: float = 0.01) -> dict[str, float]:
    """Add noise to the weights of the masked layers in which more than M / 4 % of the groups are tied.

    Layers that :func:`find_ties` does not count stay as they are. The noise has a normal distribution. It depends only
    on the name of the layer and the shape of the weight, so all processes draw the same. Call the function once, when a
    model has the weights of another one and before training starts.

    Args:
        model: The model, changed in place. If its weights are sharded, all ranks must call this together.
        noise: The standard deviation of the noise, as a share of the standard deviation of each weight; 0 changes
            nothing.

    Returns:
        The changed layers, with the share of groups that were tied.

    Raises:
        ConfigError: If ``noise`` is negative.
    """
    if noise < 0:
        raise ConfigError(f"break_ties={noise} is a share of a standard deviation, so it cannot be negative")
    found = {}
    for name, layer in _concerned(model) if noise else ():
        weight = layer.weight.detach()
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight  # Ranks must find the same layers.
        if tied := _tied(whole, layer.pattern):
            found[name] = tied
            _add_noise(name, weight, noise * float(whole.std()))
    return found


def _concerned(model: nn.Module) -> Iterator[tuple[str, MaskedLinear]]:
    """The layers whose masks a training can change, because it changes the weights that rank a group."""
    for name, layer in masked_layers(model):
        weight = layer._parameters.get("weight")
        trained = weight is not None and weight.requires_grad and not weight.is_meta
        if trained and layer.mask_source == "latent":
            yield name, layer


def _tied(weight: Tensor, pattern: NMPattern) -> float:
    """The share of tied groups; 0 if there are as few as weights in 16 bits have."""
    tied = tied_groups(weight[:: max(1, -(-len(weight) // _ROWS))], pattern)
    return tied if tied > LEAST * pattern.m else 0.0


def _add_noise(name: str, weight: Tensor, deviation: float) -> None:
    """Add the noise of the layer ``name`` to its weight, some rows at a time."""
    if isinstance(weight, DTensor):
        whole = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
        _add_noise(name, whole, deviation)
        weight.add_(distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None))
        return
    # The CPU draws, in float32, because a GPU draws other numbers. A Trainer builds a model where other devices and
    # dtypes are the default.
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()))
    for part in weight.split(max(1, _AT_ONCE // weight.shape[1])):
        drawn = torch.randn(part.shape, generator=generator, device="cpu", dtype=torch.float32)
        part.add_(drawn.mul_(deviation).to(part))


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
