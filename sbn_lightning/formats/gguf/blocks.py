"""Ternary weights as blocks of llama.cpp: the types of blocks, the widths that each type fits, and the bytes.

A block is a scale ``d`` in float16 and the codes of some weights of one row. Every type here can hold ``gamma * T``
exactly, with gamma rounded to float16. The types differ in the length of a block and in the bits for each code. Blocks
are put together from the codes. The usual quantisers start from floats and compute another scale: for example, the
quantiser of Q4_0 maps the largest magnitude to -8.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class BlockType(NamedTuple):
    """A type of ternary tensors in GGUF.

    Attributes:
        id: The number of the type in ggml (``ggml_type``).
        file_type: The number of a file that is mostly of this type (``llama_ftype``).
        weights: The number of weights of a row that share a scale.
        bytes: The size of a block in bytes.
    """

    id: int
    file_type: int
    weights: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits for each weight, the scale included."""
        return 8 * self.bytes / self.weights


TYPES = {
    "TQ1_0": BlockType(34, 36, 256, 54),
    "TQ2_0": BlockType(35, 37, 256, 66),
    "Q2_0": BlockType(42, 41, 64, 18),
    "Q4_0": BlockType(2, 2, 32, 18),
}
BLOCKS = {name: kind.weights for name, kind in TYPES.items()}
# For rows that the chosen type does not divide: every version of llama.cpp reads Q4_0, and its blocks are the shortest.
FALLBACK = "Q4_0"


def type_for(width: int, wanted: str) -> str | None:
    """The type for rows of a width: the wanted type, or :data:`FALLBACK` where its blocks do not fit, or None."""
    return next((name for name in (wanted, FALLBACK) if width % TYPES[name].weights == 0), None)


def blocks(codes: Tensor, gamma: Tensor, name: str) -> np.ndarray:
    """The bytes of a tensor.

    Args:
        codes: int8 ``[out, in]`` in {-1, 0, 1}; ``in`` is a multiple of the type's ``weights``.
        gamma: The scale of all weights, one number.
        name: The name of the type, a key of :data:`TYPES`.

    Returns:
        uint8 ``[out, in / weights * bytes]``.
    """
    if name == "Q4_0":
        return q4_0_blocks(codes, gamma).numpy()
    if name == "Q2_0":
        return q2_0_blocks(codes, gamma).numpy()
    import gguf

    # The quantisers of these two take a block's largest magnitude for its scale, which is gamma.
    kind = gguf.GGMLQuantizationType[name]
    data: np.ndarray = gguf.quants.quantize((codes * gamma).float().numpy(), kind)
    return data


def q4_0_blocks(codes: Tensor, gamma: Tensor) -> Tensor:
    """int8 ``[out, in]`` in {-1, 0, 1} and a scale -> uint8 ``[out, in / 32 * 18]``.

    A block is the scale in float16 and 16 bytes. Byte ``j`` holds weights ``j`` and ``j + 16``, low 4 bits first, as
    code + 8 (ggml's ``block_q4_0``).
    """
    low, high = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2, 16)).unbind(-2)
    return torch.cat((_scales(gamma, low), low | high << 4), -1).flatten(-2)


def q2_0_blocks(codes: Tensor, gamma: Tensor) -> Tensor:
    """int8 ``[out, in]`` in {-1, 0, 1} and a scale -> uint8 ``[out, in / 64 * 18]``.

    A block is the scale in float16 and 16 bytes. Byte ``j`` holds weights ``4 j`` to ``4 j + 3``, low 2 bits first, as
    code + 1 (ggml's ``block_q2_0``).
    """
    quarters = (codes + 1).to(torch.uint8).unflatten(-1, (-1, 16, 4)).unbind(-1)
    packed = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
    return torch.cat((_scales(gamma, packed), packed), -1).flatten(-2)


def _scales(gamma: Tensor, packed: Tensor) -> Tensor:
    """The scale in float16 as two bytes for each block of ``packed [out, blocks, bytes]``."""
    return gamma.half().reshape(1).view(torch.uint8).expand(*packed.shape[:-1], 2)
