"""Grouped-query attention, and the options that model families add to it.

The options are biases, heads of a size of their own, norms of queries and keys, a norm before the output projection,
layers without positions, and sliding windows. :class:`~sbn_lightning.models.config.TransformerConfig` describes them.

The suffix of a tensor's name is its shape: B batch, T tokens, D d_model, H heads, K key/value heads, E head size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.linear import make_linear
from sbn_lightning.models.norm import RMSNorm
from sbn_lightning.models.rope import apply_rope


class Attend(Protocol):
    """A function that computes attention, for example with a cache of keys and values."""

    def __call__(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, window: int | None = None) -> Tensor:
        """Compute attention for the tokens of this call.

        Args:
            q_BHTE: The queries, rotated by position.
            k_BKTE: The keys, rotated by position.
            v_BKTE: The values.
            window: How many tokens each token attends to, itself included. None means all tokens before it.

        Returns:
            The outputs of all heads, ``[B, H, T, E]``.
        """


def causal_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, window: int | None = None) -> Tensor:
    """Attention in which each token attends to itself and to the tokens before it, or to the last ``window`` of them.

    A text that is not longer than the window takes PyTorch's causal kernel, which needs no mask.
    """
    grouped = q_BHTE.shape[1] != k_BKTE.shape[1]
    length = q_BHTE.shape[2]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(q_BHTE, k_BKTE, v_BKTE, is_causal=True, enable_gqa=grouped)
    places = torch.arange(length, device=q_BHTE.device)
    mask = in_window(places.unsqueeze(1), places, window)
    return F.scaled_dot_product_attention(q_BHTE, k_BKTE, v_BKTE, attn_mask=mask, enable_gqa=grouped)


def in_window(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Whether a token attends to another one, by their places in the sequence.

    Args:
        query: The places of the tokens that attend.
        key: The places of the tokens that are attended to; broadcasts against ``query``.
        window: How many tokens each token attends to, itself included. None means all tokens before it.

    Returns:
        bool, True where ``query - window < key <= query``.
    """
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


class Attention(nn.Module):
    """Grouped-query attention; causal, unless the caller passes another :class:`Attend`.

    Args:
        config: The configuration of the model.
        index: The number of the block. Some families have sliding windows or positions in certain blocks only.
    """

    def __init__(self, config: TransformerConfig, index: int = 0) -> None:
        super().__init__()
        self.head_size = config.head_size
        width, kv = config.n_heads * config.head_size, config.n_kv_heads * config.head_size
        self.splits = (width, kv, kv)
        self.window = config.window(index)
        self.has_positions = index not in config.layers_without_rope
        self.qkv = make_linear(config, config.d_model, self.splits, bias=config.qkv_bias)
        self.o = make_linear(config, width, (config.d_model,), bias=config.o_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm is not None:
            sizes = (config.head_size, config.head_size) if config.qk_norm == "head" else (width, kv)
            self.q_norm, self.k_norm = (RMSNorm(size, config.norm_eps) for size in sizes)
        self.sub_norm = RMSNorm(width, config.norm_eps) if config.sub_norms else None

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Attend = causal_attention,
        quantized: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Compute the layer; ``quantized`` are the codes of the tokens and their scales, if they exist already."""
        qkv = self.qkv(x_BTD) if quantized is None else self.qkv(x_BTD, quantized=quantized)
        q, k, v = self._heads(qkv, cos, sin)
        y_BHTE = attend(q, k, v) if self.window is None else attend(q, k, v, self.window)
        y_BTD = y_BHTE.transpose(1, 2).flatten(2)
        if self.sub_norm is not None:
            y_BTD = self.sub_norm(y_BTD)
        out: Tensor = self.o(y_BTD)
        return out

    def _heads(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """The queries, keys and values of all heads, queries and keys rotated by position, ``[B, heads, T, E]``."""
        if type(self.qkv) is SparseBitLinear and self.qk_norm is None and self.has_positions:
            backend = self.qkv.backend
            if backend.turns_heads(qkv, cos):
                return backend.turned_heads(qkv, cos, sin, self.splits, self.head_size)
        q, k, v = qkv.split(self.splits, -1)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.has_positions:
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return q, k, v
