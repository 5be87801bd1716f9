"""Decoding: 1 to 64 tokens times packed ternary weights, against bfloat16 and the bandwidth of a copy.

    python kernels/benchmarks/decode.py

``gbs`` counts the packed weights only (2 bits each), the smallest traffic possible; weights rotate so that they come
from memory, not from cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import sbn_kernels as sk
import torch
from common import append, copies, fresh_results, header, median_ms, need_gpu, reference_gemm, verify
from quantize import copy_gbs
from torch.nn import functional as F

SHAPES = [(4096, 14336), (14336, 4096), (2048, 11008), (8192, 8192), (896, 4864)]
TOKENS = (1, 2, 4, 8, 16, 32, 64)


Variant = tuple[str, Callable[[sk.PreparedWeight], torch.Tensor]]


def variants(q: torch.Tensor, s: torch.Tensor, out: int) -> dict[str, Variant]:
    """Name -> (layout, call). At 4 and 8 tokens also the prefill kernels, which take over above: the crossing point."""
    found: dict[str, Variant] = {
        "decode, 2:4": ("sparse24", lambda w: sk.decode_gemm(q, s, w.packed, w.row_scale, out, layout="sparse24")),
        "decode, dense ternary": ("dense", lambda w: sk.decode_gemm(q, s, w.packed, w.row_scale, out)),
    }
    if q.shape[0] in (4, 8) and sk.capabilities().can("sparse_gemm"):
        found["GEMM, 2:4"] = ("sparse24", lambda w: sk.sparse_gemm(q, s, w.packed, w.row_scale, out))
        found["GEMM, dense ternary"] = ("dense", lambda w: sk.ternary_gemm(q, s, w.packed, w.row_scale, out))
    return found


def one_shape(path: Path, copy: float, inner: int, out: int) -> None:
    """Verifies and times every variant at every number of tokens."""
    sets = copies(inner * out / 4, most=16)
    dense = [torch.randn(out, inner, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    prepared = {
        layout: [sk.prepare_weight(torch.randn(out, inner, device="cuda"), n, m, layout=layout) for _ in range(sets)]
        for layout, n, m in (("sparse24", 2, 4), ("dense", 6, 8))
    }
    for tokens in TOKENS:
        x = torch.randn(tokens, inner, device="cuda", dtype=torch.bfloat16)
        q, s = sk.quantize_tokens(x)
        bf16 = median_ms([partial(F.linear, x, w) for w in dense], 0.1)
        gbs = 2e-6 * inner * out / bf16
        row = {"in": inner, "out": out, "tokens": tokens}
        numbers = {"us": 1e3 * bf16, "gbs": gbs, "of_copy": gbs / copy, "vs_bf16": 1.0}
        append(path, {**row, "variant": "bf16 F.linear", **numbers})
        for name, (layout, call) in variants(q, s, out).items():
            first = prepared[layout][0]
            verify(name, call(first), reference_gemm(q, s, first.codes, first.row_scale))
            ms = median_ms([partial(call, w) for w in prepared[layout]], 0.1, 16)
            gbs = 1e-6 * (inner * out / 4) / ms
            numbers = {"us": 1e3 * ms, "gbs": gbs, "of_copy": gbs / copy, "vs_bf16": bf16 / ms}
            append(path, {**row, "variant": name, **numbers})


def main() -> None:
    """Checks against the float64 reference, then times."""
    need_gpu()
    torch.manual_seed(0)
    print(header())
    path = fresh_results("decode")
    copy = copy_gbs()
    print(f"copy {copy:.0f} GB/s")
    for inner, out in SHAPES:
        one_shape(path, copy, inner, out)


if __name__ == "__main__":
    main()
