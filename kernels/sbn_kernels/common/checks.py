"""Checks of arguments that several kernels share. Each names the argument that does not fit."""

from __future__ import annotations

import torch
from torch import Tensor

from sbn_kernels.common.packing import packed_shape

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OUT_DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def refuse_gradients(*tensors: Tensor | None) -> None:
    """Refuses tensors that want a gradient, because a kernel would lose the gradient without a word.

    Raises:
        ValueError: If gradients are on and one of the tensors requires one.
    """
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError("kernels have no gradient: detach their arguments, or call them in an autograd.Function")


def check_bits(bits: int) -> None:
    """Checks the number of bits of a quantised token.

    Raises:
        ValueError: If ``bits`` is not 8 or 4.
    """
    if bits not in (8, 4):
        raise ValueError(f"activations are quantised to 8 or 4 bits, not {bits}")


def check_scale(name: str, scale: Tensor, length: int) -> None:
    """Checks a vector of scales that the kernel reads element after element.

    Raises:
        ValueError: If ``scale`` is not contiguous float32 ``[length]``.
    """
    if scale.shape != (length,) or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32 [{length}], not {scale.dtype} {list(scale.shape)}")


def check_gemm_arguments(
    x8: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    out_dtype: torch.dtype,
    may_be_ones: bool = False,
) -> None:
    """Checks what every product of int8 tokens takes.

    Args:
        x8: int8 ``[tokens, in_features]``.
        scale: float32 ``[tokens]``.
        row_scale: float32 ``[out_features]``; None only with ``may_be_ones``.
        bias: ``[out_features]`` or None.
        out_features: The number of rows of the weight.
        out_dtype: The dtype of the result.
        may_be_ones: Whether ``row_scale`` may be None, which stands for ones.

    Raises:
        ValueError: If an argument does not fit.
    """
    if x8.dim() != 2 or x8.dtype != torch.int8 or x8.shape[1] == 0:
        raise ValueError(f"tokens must be int8 [tokens, in_features], not {x8.dtype} {list(x8.shape)}")
    if scale.shape != (x8.shape[0],) or scale.dtype != torch.float32:
        raise ValueError(f"token scale must be float32 [{x8.shape[0]}], not {scale.dtype} {list(scale.shape)}")
    if row_scale is None:
        if not may_be_ones:
            raise ValueError(f"row_scale must be float32 [{out_features}], not None")
    elif row_scale.shape != (out_features,) or row_scale.dtype != torch.float32:
        raise ValueError(f"row_scale must be float32 [{out_features}], not {row_scale.dtype} {list(row_scale.shape)}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must be [{out_features}], not {list(bias.shape)}")
    refuse_gradients(scale, row_scale, bias)
    if out_dtype not in _OUT_DTYPES:
        raise ValueError(f"out_dtype must be one of {_OUT_DTYPES}, not {out_dtype}")


def check_packed(packed: Tensor, out_features: int, in_features: int) -> None:
    """Checks packed words against the shape of their weight.

    Raises:
        ValueError: If ``packed`` is not contiguous int32 of that shape.
    """
    shape = packed_shape(out_features, in_features)
    if packed.shape != shape or packed.dtype != torch.int32 or not packed.is_contiguous():
        raise ValueError(
            f"packed weight of [{out_features}, {in_features}] must be contiguous int32 {list(shape)}, "
            f"not {packed.dtype} {list(packed.shape)}"
        )
