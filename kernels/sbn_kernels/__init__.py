"""Kernels for ternary, N:M-sparse linear layers. Needs torch and Triton only.

Functions on tensors, each a torch custom op with a fake (meta) kernel: safe under ``torch.compile`` and in CUDA graphs.
A layer's forward is ``quantize_tokens`` and one GEMM on what ``prepare_weight`` made once for the optimiser step:

========================  ==========================================================  ==============================
function                  weight                                                      runs on
========================  ==========================================================  ==============================
``sparse_gemm``           2:4, packed ``sparse24``, 2 bits a weight                   Hopper, Triton >= 3.9
``ternary_gemm``          any pattern, packed ``dense``, 2 bits a weight              Hopper, Triton >= 3.9
``decode_gemm``           either packed form, up to 64 tokens                         sm_80 and later
``int8_gemm``             int8 codes, any pattern                                     sm_80 and later
``cusparselt_gemm``       2:4, cuSPARSELt's compressed form                           where torch has cuSPARSELt
========================  ==========================================================  ==============================

Its backward with int8 gradients (``gradients``): ``quantize_gradient``, then ``input_gradient_gemm`` on what
``pack_transposed`` made once for the optimiser step, and ``weight_gradient_gemm`` on what ``transpose_tokens`` makes of
the saved activations. With exact gradients: ``dequantize_tokens`` and bfloat16 products.

``swiglu_quantize`` takes the place of ``quantize_tokens`` after a SwiGLU.

``capabilities()`` says which of them run here, and why the others do not.
"""

from sbn_kernels.capability import Capabilities, UnsupportedError, capabilities
from sbn_kernels.cusparselt import check_cusparselt, compress24, cusparselt_gemm
from sbn_kernels.decode import decode_gemm
from sbn_kernels.gradients import (
    QuantizedGradient,
    gradient_draws,
    input_gradient_gemm,
    quantize_gradient,
    quantize_gradient_reference,
)
from sbn_kernels.hopper_gemm import sparse_gemm, ternary_gemm
from sbn_kernels.packing import pack_dense, pack_sparse24, packed_shape, unpack
from sbn_kernels.portable_gemm import int8_gemm
from sbn_kernels.prepare import PreparedWeight, prepare_weight
from sbn_kernels.quantize import quantize_tokens
from sbn_kernels.swiglu import swiglu_backward, swiglu_quantize
from sbn_kernels.transpose import dequantize_tokens, pack_transposed, transpose_tokens
from sbn_kernels.weight_gradient import weight_gradient_gemm

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
