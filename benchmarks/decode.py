"""Decoding: 1 to 64 tokens times packed ternary weights, against bfloat16 and the bandwidth of a copy.

    python benchmarks/decode.py [--shapes 8960,1536 ...] [--tokens 16 32 64] [--splits 2 4 8]

``gbs`` counts the packed weights only (2 bits each), the smallest possible traffic. Weights rotate, so that they come
from memory and not from a cache. Variants:

- ``decode``: ``decode_gemm`` with its own choice of kernel;
- ``decode kernel``: the decode kernel, whatever the choice would be;
- ``prefill kernel``: the Hopper product with K in one piece;
- ``prefill kernel, parts of K``: the same with the number of parts that the kernel chooses, where that is not one, or
  with each number that ``--splits`` names.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import sbn_kernels as sk
import torch
from common import append, copies, fresh_results, header, median_ms, need_gpu, reference_gemm, verify
from quantize import copy_gbs
from sbn_kernels.gemm.sm90.split_k import choose_splits
from sbn_kernels.runtime.capability import multiprocessors
from torch.nn import functional as F

# The last five are products of Qwen2.5 1.5B and 3B. The choice between kernels was made with them.
SHAPES = [
    *((4096, 14336), (14336, 4096), (2048, 11008), (8192, 8192), (896, 4864), (4864, 896)),
    *((1536, 2048), (1536, 17920), (8960, 1536), (2048, 22016), (11008, 2048)),
]
TOKENS = (1, 2, 4, 8, 16, 32, 64)


Variant = tuple[str, Callable[[sk.PreparedWeight], torch.Tensor]]


def variants(q: torch.Tensor, s: torch.Tensor, out: int, splits: Sequence[int]) -> dict[str, Variant]:
    """Returns name -> (layout, call). From 4 tokens on also each kernel by itself, to find where they cross."""
    tokens, inner = q.shape
    found: dict[str, Variant] = {}

    def add(name: str, of: str, call: Callable[..., torch.Tensor], *rest: object, **named: object) -> None:
        found[name] = (of, lambda w: call(q, s, w.packed, w.row_scale, *rest, **named))

    for kind, layout, gemm in (("2:4", "sparse24", sk.sparse_gemm), ("dense ternary", "dense", sk.ternary_gemm)):
        sparse = layout == "sparse24"
        add(f"decode, {kind}", layout, sk.decode_gemm, out, layout=layout)
        if tokens < 4 or not sk.capabilities().can("sparse_gemm"):
            continue
        kernel = torch.ops.sbn_kernels.decode_gemm
        add(f"decode kernel, {kind}", layout, kernel, None, out, sparse, torch.bfloat16, False)
        add(f"prefill kernel, {kind}", layout, gemm, out, splits=1)
        chosen = choose_splits(tokens, out, inner, multiprocessors(q.device.index))
        for parts in splits or [chosen]:
            if parts > 1:
                name = f"{parts} parts of K" if splits else "parts of K"
                add(f"prefill kernel, {name}, {kind}", layout, gemm, out, splits=parts)
    return found


def one_shape(
    path: Path, copy: float, inner: int, out: int, token_counts: Sequence[int], splits: Sequence[int]
) -> None:
    """Verifies and times every variant at every number of tokens."""
    sets, dense_sets = copies(inner * out / 4, most=200), copies(2 * inner * out, most=200)
    dense = [torch.randn(out, inner, device="cuda", dtype=torch.bfloat16) for _ in range(dense_sets)]
    prepared = {
        layout: [sk.prepare_weight(torch.randn(out, inner, device="cuda"), n, m, layout=layout) for _ in range(sets)]
        for layout, n, m in (("sparse24", 2, 4), ("dense", 6, 8))
    }
    for tokens in token_counts:
        x = torch.randn(tokens, inner, device="cuda", dtype=torch.bfloat16)
        q, s = sk.quantize_tokens(x)
        bf16 = median_ms([partial(F.linear, x, w) for w in dense], 0.1)
        gbs = 2e-6 * inner * out / bf16
        row = {"in": inner, "out": out, "tokens": tokens}
        numbers = {"us": 1e3 * bf16, "gbs": gbs, "of_copy": gbs / copy, "vs_bf16": 1.0}
        append(path, {**row, "variant": "bf16 F.linear", **numbers})
        for name, (layout, call) in variants(q, s, out, splits).items():
            first = prepared[layout][0]
            verify(name, call(first), reference_gemm(q, s, first.codes, first.row_scale))
            ms = median_ms([partial(call, w) for w in prepared[layout]], 0.1, 16)
            gbs = 1e-6 * (inner * out / 4) / ms
            numbers = {"us": 1e3 * ms, "gbs": gbs, "of_copy": gbs / copy, "vs_bf16": bf16 / ms}
            append(path, {**row, "variant": name, **numbers})


def main() -> None:
    """Checks against the float64 reference, then times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", help="in_features,out_features")
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS, help="at most 64")
    parser.add_argument("--splits", nargs="*", type=int, default=(), help="numbers of parts of K to time")
    parser.add_argument("--name", default="decode", help="of the CSV")
    args = parser.parse_args()
    need_gpu()
    torch.manual_seed(0)
    print(header())
    path = fresh_results(args.name)
    copy = copy_gbs()
    print(f"copy {copy:.0f} GB/s")
    shapes = [tuple(map(int, shape.split(","))) for shape in args.shapes] if args.shapes else SHAPES
    for inner, out in shapes:
        one_shape(path, copy, inner, out, args.tokens, args.splits)


if __name__ == "__main__":
    main()
