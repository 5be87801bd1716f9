"""The forward of one linear layer: every way to compute it, one shape after the other.

    python benchmarks/layer_forward.py [--shapes 8192,4096,14336 ...] [--quick] [--ampere]

``gemm`` rows take quantised tokens and a prepared weight. ``layer`` rows start from bfloat16 tokens, so they include
the quantisation. All outputs are bfloat16. The sparse and the dense ternary products are compared bit for bit with a
float64 reference before anything is timed. cuSPARSELt's own product is unscaled, and runs the algorithm that
cuSPARSELt's search picks. ``--ampere`` adds the kernels for Ampere and Ada, with each tile; they run on Hopper too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import sbn_kernels as sk
import torch
from common import append, copies, fresh_results, header, median_ms, need_gpu, reference_gemm, verify
from torch import Tensor
from torch.nn import functional as F

SHAPES = [
    (8192, 4096, 14336),
    (8192, 14336, 4096),
    (16384, 8192, 8192),
    (8192, 2048, 11008),
    (8192, 896, 4864),
    (2048, 4096, 14336),
    (256, 4096, 14336),
]

Calls = list[Callable[[], object]]


def ours(tokens: int, inner: int, out: int, sets: int, x: list[Tensor]) -> dict[tuple[str, str], Calls]:
    """Times our variants, after checking them. The keys are (variant, what)."""
    capabilities = sk.capabilities()
    quantized = [sk.quantize_tokens(t) for t in x]
    calls: dict[tuple[str, str], Calls] = {}
    for name, n, m, layout, gemm in (
        ("2:4 sparse, 2-bit", 2, 4, "sparse24", sk.sparse_gemm),
        ("6:8 as dense ternary, 2-bit", 6, 8, "dense", sk.ternary_gemm),
    ):
        if not capabilities.can("sparse_gemm"):
            print(f"{name}: {capabilities.reasons['sparse_gemm']}")
            continue
        p = [
            sk.prepare_weight(torch.randn(out, inner, device="cuda"), n, m, layout=layout, want_codes=i == 0)
            for i in range(sets)
        ]
        verify(
            name,
            gemm(*quantized[0], p[0].packed, p[0].row_scale, out),
            reference_gemm(*quantized[0], p[0].codes, p[0].row_scale),
        )
        calls[name, "gemm"] = [
            lambda i=i, p=p, gemm=gemm: gemm(*quantized[i], p[i].packed, p[i].row_scale, out) for i in range(sets)
        ]
        calls[name, "layer"] = [
            lambda i=i, p=p, gemm=gemm: gemm(*sk.quantize_tokens(x[i]), p[i].packed, p[i].row_scale, out)
            for i in range(sets)
        ]
    return calls


def portable(tokens: int, inner: int, out: int, sets: int, x: list[Tensor]) -> dict[tuple[str, str], Calls]:
    """Times the plain Triton int8 product and our cuSPARSELt path, after checking them."""
    quantized = [sk.quantize_tokens(t) for t in x]
    p = [sk.prepare_weight(torch.randn(out, inner, device="cuda"), 2, 4) for _ in range(sets)]
    reference = reference_gemm(*quantized[0], p[0].codes, p[0].row_scale)
    verify("int8_gemm", sk.int8_gemm(*quantized[0], p[0].codes, p[0].row_scale), reference)
    calls: dict[tuple[str, str], Calls] = {
        ("Triton int8 dense, tuned", "gemm"): [
            lambda i=i: sk.int8_gemm(*quantized[i], p[i].codes, p[i].row_scale) for i in range(sets)
        ]
    }
    if sk.capabilities().can("cusparselt"):
        compressed = [sk.compress24(q.codes) for q in p]
        verify("cusparselt_gemm", sk.cusparselt_gemm(*quantized[0], compressed[0], p[0].row_scale), reference)
        calls["cuSPARSELt 2:4, int32 + scales", "gemm"] = [
            lambda i=i: sk.cusparselt_gemm(*quantized[i], compressed[i], p[i].row_scale) for i in range(sets)
        ]
        alg, split_k, mode, _ = torch._C._cusparselt.mm_search(
            compressed[0], quantized[0][0].t(), None, None, torch.bfloat16, True
        )
        calls["cuSPARSELt 2:4, unscaled bf16", "gemm"] = [
            lambda i=i: torch._cslt_sparse_mm(
                compressed[i], quantized[i][0].t(), out_dtype=torch.bfloat16, transpose_result=True,
                alg_id=alg, split_k=split_k, split_k_mode=mode,
            )
            for i in range(sets)
        ]  # fmt: skip
    return calls


def ampere(tokens: int, inner: int, out: int, sets: int, x: list[Tensor]) -> dict[tuple[str, str], Calls]:
    """Times the kernels for Ampere and Ada with each of their tiles, after checking them."""
    from sbn_kernels.gemm.sm80.gemm import TILES, ampere_sparse_gemm, ampere_ternary_gemm

    quantized = [sk.quantize_tokens(t) for t in x]
    calls: dict[tuple[str, str], Calls] = {}
    for name, n, m, layout, gemm in (
        ("2:4 by mma.sp, 2-bit", 2, 4, "sparse24", ampere_sparse_gemm),
        ("6:8 by mma, 2-bit", 6, 8, "dense", ampere_ternary_gemm),
    ):
        p = [
            sk.prepare_weight(torch.randn(out, inner, device="cuda"), n, m, layout=layout, want_codes=i == 0)
            for i in range(sets)
        ]
        reference = reference_gemm(*quantized[0], p[0].codes, p[0].row_scale)
        for number, tile in enumerate(TILES):
            variant = f"{name}, tile {128 * tile.panels} x {tile.tokens}"
            args = (out, None, torch.bfloat16, number)
            verify(variant, gemm(*quantized[0], p[0].packed, p[0].row_scale, *args), reference)
            calls[variant, "gemm"] = [
                lambda i=i, p=p, gemm=gemm, args=args: gemm(*quantized[i], p[i].packed, p[i].row_scale, *args)
                for i in range(sets)
            ]
    return calls


def baselines(tokens: int, inner: int, out: int, sets: int, x: list[Tensor]) -> dict[tuple[str, str], Calls]:
    """Times bfloat16, float8 rowwise and torch's int8 product."""
    w = [torch.randn(out, inner, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    calls: dict[tuple[str, str], Calls] = {
        ("bf16 F.linear", "layer"): [lambda i=i: F.linear(x[i], w[i]) for i in range(sets)]
    }
    if torch.cuda.get_device_capability() >= (8, 9):
        xf = [t.to(torch.float8_e4m3fn) for t in x]
        wf = [t.to(torch.float8_e4m3fn) for t in w]
        sx, sw = torch.rand(tokens, 1, device="cuda"), torch.rand(1, out, device="cuda")
        calls["fp8 rowwise _scaled_mm", "gemm"] = [
            lambda i=i: torch._scaled_mm(xf[i], wf[i].t(), sx, sw, out_dtype=torch.bfloat16, use_fast_accum=True)
            for i in range(sets)
        ]
    if tokens > 16:
        x8 = [torch.randint(-128, 128, (tokens, inner), device="cuda", dtype=torch.int8) for _ in range(sets)]
        w8 = [torch.randint(-1, 2, (out, inner), device="cuda", dtype=torch.int8) for _ in range(sets)]
        calls["torch._int_mm (int32 out)", "gemm"] = [lambda i=i: torch._int_mm(x8[i], w8[i].t()) for i in range(sets)]
    return calls


def main() -> None:
    """Times every variant at every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", help="tokens,in_features,out_features")
    parser.add_argument("--quick", action="store_true", help="only bf16 and our packed GEMMs")
    parser.add_argument("--ampere", action="store_true", help="also the kernels for Ampere and Ada, with each tile")
    parser.add_argument("--seconds", type=float, default=0.25, help="of timing for each number")
    args = parser.parse_args()
    need_gpu()
    torch.manual_seed(0)
    print(header())
    path = fresh_results("layer_forward")
    shapes = [tuple(map(int, s.split(","))) for s in args.shapes] if args.shapes else SHAPES
    for tokens, inner, out in shapes:
        sets = copies(2 * tokens * inner + 2 * tokens * out + out * inner / 4, most=8)
        x = [torch.randn(tokens, inner, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
        base = 0.0
        groups = [baselines, ours] if args.quick else [baselines, ours, portable]
        for group in [*groups, ampere] if args.ampere else groups:
            for (variant, what), calls in group(tokens, inner, out, sets, x).items():
                ms = median_ms(calls, args.seconds)
                base = base or ms
                row = {"tokens": tokens, "in": inner, "out": out, "variant": variant, "what": what, "ms": ms}
                append(path, {**row, "tflops": 2e-9 * tokens * inner * out / ms, "vs_bf16": base / ms})


if __name__ == "__main__":
    main()
