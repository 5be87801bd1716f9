"""Per-token quantisation of activations against the bandwidth of a device-to-device copy.

python benchmarks/quantize.py
"""

from __future__ import annotations

from functools import partial

import sbn_kernels as sk
import torch
from common import append, copies, fresh_results, header, median_ms, need_gpu

SHAPES = [(8192, 896), (8192, 2048), (8192, 4096), (8192, 14336), (16384, 8192), (2048, 4096), (256, 4096)]


def copy_gbs() -> float:
    """Returns the GB/s of a large copy, bytes read plus bytes written."""
    a = torch.randn(1 << 29, device="cuda")
    b = torch.empty_like(a)
    # A copy node of a graph is slower than a kernel that streams, so the best of both is the ceiling.
    calls = (lambda: b.copy_(a), lambda: torch.neg(a, out=b))
    return 2e-6 * a.nbytes / min(median_ms([call], repeats=2) for call in calls)


def main() -> None:
    """Checks against plain PyTorch, then times."""
    need_gpu()
    torch.manual_seed(0)
    print(header())
    path = fresh_results("quantize")
    copy = copy_gbs()
    print(f"copy {copy:.0f} GB/s")
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, inner in SHAPES:
            moved = tokens * inner * (dtype.itemsize + 1)
            sets = copies(moved)
            x = [torch.randn(tokens, inner, device="cuda", dtype=dtype) for _ in range(sets)]
            q, scale = sk.quantize_tokens(x[0])
            wide = x[0].float()
            expected = wide.abs().amax(1).clamp(min=1e-5) / torch.tensor(127.0, device="cuda")
            if not (torch.equal(scale, expected) and torch.equal(q, (wide / scale[:, None]).round().to(torch.int8))):
                raise AssertionError("quantize_tokens differs from its definition")
            ms = median_ms([partial(sk.quantize_tokens, t) for t in x])
            row = {"tokens": tokens, "in": inner, "dtype": str(dtype).split(".")[1], "us": 1e3 * ms}
            append(path, {**row, "gbs": 1e-6 * moved / ms, "of_copy": 1e-6 * moved / ms / copy})


if __name__ == "__main__":
    main()
