"""The kernel of this folder in plain PyTorch: what it is tested against. Needs no Triton."""

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
    start: int = 0,
) -> Tensor:
    """What :func:`~sbn_kernels.prompt.triton.rotate_and_store` computes."""
    batch, length, _ = qkv.shape
    kv_heads, size = keys.shape[1], keys.shape[3]
    parts = (qkv if bias is None else qkv + bias.to(qkv.dtype)).unflatten(-1, (-1, size))
    turned = parts[:, :, : heads + kv_heads]
    end = start + length
    cos, sin = cos[start:end, None], sin[start:end, None]
    turned = (turned * cos + turned.roll(size // 2, dims=-1) * sin).to(qkv.dtype)
    parts = torch.cat((turned, parts[:, :, heads + kv_heads :]), 2)
    for i in range(batch):
        keys[rows[i], :, start:end] = parts[i, :, heads : heads + kv_heads].transpose(0, 1)
        values[rows[i], :, start:end] = parts[i, :, heads + kv_heads :].transpose(0, 1)
    return parts.flatten(2)
