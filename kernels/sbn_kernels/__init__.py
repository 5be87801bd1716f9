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

``capabilities()`` says which of them run here, and why the others do not.
"""

from sbn_kernels.capability import Capabilities, UnsupportedError, capabilities
from sbn_kernels.cusparselt import check_cusparselt, compress24, cusparselt_gemm
from sbn_kernels.decode import decode_gemm
from sbn_kernels.hopper_gemm import sparse_gemm, ternary_gemm
from sbn_kernels.packing import pack_dense, pack_sparse24, packed_shape, unpack
from sbn_kernels.portable_gemm import int8_gemm
from sbn_kernels.prepare import PreparedWeight, prepare_weight
from sbn_kernels.quantize import quantize_tokens

__all__ = [
    "Capabilities",
    "PreparedWeight",
    "UnsupportedError",
    "capabilities",
    "check_cusparselt",
    "compress24",
    "cusparselt_gemm",
    "decode_gemm",
    "int8_gemm",
    "pack_dense",
    "pack_sparse24",
    "packed_shape",
    "prepare_weight",
    "quantize_tokens",
    "sparse_gemm",
    "ternary_gemm",
    "unpack",
]
