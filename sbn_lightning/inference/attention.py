"""The attention of a :class:`~sbn_lightning.inference.decoder.Decoder`: what each call reads from the cache and writes.

A call of the model is one of four kinds, and each kind has a class here.

* :class:`PromptAttention`: prompts from their first token on, without a CUDA graph. torch's kernel needs no cache.
* :class:`ChunkAttention`: a part of a prompt behind tokens that are in the cache already.
* :class:`RowAttention`: prompts or parts of prompts whose rows and places are tensors, for CUDA graphs.
* :class:`StepAttention`: one token in each row.

On a Hopper GPU, :func:`sbn_kernels.prompt.attend` computes short prompts and parts of prompts in graphs.

The suffix of a tensor's name is its shape: B batch, H heads, K key/value heads, T tokens of this call, S slots of the
cache, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from sbn_lightning.models.attention import causal_attention, in_window

_FEW_TOKENS = 2048


class PromptAttention:
    """Causal attention that remembers the keys and values, ``[B, K, T, E]``."""

    keys: Tensor
    values: Tensor

    def __call__(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, window: int | None = None) -> Tensor:
        self.keys, self.values = k_BKTE, v_BKTE
        return causal_attention(q_BHTE, k_BKTE, v_BKTE, window)


class ChunkAttention:
    """Attention of the last T of some sequences' tokens to all their tokens, in the cache of one layer.

    Args:
        keys: The slots of these sequences up to the last of the T tokens, ``[B, K, S, E]``: a view of the cache. The
            call writes the last T of them.
        values: The same view of the values.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def __call__(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, window: int | None = None) -> Tensor:
        before = self.keys.shape[2] - q_BHTE.shape[2]
        self.keys[:, :, before:] = k_BKTE
        self.values[:, :, before:] = v_BKTE
        return attend_to_cache(q_BHTE, self.keys, self.values, window)


def attend_to_cache(q_BHTE: Tensor, keys: Tensor, values: Tensor, window: int | None = None) -> Tensor:
    """Attention of the last T tokens of sequences to all their tokens.

    Args:
        q_BHTE: The queries of the last T tokens.
        keys: The keys of all tokens, ``[B, K, S, E]``.
        values: The values of all tokens.
        window: How many tokens each token attends to, itself included. None means all tokens before it.
    """
    new, all_tokens = q_BHTE.shape[2], keys.shape[2]
    if window is None or all_tokens <= window:
        # This form of the mask lets torch take the flash kernel, which needs no memory for T * S scores.
        mask: Tensor = causal_lower_right(new, all_tokens)
    else:
        seen = min(all_tokens, new + window - 1)  # No token of this call sees the slots before these.
        keys, values = keys[:, :, all_tokens - seen :], values[:, :, all_tokens - seen :]
        places = torch.arange(seen, device=keys.device)
        mask = in_window(places[seen - new :].unsqueeze(1), places, window)
    grouped = q_BHTE.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(q_BHTE, keys, values, attn_mask=mask, enable_gqa=grouped)


class Slots:
    """The slots that the present step writes to; all layers share them.

    Attributes:
        rows: The indices of the rows, 0 to B - 1, int64 ``[B]``.
        now: The slot of each row's token, int64 ``[B]``.
        bias: What is added to the scores, for each window that a layer of the model has (None: no window): 0 for the
            slots that the token sees and -inf for the others, ``[B, 1, 1, S]`` in the dtype of the cache.
    """

    rows: Tensor
    now: Tensor
    bias: dict[int | None, Tensor]


class StepAttention:
    """Attention of one token in each row to the cache of one layer, the token itself included.

    Args:
        keys: The keys of the layer, ``[B, K, S, E]``.
        values: The values of the layer, ``[B, K, S, E]``.
        slots: Where the step writes.
    """

    def __init__(self, keys: Tensor, values: Tensor, slots: Slots) -> None:
        self.keys, self.values, self.slots = keys, values, slots

    def __call__(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, window: int | None = None) -> Tensor:
        slots = self.slots
        self.keys[slots.rows, :, slots.now] = k_BKTE.squeeze(2)
        self.values[slots.rows, :, slots.now] = v_BKTE.squeeze(2)
        # Measured on an H200, torch 2.11, one sequence, 2,048 slots, 16 query heads, 2 key heads: 7 us. With the heads
        # of a group laid along the sequence: 44 us. As two products and a fused softmax: 10 us.
        grouped = q_BHTE.shape[1] != self.keys.shape[1]
        return F.scaled_dot_product_attention(
            q_BHTE, self.keys, self.values, attn_mask=slots.bias[window], enable_gqa=grouped
        )


class RowAttention:
    """Causal attention of prompts, or parts of prompts, that writes keys and values into rows of a layer's cache.

    The rows and the numbers of tokens before are tensors, so one CUDA graph of the call serves every row and number.

    Args:
        keys: The keys of the layer, ``[B, K, S, E]``.
        values: The values of the layer, ``[B, K, S, E]``.
        rows: The row of each prompt, int64 ``[prompts]`` on the device of the cache.
        before: The number of tokens that each row holds already, int64 ``[prompts]`` on the device of the cache.
        behind: Whether these numbers may be above 0. If so, :func:`has_kernel` has to be true for the keys, and the
            layer has no window.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, before: Tensor, behind: bool) -> None:
        self.keys, self.values, self.rows, self.before, self.behind = keys, values, rows, before, behind
        self._has_kernel = has_kernel(keys)

    def __call__(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, window: int | None = None) -> Tensor:
        length = k_BKTE.shape[2]
        places = self.before[:, None] + torch.arange(length, device=self.before.device)
        self.keys[self.rows[:, None], :, places] = k_BKTE.transpose(1, 2)
        self.values[self.rows[:, None], :, places] = v_BKTE.transpose(1, 2)
        if self._has_kernel and window is None and is_faster(len(k_BKTE) * length, self.behind):
            from sbn_kernels.prompt import attend

            return attend(q_BHTE, self.keys, self.values, self.rows, self.before).transpose(1, 2)
        assert not self.behind
        return causal_attention(q_BHTE, k_BKTE, v_BKTE, window)


def has_kernel(keys: Tensor) -> bool:
    """Whether :func:`sbn_kernels.prompt.attend` computes attention to keys of this dtype, head size and device."""
    if not keys.is_cuda or keys.dtype not in (torch.bfloat16, torch.float16):
        return False
    from sbn_kernels.prompt import attention

    return keys.shape[-1] in attention.HEAD_SIZES and attention.NEEDS.missing(keys.device.index) is None


def is_faster(tokens: int, behind: bool) -> bool:
    """Whether :func:`sbn_kernels.prompt.attend` is faster than torch's kernels, as measured on an H200.

    Args:
        tokens: The number of tokens of all prompts together.
        behind: Whether the prompts stand behind tokens that the cache holds already.
    """
    return behind or tokens <= _FEW_TOKENS


def room_like(keys_BKTE: Tensor, batch_size: int, slots: int) -> Tensor:
    """Allocate a cache for keys or values of the dtype, heads and head size of ``keys_BKTE``.

    Returns:
        Zeros ``[batch_size, K, slots, E]``. An infinity left in memory would pass the mask as 0 * inf.
    """
    return torch.zeros(
        batch_size,
        keys_BKTE.shape[1],
        slots,
        keys_BKTE.shape[3],
        dtype=keys_BKTE.dtype,
        device=keys_BKTE.device,
    )
