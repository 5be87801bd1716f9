"""Rotary positions (RoPE, arXiv 2104.09864): the tables of a model, and the rotation itself.

Each pair of features is a wave: it rotates at its own frequency as the position grows. Models stretch slow waves to
work beyond the context that they were first trained with (:class:`~sbn_lightning.models.rope_scaling.RopeScaling`).
Llama 3.1 to 3.3 and YaRN leave waves as they are that turn often in that context. Waves that hardly turn in it become
``factor`` times longer. The waves between are stretched by a factor between 1 and ``factor``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.rope_scaling import RopeScaling


def rope_frequencies(config: TransformerConfig) -> Tensor:
    """The angle in radians that each pair of features turns from one position to the next, without scaling.

    Returns:
        The angles, float64 ``[head_size / 2]``.
    """
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float64) / config.head_size
    return config.rope_theta**-exponents


def rope_stretch(scaling: RopeScaling, frequencies: Tensor) -> Tensor:
    """How many times slower each frequency becomes, from 1 to ``scaling.factor``.

    The new frequency is ``f' = (s + (1 - s) / factor) f``, where the share ``s`` of the old frequency is

    * ``llama3``: 0 up to ``low_freq_factor`` turns in the original context, rising linearly with the turns, and 1 from
      ``high_freq_factor`` turns on. The formula comes from Meta's Llama 3.1 release.
    * ``yarn``: 1 down to ``beta_fast`` turns, falling linearly with the number of the pair, and 0 from ``beta_slow``
      turns down (arXiv 2309.00071, section 3.2).
    * ``linear``: 0 for every pair.
    * ``dynamic``: 1 for every pair. Only sequences up to the original context are allowed.

    Hugging Face's transformers has the same formulas in ``modeling_rope_utils``.

    Args:
        scaling: The parameters of the scaling.
        frequencies: Radians for each position, of the pairs of a head in their order, ``[head_size / 2]``.

    Returns:
        ``f / f'``, in the shape and dtype of ``frequencies``.
    """
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        assert low is not None
        assert high is not None
        turns = scaling.original_context * frequencies / (2 * math.pi)
        share = ((turns - low) / (high - low)).clamp(0, 1)
    elif scaling.rope_type == "yarn":
        share = _yarn_share(scaling, frequencies)
    else:
        share = torch.full_like(frequencies, 1.0 if scaling.rope_type == "dynamic" else 0.0)
    return 1 / (share + (1 - share) / scaling.factor)


def _yarn_share(scaling: RopeScaling, frequencies: Tensor) -> Tensor:
    """How much of its old frequency each pair keeps under YaRN, from 0 to 1."""
    # Frequencies fall by the same ratio from pair to pair, so a number of turns stands for a place among the pairs.
    step = -(frequencies[1:2] / frequencies[:1]).log()
    first, last = (
        math.log(scaling.original_context / (turns * 2 * math.pi)) / step
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = first.floor(), last.ceil()
    first, last = first.clamp(min=0), last.clamp(max=2 * len(frequencies) - 1)
    pairs = torch.arange(len(frequencies), dtype=frequencies.dtype, device=frequencies.device)
    # Two borders at one place would divide by zero. transformers takes the same tiny distance.
    distance = torch.where(last == first, 0.001, last - first)
    return 1 - ((pairs - first) / distance).clamp(0, 1)


def rope_tables(config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, each float32 ``[max_sequence_length, head_size]``.

    Feature i of the first half of a head forms a pair with feature i of the second half, as in the published weights of
    Llama and Qwen. The sines for the first half are negated, as :func:`apply_rope` needs them. YaRN multiplies queries
    and keys by a factor, which is part of the tables.
    """
    frequencies = rope_frequencies(config)
    magnitude = 1.0
    if config.rope_scaling is not None:
        frequencies = frequencies / rope_stretch(config.rope_scaling, frequencies)
        magnitude = config.rope_scaling.magnitude
    angles = torch.outer(torch.arange(config.max_sequence_length, dtype=torch.float64), frequencies)
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    return cos.float().repeat(1, 2), torch.cat((-sin, sin), dim=1).float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [B, heads, T, E]`` by position; ``cos`` and ``sin`` are ``[T, E]``, or ``[B, 1, T, E]``.

    A roll swaps the two halves of a head, and a compiler turns a roll into one load in the forward and in the backward.
    Two slices and a concatenation would become two loads with conditions, and the backward of q, k and v would nest
    these conditions.
    """
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)
