"""The seeds of the stochastic rounding: one for each layer, pass and process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from sbn_lightning.backends.reference import REFERENCE
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear


def draw_seeds(layers: Sequence[SparseBitLinear], seed: int, passes: int) -> None:
    """Give each layer a seed for this pass of this process. A layer on the reference backend needs none.

    The seeds are new tensors, because a backward that is still to come may hold the old ones. Processes must not share
    seeds. Gradients that are rounded by the same draw have the same error, and averaging would not reduce it.

    Args:
        layers: The layers, at least one.
        seed: The seed of the run.
        passes: The number of passes before this one.
    """
    rank, processes = place()
    count = len(layers)
    first = (seed % 2**23 << 40) + (passes * processes + rank) * count
    # Two columns, so that each view starts on a 16-byte boundary; compiled code expects aligned inputs.
    seeds = torch.arange(first, first + count, device=layers[0].weight.device).repeat_interleave(2)
    for layer, drawn in zip(layers, seeds.view(count, 2)[:, :1].unbind(), strict=True):
        if layer.backend is not REFERENCE:
            layer.backend.seed = drawn.to(layer.weight.device)


def place() -> tuple[int, int]:
    """The rank of this process, and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
