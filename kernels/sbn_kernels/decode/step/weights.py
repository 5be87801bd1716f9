"""A model's tensors as the decode step takes them: plain tensors, no modules.

A caller gathers :class:`Weights` from a model. :func:`pack` writes them in the form that the kernel reads. The packed
form depends only on the shape of the model, so steps of several batch sizes can share the packed weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sbn_kernels.decode.step.packing import gate_up_order, pack_tiles, qkv_order
from sbn_kernels.decode.step.plan import Shape


@dataclass
class Ternary:
    """One ternary matrix.

    Attributes:
        codes: The ternary codes, int8 ``[out, in]``.
        row_scale: The scale of each row, float32 ``[out]``.
        bias: The bias ``[out]``, or None.
    """

    codes: Tensor
    row_scale: Tensor
    bias: Tensor | None = None


@dataclass
class Layer:
    """One block of the model.

    Attributes:
        attention_norm: The weight of the norm before attention, ``[d_model]``.
        qkv: The matrix of attention's input: the rows of q, then of k, then of v.
        o: The matrix of attention's output.
        mlp_norm: The weight of the norm before the MLP, ``[d_model]``.
        gate_up: The matrix of the MLP's input: the rows of gate, then of up.
        down: The matrix of the MLP's output.
    """

    attention_norm: Tensor
    qkv: Ternary
    o: Ternary
    mlp_norm: Tensor
    gate_up: Ternary
    down: Ternary


@dataclass
class Weights:
    """The tensors of a model.

    Attributes:
        shape: The shape of the model.
        layers: The blocks. A generator is read once.
        norm: The weight of the last norm, ``[d_model]``.
        embedding: The embedding ``[vocab, d_model]``.
        head: The weight of the head ``[vocab, d_model]``, or its int8 codes. Where head and embedding are tied, the
            weight is the same tensor as ``embedding``.
        cos: The cosines of the rotation, float32 ``[positions, head_size]``.
        sin: The sines of the rotation, shaped as ``cos``. The sines of the first half of a head have the opposite
            sign.
        head_scale: The scale of each row of the head, float32 ``[vocab]``, if ``head`` has int8 codes.
    """

    shape: Shape
    layers: Iterable[Layer]
    norm: Tensor
    embedding: Tensor
    head: Tensor
    cos: Tensor
    sin: Tensor
    head_scale: Tensor | None = None


@dataclass
class PackedWeights:
    """The tensors of a model in the form that the kernel reads; :func:`pack` makes them.

    Attributes:
        shape: The shape of the model.
        words: The packed layers, int32 ``[layers, words of a layer]``.
        norms: The weights of all norms, bfloat16 ``[2 layers + 1, d_model]``.
        embedding: The embedding, bfloat16 ``[vocab, d_model]``.
        head: The weight of the head ``[vocab, d_model]``: bfloat16, or int8 codes.
        cos: The cosines of the rotation, float32 ``[positions, head_size]``.
        sin: The sines of the rotation, float32 ``[positions, head_size]``.
        head_scale: The scale of each row of a head of 8 bits, float32 ``[vocab]``; else None.
    """

    shape: Shape
    words: Tensor
    norms: Tensor
    embedding: Tensor
    head: Tensor
    cos: Tensor
    sin: Tensor
    head_scale: Tensor | None = None

    @property
    def head_bits(self) -> int:
        """Bits of a weight of the head."""
        return 16 if self.head_scale is None else 8


def _bf16(x: Tensor) -> Tensor:
    return x.detach().to(torch.bfloat16).contiguous()


def pack(weights: Weights) -> PackedWeights:
    """Packs a model on the device of its embedding.

    A tensor that is bfloat16 and contiguous already is not copied.

    Args:
        weights: The tensors of the model.

    Returns:
        The packed weights.

    Raises:
        ValueError: If a tensor does not have the shape that ``weights.shape`` says.
    """
    s = weights.shape
    device = weights.embedding.device
    order_qkv = qkv_order(s.heads + 2 * s.kv_heads, s.head_size, device)
    order_mlp = gate_up_order(s.d_ffn, device)
    attention = s.heads * s.head_size
    sizes = {
        "qkv": (attention + 2 * s.kv_heads * s.head_size, s.d_model),
        "o": (s.d_model, attention),
        "gate_up": (2 * s.d_ffn, s.d_model),
        "down": (s.d_model, s.d_ffn),
    }
    words, norms = [], []
    for i, layer in enumerate(weights.layers):
        tiles = []
        for name, size in sizes.items():
            matrix: Ternary = getattr(layer, name)
            if tuple(matrix.codes.shape) != size:
                raise ValueError(
                    f"layer {i}: {name} has codes {list(matrix.codes.shape)}, the shape needs {list(size)}"
                )
            bias = None if matrix.bias is None else _bf16(matrix.bias)
            order = {"qkv": order_qkv, "gate_up": order_mlp}.get(name)
            tiles.append(pack_tiles(matrix.codes, matrix.row_scale, bias, order).flatten())
        words.append(torch.cat(tiles))
        norms += [_bf16(layer.attention_norm), _bf16(layer.mlp_norm)]
    if len(words) != s.layers:
        raise ValueError(f"there are {len(words)} layers, the shape needs {s.layers}")
    head, head_scale = weights.head, weights.head_scale
    for name, table in (("embedding", weights.embedding), ("head", head)):
        if table.shape != (s.vocab, s.d_model):
            raise ValueError(f"{name} is {list(table.shape)}, the shape needs {[s.vocab, s.d_model]}")
    if head_scale is None:
        head = _bf16(head)
    else:
        if head.dtype != torch.int8 or head_scale.shape != (s.vocab,):
            found = f"{head.dtype} and {list(head_scale.shape)} scales"
            raise ValueError(f"a head with scales needs int8 codes and {s.vocab} scales, not {found}")
        head, head_scale = head.contiguous(), head_scale.float().contiguous()
    return PackedWeights(
        s, torch.stack(words), torch.stack([*norms, _bf16(weights.norm)]), _bf16(weights.embedding),
        head, weights.cos.float().contiguous(), weights.sin.float().contiguous(), head_scale,
    )  # fmt: skip
