"""Attention that does not look from one document into another one of the same row.

``prepare`` lays documents end to end, so a row of a batch may hold several of them, with a token that ends a text after
each. Without a mask the tokens of a document attend to the documents before it. With one, each token attends to its own
document alone. Positions need no change: the rotations of queries and keys matter only by their distance.

The kernels for plain causal attention take no mask, so masked attention is slower. It also needs memory: in training,
each block keeps a mask for its backward, with one number in the dtype of the queries for each pair of tokens in a row.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sbn_lightning.models.attention import Attend, in_window


def document_numbers(tokens_BT: Tensor, eos_id: int) -> Tensor:
    """Return the number of each token's document in its row, int64 ``[B, T]``; a row begins with 0.

    Args:
        tokens_BT: The token ids.
        eos_id: The token that ends a document, and belongs to it.
    """
    ends = (tokens_BT == eos_id).long()
    return ends.cumsum(-1) - ends


def attend_within(tokens_BT: Tensor, eos_id: int) -> Attend:
    """Return causal attention within documents.

    Args:
        tokens_BT: The token ids of the rows.
        eos_id: The token that ends a document.
    """
    numbers = document_numbers(tokens_BT, eos_id)
    # A partial of a function of the module, because a compiled block would be compiled again for each new closure.
    return partial(masked_attention, same_document=numbers.unsqueeze(1) == numbers.unsqueeze(2))


def masked_attention(
    q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, window: int | None = None, *, same_document: Tensor
) -> Tensor:
    """Causal attention in which each token attends to tokens of its own document.

    Args:
        q_BHTE: The queries, rotated by position.
        k_BKTE: The keys, rotated by position.
        v_BKTE: The values.
        window: How many tokens each token attends to, itself included. None means all of the document before it.
        same_document: Whether two tokens belong to one document, bool ``[B, T, T]``.

    Returns:
        The outputs of all heads, ``[B, H, T, E]``.
    """
    places = torch.arange(q_BHTE.shape[2], device=q_BHTE.device)
    mask = same_document & in_window(places.unsqueeze(1), places, window)
    heads = q_BHTE.shape[1] // k_BKTE.shape[1]
    # PyTorch's memory-efficient kernel takes a mask, but no groups of queries.
    k, v = (part.repeat_interleave(heads, 1) if heads > 1 else part for part in (k_BKTE, v_BKTE))
    return F.scaled_dot_product_attention(q_BHTE, k, v, attn_mask=mask.unsqueeze(1))
