"""Rotary positions (arXiv 2104.09864): the tables of a model, and the turn itself.

Llama 3.1 to 3.3 stretch slow waves, to reach further than the context they were first trained with
(:class:`RopeScaling`): no wave is stretched that turns often in that context, those that hardly turn in it by
``factor``, and the ones between by an amount between.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sbn_lightning.models.config import RopeScaling, TransformerConfig


def rope_frequencies(config: TransformerConfig) -> Tensor:
    """Radians a position by which each pair of features turns, before scaling: float64 ``[head_size / 2]``."""
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float64) / config.head_size
    return config.rope_theta**-exponents


def rope_stretch(scaling: RopeScaling, frequencies: Tensor) -> Tensor:
    """How many times slower each of ``frequencies`` becomes, from 1 to ``scaling.factor``, in their shape and dtype.

    A share ``s`` of a frequency ``f`` stays and the rest is divided: ``f' = (s + (1 - s) / factor) f``, where ``s``
    rises from 0 at ``low_freq_factor`` turns in the original context to 1 at ``high_freq_factor``. The formula is that
    of Meta's Llama 3.1 release; ``_compute_llama3_parameters`` in Hugging Face's transformers is the same.
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / (share + (1 - share) / scaling.factor)


def rope_tables(config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, each float32 ``[max_sequence_length, head_size]``.

    The two halves of a head are rotated against each other, as in Llama's and Qwen's published weights; the sines of
    the first half have the sign that this takes.
    """
    frequencies = rope_frequencies(config)
    if config.rope_scaling is not None:
        frequencies = frequencies / rope_stretch(config.rope_scaling, frequencies)
    angles = torch.outer(torch.arange(config.max_sequence_length, dtype=torch.float64), frequencies)
    return angles.cos().float().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), dim=1).float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates ``x [B, heads, T, E]`` by position; ``cos`` and ``sin`` are ``[T, E]``, or ``[B, 1, T, E]``.

    The halves change places by a roll, of which a compiler makes one load, forward and backward. Of two slices and a
    concatenation it makes a load with a condition for each, and the backward of q, k and v nests them.
    """
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)
