"""Products of 1 to 64 tokens with packed ternary weights: bound by reading the weights, 2 bits each.

The weights are the packed words that the Hopper GEMMs read, so a model keeps one copy for prefill and decode. With
Triton >= 3.9 a Gluon kernel (``gluon.py``) feeds the words to ``mma.sync`` from registers, in both layouts, on sm_80
and later. A plain Triton kernel unpacks layout ``dense`` with shifts and uses ``tl.dot``; it serves older versions of
Triton and the interpreter. :func:`decode_gemm` asks the registry which kernel takes a number of tokens: on Hopper,
more than a few tokens go to the prefill kernel.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

import sbn_kernels.gemm.sm90.gemm  # noqa: F401 (registers the kernels that read the same words for more tokens)
from sbn_kernels.common.buffers import aligned_tokens, contiguous, with_rows
from sbn_kernels.common.checks import check_gemm_arguments, check_packed
from sbn_kernels.common.integers import ceil_div, next_power_of_2
from sbn_kernels.common.packing import pack_dense, pack_nonzeros24
from sbn_kernels.gemm.registry import Product, register, serving
from sbn_kernels.gemm.sm90.split_k import choose_splits
from sbn_kernels.runtime.capability import Needs, UnsupportedError, place, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

MAX_TOKENS = 64
GLUON_NEEDS = Needs("decode", gluon=True)
PORTABLE_NEEDS = Needs("decode", interpreter=True)
_WARPS = 4096
_READS = 72_000  # the decode kernel is the faster one up to so many rows times tokens, a wave of the prefill kernel


@triton.jit
def decode_portable_kernel(
    x_pointer, packed_pointer, y_pointer, scale_pointer, row_scale_pointer, bias_pointer,
    tokens, features, inner, k_steps, x_stride,
    BIAS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """y [tokens, features] for at most BT tokens, 64 rows a program, layout ``dense``."""
    half = tl.program_id(0)
    base = packed_pointer + (half // 2).to(tl.int64) * k_steps * 1024 + (half % 2) * 512
    local = tl.arange(0, 64)[:, None]
    four = tl.arange(0, 32)[None, :]  # columns 4 four .. 4 four + 3 of the k step share a word
    thread = 32 * (local // 16) + 4 * (local % 8) + four % 4
    where = thread * 4 + four // 8
    shift = 16 * (local // 8 % 2) + 2 * (four // 4 % 2)
    token = tl.arange(0, BT)
    column = tl.arange(0, 128)
    acc = tl.zeros([64, BT], tl.int32)
    for step in range(k_steps):
        words = tl.load(base + step * 1024 + where) >> shift
        codes = (words[:, :, None] >> (4 * tl.arange(0, 4)[None, None, :])) & 3
        codes = tl.reshape(tl.where(codes == 2, -1, codes).to(tl.int8), [64, 128])
        k = step * 128 + column
        inside = (token < tokens)[None, :] & (k < inner)[:, None]
        x = tl.load(x_pointer + token.to(tl.int64)[None, :] * x_stride + k[:, None], mask=inside, other=0)
        acc = tl.dot(codes, x, acc, out_dtype=tl.int32)
    row = half * 64 + tl.arange(0, 64)
    scale = tl.load(scale_pointer + token, mask=token < tokens, other=0.0)
    gamma = tl.load(row_scale_pointer + row, mask=row < features, other=0.0)
    y = acc.to(tl.float32) * (scale[None, :] * gamma[:, None])
    if BIAS:
        y += tl.load(bias_pointer + row, mask=row < features, other=0.0).to(tl.float32)[:, None]
    target = y_pointer + token.to(tl.int64)[None, :] * features + row[:, None]
    tl.store(target, y.to(y_pointer.dtype.element_ty), mask=(row < features)[:, None] & (token < tokens)[None, :])


_portable = Launcher(decode_portable_kernel, enable_fp_fusion=True)


@functools.cache
def _kernel() -> Launcher:
    """The launcher of the Gluon kernel; importing the kernel needs Triton >= 3.9."""
    from sbn_kernels.decode.gluon import decode_kernel

    return Launcher(decode_kernel, enable_fp_fusion=False)


def launch_shape(k_steps: int, row_tiles: int, token_groups: int) -> tuple[int, int]:
    """(Warps that split K, steps in flight of a warp): at most ``_WARPS`` warps in all, one wave on a large GPU."""
    groups = 16
    while groups > 4 and (groups * row_tiles > _WARPS or groups > k_steps):
        groups //= 2
    return groups, 2 if token_groups > 2 or k_steps <= 2 * groups else 4


def prefers_decode(tokens: int, out_features: int, in_features: int, processors: int) -> bool:
    """Whether the decode kernel is faster than the prefill kernel on Hopper, as measured for 2:4 on an H200.

    The choice is right within a tenth of the time. The time of the decode kernel grows with rows times tokens, because
    each 16 rows read all tokens anew. The time of the prefill kernel grows with the number of waves that panels of 128
    rows take on so many ``processors``. Both grow with in_features. Where the prefill kernel splits K (``split_k.py``),
    it takes over from 8 tokens on: for five shapes it took 0.75 to 1.07 of the decode kernel's time at 8 tokens, and
    less above. Fewer tokens were not compared.
    """
    if tokens >= 8 and choose_splits(tokens, out_features, in_features, processors) > 1:
        return False
    waves = ceil_div(ceil_div(out_features, 128), processors)
    return tokens <= 4 or (tokens <= 16 and tokens * out_features <= _READS * waves)


@kernel_op("decode_gemm")
def _decode_gemm(
    x8: Tensor,
    scale: Tensor,
    packed: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    sparse: bool,
    out_dtype: torch.dtype,
    portable: bool,
) -> Tensor:
    require(PORTABLE_NEEDS if portable else GLUON_NEEDS, x8)
    tokens, columns = x8.shape
    y = torch.empty((tokens, out_features), dtype=out_dtype, device=x8.device)
    if tokens == 0:
        return y
    k_steps = packed.shape[1]
    scale, row_scale, some_bias = contiguous(scale, row_scale, scale if bias is None else bias)
    if portable:
        x8 = with_rows(x8)
        _portable(
            (ceil_div(out_features, 64), 1, 1),
            (x8, packed, y, scale, row_scale, some_bias),
            (tokens, out_features, columns, k_steps, x8.stride(0)),
            (bias is not None, max(16, next_power_of_2(tokens))),
        )
        return y
    x8 = aligned_tokens(x8)
    words = torch.as_strided(x8, (tokens, x8.stride(0)), (x8.stride(0), 1)).view(torch.int32)
    row_tiles = ceil_div(out_features, 16)
    token_groups = next_power_of_2(ceil_div(tokens, 8))
    groups, prefetch = launch_shape(k_steps, row_tiles, token_groups)
    _kernel()(
        (row_tiles, 1, 1),
        (words, packed, y, scale, row_scale, some_bias),
        (tokens, out_features, k_steps, x8.stride(0) // 4),
        (token_groups, groups, prefetch, sparse, bias is not None),
        groups,
    )
    return y


@kernel_fake("decode_gemm")
def _(x8: Tensor, out_features: int, out_dtype: torch.dtype) -> Tensor:
    return torch.empty((x8.shape[0], out_features), dtype=out_dtype, device=x8.device)


def decode_gemm(
    x8: Tensor,
    scale: Tensor,
    packed: Tensor,
    row_scale: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    layout: str = "dense",
    portable: bool | None = None,
) -> Tensor:
    """Computes ``y = (x8 @ T^T) * scale * row_scale (+ bias)`` for few tokens.

    Args:
        x8: int8 ``[tokens, in_features]``, at most 64 tokens.
        scale: float32 ``[tokens]``.
        packed: int32 words, see :mod:`sbn_kernels.common.packing`.
        row_scale: float32 ``[out_features]``.
        out_features: The number of rows of the weight.
        bias: ``[out_features]``, any float dtype, or None.
        out_dtype: bfloat16, float16 or float32.
        layout: The layout of ``packed``: ``"dense"`` or ``"sparse24"``.
        portable: True: the plain Triton kernel, for layout ``dense`` only. False: the Gluon kernel. None: the kernel
            that the registry puts first for this number of tokens.

    Returns:
        ``[tokens, out_features]``.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If the layout needs a newer Triton, or there is no GPU.
    """
    check_gemm_arguments(x8, scale, row_scale, bias, out_features, out_dtype)
    check_packed(packed, out_features, x8.shape[1])
    if x8.shape[0] > MAX_TOKENS:
        raise ValueError(f"decode_gemm takes at most {MAX_TOKENS} tokens, not {x8.shape[0]}")
    if layout not in ("dense", "sparse24"):
        raise ValueError(f"layout {layout!r} is not one of dense, sparse24")
    if portable is not None:
        if portable and layout == "sparse24":
            raise UnsupportedError("decode of layout sparse24: the portable kernel reads layout dense only")
        return _decode(x8, scale, packed, row_scale, out_features, bias, out_dtype, layout == "sparse24", portable)
    kernel = serving(layout, x8.shape[0], out_features, x8.shape[1], place(x8))
    if kernel is None:
        raise UnsupportedError(f"decode of layout {layout}: {GLUON_NEEDS.missing(place(x8))}")
    return kernel.multiply(x8, scale, packed, row_scale, out_features, bias, out_dtype)


def _decode(
    x8: Tensor,
    scale: Tensor,
    packed: Tensor,
    row_scale: Tensor,
    out_features: int,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    sparse: bool,
    portable: bool,
) -> Tensor:
    args = (x8, scale, packed, row_scale, bias, out_features, sparse, out_dtype, portable)
    result: Tensor = torch.ops.sbn_kernels.decode_gemm(*args)
    return result


def _dense(
    x8: Tensor,
    scale: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    return _decode(x8, scale, weight, row_scale, out_features, bias, out_dtype, False, False)


def _sparse24(
    x8: Tensor,
    scale: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    return _decode(x8, scale, weight, row_scale, out_features, bias, out_dtype, True, False)


def _dense_portable(
    x8: Tensor,
    scale: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    return _decode(x8, scale, weight, row_scale, out_features, bias, out_dtype, False, True)


register(
    Product(
        name="decode",
        backend="int8",
        needs=GLUON_NEEDS,
        form="dense",
        multiply=_dense,
        pack=pack_dense,
        most_tokens=MAX_TOKENS,
        prefers=prefers_decode,
        rank=5,
    )
)
register(
    Product(
        name="decode-sparse",
        backend="sparse",
        needs=GLUON_NEEDS,
        form="sparse24",
        multiply=_sparse24,
        pack=pack_nonzeros24,
        pattern=(2, 4),
        most_tokens=MAX_TOKENS,
        prefers=prefers_decode,
        rank=5,
    )
)
register(
    Product(
        name="decode-portable",
        backend="int8",
        needs=PORTABLE_NEEDS,
        form="dense",
        multiply=_dense_portable,
        pack=pack_dense,
        most_tokens=MAX_TOKENS,
        prefers=prefers_decode,
    )
)
