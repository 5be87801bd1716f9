"""The kernels of this folder in plain PyTorch: what they are tested against. Needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_and_store_reference(
    qkv: Tensor,
    bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    heads: int,
    before: Tensor,
) -> Tensor:
    """What :func:`~sbn_kernels.prompt.triton.rotate_and_store` computes."""
    length, kv_heads, size = qkv.shape[1], keys.shape[1], keys.shape[3]
    parts = (qkv if bias is None else qkv + bias.to(qkv.dtype)).unflatten(-1, (-1, size))
    turned = parts[:, :, : heads + kv_heads]
    places = before[:, None] + torch.arange(length, device=qkv.device)
    cos, sin = cos[places].unsqueeze(2), sin[places].unsqueeze(2)
    turned = (turned * cos + turned.roll(size // 2, dims=-1) * sin).to(qkv.dtype)
    parts = torch.cat((turned, parts[:, :, heads + kv_heads :]), 2)
    keys[rows[:, None], :, places] = parts[:, :, heads : heads + kv_heads]
    values[rows[:, None], :, places] = parts[:, :, heads + kv_heads :]
    return parts.flatten(2)


def attend_reference(q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, before: Tensor) -> Tensor:
    """What :func:`~sbn_kernels.prompt.attention.attend` computes, in float32."""
    heads, length, size = q.shape[1:]
    repeats = heads // keys.shape[1]
    k, v = (cache[rows].float().repeat_interleave(repeats, 1) for cache in (keys, values))
    places = before[:, None] + torch.arange(length, device=q.device)
    seen = torch.arange(keys.shape[2], device=q.device) <= places[:, None, :, None]
    scores = (q.float() @ k.transpose(2, 3) / size**0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).to(q.dtype)
