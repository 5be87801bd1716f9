"""Rotary positions (arXiv 2104.09864): the tables of a model, and the rotation itself.

Each pair of features is a wave: it rotates at its own frequency as the position grows. Llama 3.1 to 3.3 stretch slow
waves, so that a model works beyond the context that it was first trained with (:class:`RopeScaling`). Waves that turn
often in that context stay as they are. Waves that hardly turn in it become ``factor`` times longer. The waves between
are stretched by a factor between 1 and ``factor``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sbn_lightning.models.config import RopeScaling, TransformerConfig


def rope_frequencies(config: TransformerConfig) -> Tensor:
    """The angle in radians that each pair of features turns from one position to the next, without scaling.

    Returns:
        The angles, float64 ``[head_size / 2]``.
    """
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float64) / config.head_size
    return config.rope_theta**-exponents


def rope_stretch(scaling: RopeScaling, frequencies: Tensor) -> Tensor:
    """How many times slower each frequency becomes, from 1 to ``scaling.factor``.

    The new frequency is ``f' = (s + (1 - s) / factor) f``. The share ``s`` is 0 up to ``low_freq_factor`` turns in the
    original context, rises linearly, and is 1 from ``high_freq_factor`` turns on. The formula comes from Meta's
    Llama 3.1 release. Hugging Face's transformers has the same one in ``_compute_llama3_parameters``.

    Args:
        scaling: The parameters of the scaling.
        frequencies: Radians for each position, of any shape.

    Returns:
        ``f / f'``, in the shape and dtype of ``frequencies``.
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / (share + (1 - share) / scaling.factor)


def rope_tables(config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, each float32 ``[max_sequence_length, head_size]``.

    Feature i of the first half of a head forms a pair with feature i of the second half, as in the published weights of
    Llama and Qwen. The sines for the first half are negated, as :func:`apply_rope` needs them.
    """
    frequencies = rope_frequencies(config)
    if config.rope_scaling is not None:
        frequencies = frequencies / rope_stretch(config.rope_scaling, frequencies)
    angles = torch.outer(torch.arange(config.max_sequence_length, dtype=torch.float64), frequencies)
    return angles.cos().float().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), dim=1).float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [B, heads, T, E]`` by position; ``cos`` and ``sin`` are ``[T, E]``, or ``[B, 1, T, E]``.

    A roll swaps the two halves of a head, and a compiler turns a roll into one load in the forward and in the backward.
    Two slices and a concatenation would become two loads with conditions, and the backward of q, k and v would nest
    these conditions.
    """
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)
