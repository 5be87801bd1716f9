"""Kernels for ternary, N:M-sparse linear layers. Needs torch and Triton only.

Each function works on tensors and is a torch op with a fake (meta) kernel, so it is safe under ``torch.compile`` and in
CUDA graphs. The forward of a layer is ``quantize_tokens`` and one product with the weight that ``prepare_weight`` made
once for the optimiser step:

========================  ==========================================================  ==============================
function                  weight                                                      runs on
========================  ==========================================================  ==============================
``sparse_gemm``           2:4, packed ``sparse24``, 2 bits a weight                   Hopper, Triton >= 3.9
``ternary_gemm``          any pattern, packed ``dense``, 2 bits a weight              Hopper, Triton >= 3.9
``decode_gemm``           either packed form, up to 64 tokens                         sm_80 and later
``int8_gemm``             int8 codes, any pattern                                     sm_80 and later
``cusparselt_gemm``       2:4, cuSPARSELt's compressed form                           where torch has cuSPARSELt
========================  ==========================================================  ==============================

The backward with int8 gradients (``gradients``) is ``quantize_gradient``, then ``input_gradient_gemm`` with the weight
that ``pack_transposed`` made once for the optimiser step, and ``weight_gradient_gemm`` with the saved activations,
which ``transpose_tokens`` turns round. The backward with exact gradients is ``dequantize_tokens`` and bfloat16
products. ``swiglu_quantize`` takes the place of ``quantize_tokens`` after a SwiGLU.

Every folder holds ``reference.py``, the same computation in plain PyTorch, which needs no Triton. ``capabilities()``
says which functions run here and why the others do not; :mod:`sbn_kernels.gemm.registry` has what each kernel needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sbn_kernels._moved import install

if TYPE_CHECKING:
    from sbn_kernels.catalog import Capabilities, capabilities
    from sbn_kernels.common.packing import pack_dense, pack_sparse24, packed_shape, unpack
    from sbn_kernels.decode.triton import decode_gemm
    from sbn_kernels.gemm.cusparselt import check_cusparselt, compress24, cusparselt_gemm
    from sbn_kernels.gemm.portable import int8_gemm
    from sbn_kernels.gemm.sm90.gemm import sparse_gemm, ternary_gemm
    from sbn_kernels.gradients.input_gradient import input_gradient_gemm
    from sbn_kernels.gradients.reference import QuantizedGradient, gradient_draws, quantize_gradient_reference
    from sbn_kernels.gradients.transpose import dequantize_tokens, pack_transposed, transpose_tokens
    from sbn_kernels.gradients.triton import quantize_gradient
    from sbn_kernels.gradients.weight_gradient import weight_gradient_gemm
    from sbn_kernels.prepare.triton import PreparedWeight, prepare_weight
    from sbn_kernels.quantize.triton import quantize_tokens
    from sbn_kernels.runtime.capability import UnsupportedError
    from sbn_kernels.swiglu.triton import swiglu_backward, swiglu_quantize

# Imported on first use, so that what needs no kernel does not wait for Triton.
_MODULE_OF = {
    "Capabilities": "catalog",
    "PreparedWeight": "prepare.triton",
    "QuantizedGradient": "gradients.reference",
    "UnsupportedError": "runtime.capability",
    "capabilities": "catalog",
    "check_cusparselt": "gemm.cusparselt",
    "compress24": "gemm.cusparselt",
    "cusparselt_gemm": "gemm.cusparselt",
    "decode_gemm": "decode.triton",
    "dequantize_tokens": "gradients.transpose",
    "gradient_draws": "gradients.reference",
    "input_gradient_gemm": "gradients.input_gradient",
    "int8_gemm": "gemm.portable",
    "pack_dense": "common.packing",
    "pack_sparse24": "common.packing",
    "pack_transposed": "gradients.transpose",
    "packed_shape": "common.packing",
    "prepare_weight": "prepare.triton",
    "quantize_gradient": "gradients.triton",
    "quantize_gradient_reference": "gradients.reference",
    "quantize_tokens": "quantize.triton",
    "sparse_gemm": "gemm.sm90.gemm",
    "swiglu_backward": "swiglu.triton",
    "swiglu_quantize": "swiglu.triton",
    "ternary_gemm": "gemm.sm90.gemm",
    "transpose_tokens": "gradients.transpose",
    "unpack": "common.packing",
    "weight_gradient_gemm": "gradients.weight_gradient",
}

__all__ = [
    "Capabilities",
    "PreparedWeight",
    "QuantizedGradient",
    "UnsupportedError",
    "capabilities",
    "check_cusparselt",
    "compress24",
    "cusparselt_gemm",
    "decode_gemm",
    "dequantize_tokens",
    "gradient_draws",
    "input_gradient_gemm",
    "int8_gemm",
    "pack_dense",
    "pack_sparse24",
    "pack_transposed",
    "packed_shape",
    "prepare_weight",
    "quantize_gradient",
    "quantize_gradient_reference",
    "quantize_tokens",
    "sparse_gemm",
    "swiglu_backward",
    "swiglu_quantize",
    "ternary_gemm",
    "transpose_tokens",
    "unpack",
    "weight_gradient_gemm",
]

install(
    {
        "sbn_kernels.capability": ("sbn_kernels.catalog", "sbn_kernels.runtime.capability"),
        "sbn_kernels.cusparselt": ("sbn_kernels.gemm.cusparselt",),
        "sbn_kernels.decode_kernels": ("sbn_kernels.decode.gluon",),
        "sbn_kernels.descriptors": ("sbn_kernels.runtime.descriptors",),
        "sbn_kernels.gradient_hopper": ("sbn_kernels.gradients.sm90",),
        "sbn_kernels.gradient_kernels": ("sbn_kernels.gradients.device",),
        "sbn_kernels.hopper_gemm": (
            "sbn_kernels.gemm.sm90.gemm",
            "sbn_kernels.common.checks",
            "sbn_kernels.common.buffers",
        ),
        "sbn_kernels.hopper_kernels": ("sbn_kernels.gemm.sm90.kernels", "sbn_kernels.common.hopper_pipeline"),
        "sbn_kernels.launch": ("sbn_kernels.runtime.launch",),
        "sbn_kernels.maxima": ("sbn_kernels.common.maxima",),
        "sbn_kernels.ops": (
            "sbn_kernels.runtime.ops",
            "sbn_kernels.common.integers",
            "sbn_kernels.common.checks",
            "sbn_kernels.common.buffers",
        ),
        "sbn_kernels.packing": ("sbn_kernels.common.packing",),
        "sbn_kernels.portable_gemm": ("sbn_kernels.gemm.portable",),
        "sbn_kernels.prepare_kernels": ("sbn_kernels.prepare.device",),
        "sbn_kernels.split_k": ("sbn_kernels.gemm.sm90.split_k",),
        "sbn_kernels.split_kernels": ("sbn_kernels.gemm.sm90.split_kernels",),
        "sbn_kernels.transpose": ("sbn_kernels.gradients.transpose",),
        "sbn_kernels.weight_gradient": ("sbn_kernels.gradients.weight_gradient",),
    }
)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
