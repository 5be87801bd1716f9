"""The two packed forms of ternary weights in plain PyTorch: the definition that kernels are tested against.

Both hold 2 bits a weight in int32 words, in the order in which the threads of a tensor-core instruction need them. So a
kernel reads 16 bytes a thread, and no word twice. The shape is ``[panels, k_steps, 1024]``: a panel is 128 rows
(``out_features`` padded with rows of zeros), a k step is 128 columns (``in_features`` padded with columns of zeros),
and a block of 1024 words is two halves of 64 rows, each of 128 threads times 4 words. Thread ``lt`` of a half has
``w = lt // 32``, ``g = lt % 32 // 4``, ``t = lt % 4``. A code is 0, 1, 2 for 0, +1, -1.

``dense``: word ``j`` covers the columns from ``32 j`` on of the k step. Bits ``4 b + 16 r0 + 2 r1`` hold the code of
row ``16 w + g + 8 r0``, column ``32 j + 16 r1 + 4 t + b``: the A fragment of ``mma.m16n8k32`` and of ``wgmma`` k32.

``sparse24``: at most 2 weights are kept in each 4 columns. Words 0 and 2 hold the codes of the kept weights of the
columns from ``64 j`` on, as in ``dense`` with the 32 kept columns in place of 32 dense ones. Words 1 and 3 hold their
positions: row ``16 w + 8 (lt % 2) + g``, columns from ``64 j + 32 (lt // 2 % 2)`` on, 8 groups of 4 bits each, the
first kept position in the low 2 bits, the second in the high 2, first < second always. Positions come from the mask and
not from non-zeros, so a kept weight may be 0. A group that keeps fewer than 2 gets a filler position whose code is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sbn_kernels.common.integers import ceil_div

PANEL = 128
K_STEP = 128
BLOCK_WORDS = 1024
LAYOUTS = ("none", "dense", "sparse24")


def packed_shape(out_features: int, in_features: int) -> tuple[int, int, int]:
    """The shape of the packed int32 tensor, the same for both layouts."""
    return ceil_div(out_features, PANEL), ceil_div(in_features, K_STEP), BLOCK_WORDS


def _threads(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lt = torch.arange(128, device=device)
    return lt, lt // 32, lt % 32 // 4, lt % 4


def _halves(values: Tensor, width: int) -> Tensor:
    """[rows, columns] -> [row halves of 64, column blocks of ``width``, 64, width]."""
    rows, columns = values.shape
    return values.view(rows // 64, 64, columns // width, width).transpose(1, 2)


def _pad(values: Tensor) -> Tensor:
    rows, columns = values.shape
    return F.pad(values, (0, -columns % K_STEP, 0, -rows % PANEL))


def _to_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _fragment_words(codes: Tensor) -> Tensor:
    """int64 codes [halves, blocks, 64, 32] -> words [halves, blocks, 128 threads]."""
    _, w, g, t = _threads(codes.device)
    words = torch.zeros(*codes.shape[:2], 128, dtype=torch.int64, device=codes.device)
    for r0 in range(2):
        for r1 in range(2):
            for b in range(4):
                words |= codes[:, :, 16 * w + g + 8 * r0, 16 * r1 + 4 * t + b] << (4 * b + 16 * r0 + 2 * r1)
    return words


def _arrange(words: Tensor, out_features: int, in_features: int) -> Tensor:
    """[halves, k_steps, 128 threads, 4] -> packed [panels, k_steps, 1024]."""
    panels, k_steps, _ = packed_shape(out_features, in_features)
    grouped = words.reshape(panels, 2, k_steps, 512).transpose(1, 2)
    return _to_int32(grouped.reshape(panels, k_steps, BLOCK_WORDS))


def pack_dense(codes: Tensor) -> Tensor:
    """int8 {-1, 0, 1} ``[out, in]`` -> int32 words, layout ``dense``."""
    two_bit = torch.where(_pad(codes) < 0, 2, _pad(codes)).to(torch.int64)
    words = _fragment_words(_halves(two_bit, 32))
    words = words.reshape(words.shape[0], -1, 4, 128).transpose(2, 3)
    return _arrange(words, *codes.shape)


def positions24(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second kept position of each group of 4: int64 ``[..., in / 4]``, first < second.

    Raises:
        ValueError: If a group keeps more than 2.
    """
    kept = mask.unflatten(-1, (-1, 4))
    if bool((kept.sum(-1) > 2).any()):
        raise ValueError("layout sparse24 needs a mask that keeps at most 2 of every 4 weights")
    m0, m1, m2, m3 = kept.unbind(-1)
    zero, one = torch.zeros_like(m0, dtype=torch.int64), torch.ones_like(m0, dtype=torch.int64)
    second = torch.where(m3, 3 * one, torch.where(m2, 2 * one, one))
    first = torch.where(m0, zero, torch.where(m1, one, 2 * one))
    return torch.minimum(first, second - 1), second


def pack_sparse24(codes: Tensor, mask: Tensor) -> Tensor:
    """int8 codes and bool mask ``[out, in]`` (at most 2 kept in each 4) -> int32 words, layout ``sparse24``."""
    first, second = positions24(_pad(mask.to(torch.uint8)).bool())
    two_bit = torch.where(_pad(codes) < 0, 2, _pad(codes)).to(torch.int64).unflatten(-1, (-1, 4))
    pair = torch.stack([two_bit.gather(-1, p.unsqueeze(-1)).squeeze(-1) for p in (first, second)], -1)
    code_words = _fragment_words(_halves(pair.flatten(-2), 32))
    lt, w, g, _ = _threads(codes.device)
    nibbles = _halves(first | (second << 2), 16).unflatten(-1, (2, 8))
    metadata = (nibbles << (4 * torch.arange(8, device=codes.device))).sum(-1)
    metadata = metadata[:, :, 16 * w + 8 * (lt % 2) + g, lt // 2 % 2]
    words = torch.stack([code_words, metadata], -1)
    words = words.reshape(words.shape[0], -1, 2, 128, 2).transpose(2, 3)
    return _arrange(words.reshape(words.shape[0], words.shape[1], 128, 4), *codes.shape)


def pack_nonzeros24(codes: Tensor) -> Tensor:
    """int8 codes ``[out, in]`` with at most 2 non-zeros in each 4 -> int32 words, layout ``sparse24``."""
    return pack_sparse24(codes, codes != 0)


def _fragment_codes(words: Tensor) -> Tensor:
    """Inverse of ``_fragment_words``: [halves, blocks, 128] -> int8 {-1, 0, 1} [halves, blocks, 64, 32]."""
    _, w, g, t = _threads(words.device)
    codes = torch.zeros(*words.shape[:2], 64, 32, dtype=torch.int64, device=words.device)
    for r0 in range(2):
        for r1 in range(2):
            for b in range(4):
                codes[:, :, 16 * w + g + 8 * r0, 16 * r1 + 4 * t + b] = (words >> (4 * b + 16 * r0 + 2 * r1)) & 3
    return torch.where(codes == 2, -1, codes).to(torch.int8)


def unpack(packed: Tensor, out_features: int, in_features: int, layout: str) -> Tensor:
    """Packed words of either layout -> int8 codes ``[out, in]``."""
    panels, k_steps, _ = packed_shape(out_features, in_features)
    words = packed.to(torch.int64).bitwise_and(0xFFFFFFFF).view(panels, k_steps, 2, 128, 4).transpose(1, 2)
    words = words.reshape(panels * 2, k_steps, 128, 4)
    if layout == "dense":
        codes = _fragment_codes(words.transpose(2, 3).reshape(panels * 2, k_steps * 4, 128))
        return codes.transpose(1, 2).reshape(panels * 128, k_steps * 128)[:out_features, :in_features].contiguous()
    if layout != "sparse24":
        raise ValueError(f"layout {layout!r} is not one of dense, sparse24")
    words = words.view(panels * 2, k_steps, 128, 2, 2).transpose(2, 3).reshape(panels * 2, k_steps * 2, 128, 2)
    lt, w, g, _ = _threads(packed.device)
    pair = _fragment_codes(words[..., 0]).unflatten(-1, (16, 2))
    nibbles = torch.zeros(*pair.shape[:3], 2, 8, dtype=torch.int64, device=packed.device)
    nibbles[:, :, 16 * w + 8 * (lt % 2) + g, lt // 2 % 2] = (
        words[..., 1].unsqueeze(-1) >> (4 * torch.arange(8, device=packed.device))
    ) & 15
    nibbles = nibbles.flatten(-2)
    codes = torch.zeros(*pair.shape[:-1], 4, dtype=torch.int8, device=packed.device)
    codes.scatter_(-1, (nibbles & 3).unsqueeze(-1), pair[..., :1])
    codes.scatter_(-1, (nibbles >> 2).unsqueeze(-1), pair[..., 1:])
    codes = codes.flatten(-2).transpose(1, 2)
    return codes.reshape(panels * 128, k_steps * 128)[:out_features, :in_features].contiguous()
