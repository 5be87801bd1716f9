"""The backward of what happens between the q, k, v layer and attention: rotation by position, and the split into heads.

A compiler writes the gradient of the fused layer as a concatenation, whose every element reads all three parts under
conditions. Here a program turns some tokens of all heads, with the tables in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.common.buffers import with_rows
from sbn_kernels.common.checks import FLOAT_DTYPES, refuse_gradients
from sbn_kernels.common.integers import ceil_div, next_power_of_2
from sbn_kernels.runtime.capability import Needs, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

NEEDS = Needs("rope", least=(0, 0), interpreter=True)
_TOKENS = 8  # tokens of a program


@triton.jit
def _turned_back(d, head, stride, y, place, wide, inside, half, tables, TURN: tl.constexpr):
    """Writes one head of some tokens to its place ``y``."""
    d += (tl.full([], 0, tl.int64) + head) * stride
    low = tl.load(d + wide, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(d + wide + half, mask=inside, other=0.0).to(tl.float32)
    if TURN:
        cos_low, cos_high, sin_low, sin_high = tables
        low, high = low * cos_low + high * sin_high, high * cos_high + low * sin_low
    tl.store(y + place, low.to(y.dtype.element_ty), mask=inside)
    tl.store(y + place + half, high.to(y.dtype.element_ty), mask=inside)


# Not specialised: numbers that vary from call to call and that no vector of loads depends on.
@triton.jit(do_not_specialize=["tokens", "heads", "key_heads"])
def rope_backward_kernel(
    dq_pointer, dk_pointer, dv_pointer, cos_pointer, sin_pointer, y_pointer,
    tokens, heads, key_heads, size, cos_stride,
    dq_batch, dq_head, dq_token, dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token,
    HALF: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """R tokens of one sequence a program, head after head. HALF is half of the head's size, as a power of two."""
    spans = tl.cdiv(tokens, R)
    batch = (tl.program_id(0) // spans).to(tl.int64)
    row = tl.program_id(0) % spans * R + tl.arange(0, R)
    column = tl.arange(0, HALF)
    half = size // 2
    inside = (row < tokens)[:, None] & (column < half)[None, :]
    wide = row.to(tl.int64)[:, None]
    where = wide * cos_stride + column[None, :]
    cos_low = tl.load(cos_pointer + where, mask=inside, other=0.0)
    cos_high = tl.load(cos_pointer + where + half, mask=inside, other=0.0)
    sin_low = tl.load(sin_pointer + where, mask=inside, other=0.0)
    sin_high = tl.load(sin_pointer + where + half, mask=inside, other=0.0)
    tables = (cos_low, cos_high, sin_low, sin_high)
    width = (heads + 2 * key_heads) * size
    y = y_pointer + (batch * tokens + wide) * width + column[None, :]
    of_q, of_k, of_v = (
        wide * dq_token + column[None, :],
        wide * dk_token + column[None, :],
        wide * dv_token + column[None, :],
    )
    for head in range(heads):
        _turned_back(dq_pointer + batch * dq_batch, head, dq_head, y, head * size, of_q, inside, half, tables, True)
    for head in range(key_heads):
        place = (heads + head) * size
        _turned_back(dk_pointer + batch * dk_batch, head, dk_head, y, place, of_k, inside, half, tables, True)
        place = (heads + key_heads + head) * size
        _turned_back(dv_pointer + batch * dv_batch, head, dv_head, y, place, of_v, inside, half, tables, False)


_backward = Launcher(rope_backward_kernel, enable_fp_fusion=True)


def _empty(dq: Tensor, dk: Tensor) -> Tensor:
    batch, heads, tokens, size = dq.shape
    return torch.empty((batch, tokens, (heads + 2 * dk.shape[1]) * size), dtype=dq.dtype, device=dq.device)


@kernel_op("rope_backward")
def _rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    require(NEEDS, dq)
    dq, dk, dv, cos, sin = (with_rows(x) for x in (dq, dk, dv, cos, sin))
    sin = sin if sin.stride() == cos.stride() else sin.contiguous()
    cos = cos if sin.stride() == cos.stride() else cos.contiguous()
    y = _empty(dq, dk)
    batch, heads, tokens, size = dq.shape
    if y.numel():
        strides = [stride for d in (dq, dk, dv) for stride in d.stride()[:3]]
        numbers = (tokens, heads, dk.shape[1], size, cos.stride(0), *strides)
        grid = (batch * ceil_div(tokens, _TOKENS), 1, 1)
        _backward(grid, (dq, dk, dv, cos, sin, y), numbers, (next_power_of_2(size // 2), _TOKENS))
    return y


@kernel_fake("rope_backward")
def _(dq: Tensor, dk: Tensor) -> Tensor:
    return _empty(dq, dk)


def rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Computes the gradient of queries, keys and values side by side from those of the rotated heads.

    Args:
        dq: The gradient of the rotated queries, ``[batch, heads, tokens, size]``.
        dk: The gradient of the rotated keys, ``[batch, key heads, tokens, size]``.
        dv: The gradient of the values, in the shape of ``dk``.
        cos: float32 ``[tokens, size]``.
        sin: float32 ``[tokens, size]``, negated in the first half.

    Returns:
        ``[batch, tokens, (heads + 2 key heads) size]`` in the dtype of ``dq``.

    Raises:
        ValueError: If shapes or dtypes do not fit.
        UnsupportedError: If there is no GPU.
    """
    refuse_gradients(dq, dk, dv, cos, sin)
    if dq.dim() != 4 or dq.dtype not in FLOAT_DTYPES or dq.shape[3] % 2 or dk.shape != dv.shape:
        raise ValueError(f"gradients must be [batch, heads, tokens, even size], not {list(dq.shape)}")
    if dk.shape[0] != dq.shape[0] or dk.shape[2:] != dq.shape[2:]:
        raise ValueError(f"gradients of keys {list(dk.shape)} do not fit those of queries {list(dq.shape)}")
    if cos.shape != dq.shape[2:] or sin.shape != cos.shape or not cos.dtype == sin.dtype == torch.float32:
        raise ValueError(f"cos and sin must be float32 {list(dq.shape[2:])}, not {cos.dtype} {list(cos.shape)}")
    y: Tensor = torch.ops.sbn_kernels.rope_backward(dq, dk, dv, cos, sin)
    return y
