"""The same decode step in plain PyTorch, on any device, with the roundings of the kernel.

The kernel may add floating-point numbers in another order (norms, attention, head), which moves a last bit now and
then. The products of codes are integers, and equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sbn_kernels.decode.step.weights import Layer, Ternary, Weights

BF16 = torch.bfloat16


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises float32 ``[B, K]``; returns integers as float32 ``[B, K]`` and scales ``[B, 1]``."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / x.new_full((), 127)
    return (x / scale).round().clamp(-128, 127), scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises bfloat16 ``[B, D]``; the sums are float32."""
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight.to(BF16).float() * (wide * rstd)).to(BF16)


def ternary_linear(x: Tensor, matrix: Ternary) -> Tensor:
    """Multiplies float32 ``[B, in]`` by a ternary matrix: bfloat16 ``[B, out]``. Products are exact in float64."""
    codes, scale = quantize(x)
    product = (codes.double() @ matrix.codes.double().t()).float()
    y = (product * (scale * matrix.row_scale)).to(BF16)
    return y if matrix.bias is None else (y.float() + matrix.bias.to(BF16).float()).to(BF16)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates ``x``, bfloat16 ``[B, heads, E]``, by ``cos`` and ``sin`` ``[B, 1, E]``."""
    x = x.float()
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(BF16)


def attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Attends from ``q`` ``[B, H, E]`` to a cache ``[B, K, slots, E]`` of ``lengths`` tokens: bfloat16 ``[B, H E]``."""
    repeat = q.shape[1] // keys.shape[1]
    keys, values = (c.float().repeat_interleave(repeat, 1) for c in (keys, values))
    scores = (keys @ q.float().unsqueeze(-1)).squeeze(-1) / math.sqrt(q.shape[-1])
    unseen = torch.arange(keys.shape[2], device=q.device) >= lengths.view(-1, 1, 1)
    weights = scores.masked_fill(unseen, float("-inf")).softmax(-1)
    return (weights.unsqueeze(2) @ values).squeeze(2).flatten(1).to(BF16)


@torch.no_grad()
def decode_step(
    weights: Weights, layers: Sequence[Layer], tokens: Tensor, lengths: Tensor, caches: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Adds a token to each sequence.

    Args:
        weights: The tensors of the model.
        layers: The blocks of the model.
        tokens: The token ids, int64 ``[B]``.
        lengths: The number of tokens of each sequence before this one, int64 ``[B]``; not changed.
        caches: The keys and values of each layer, bfloat16 ``[B, K, slots, E]``. The step writes those of the new
            token.

    Returns:
        The logits, float32 ``[B, vocab]``.
    """
    s = weights.shape
    rows = torch.arange(len(tokens), device=tokens.device)
    cos, sin = (table[lengths].unsqueeze(1) for table in (weights.cos, weights.sin))
    x = weights.embedding[tokens].to(BF16)
    for layer, (keys, values) in zip(layers, caches, strict=True):
        heads = ternary_linear(rms_norm(x, layer.attention_norm, s.eps).float(), layer.qkv)
        q, k, v = heads.view(len(tokens), -1, s.head_size).split((s.heads, s.kv_heads, s.kv_heads), 1)
        keys[rows, :, lengths], values[rows, :, lengths] = rotate(k, cos, sin), v
        a = attention(rotate(q, cos, sin), keys, values, lengths + 1)
        x = (x.float() + ternary_linear(a.float(), layer.o).float()).to(BF16)
        gate, up = ternary_linear(rms_norm(x, layer.mlp_norm, s.eps).float(), layer.gate_up).float().chunk(2, -1)
        hidden = gate / (1 + torch.exp(-gate)) * up
        x = (x.float() + ternary_linear(hidden, layer.down).float()).to(BF16)
    final = rms_norm(x, weights.norm, s.eps).float()
    if weights.head_scale is not None:
        return (final @ weights.head.float().t()) * weights.head_scale
    return final @ weights.head.to(BF16).float().t()
