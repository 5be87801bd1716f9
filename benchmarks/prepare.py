"""Weight preparation (latent weight -> gamma, mask, codes, packed words) against the bandwidth of a copy.

    python benchmarks/prepare.py

``of_copy`` counts the bytes that have to move: the weight read once, every output written once. ``passes_of_copy``
counts the weight twice, because gamma, a mean over the whole weight, has to be known before the first code.
"""

from __future__ import annotations

import sbn_kernels as sk
import torch
from common import append, copies, fresh_results, header, median_ms, need_gpu
from quantize import copy_gbs

SHAPES = [(14336, 4096), (8192, 8192), (4864, 896)]
CASES = [
    ("2:4", 2, 4, "sparse24", False),
    ("2:4 + int8 codes", 2, 4, "sparse24", True),
    ("6:8", 6, 8, "dense", False),
    ("6:8 + int8 codes", 6, 8, "dense", True),
    ("16:32", 16, 32, "dense", False),
    ("dense", 1, 1, "dense", False),
]


def main() -> None:
    """Checks against plain PyTorch, then times."""
    need_gpu()
    torch.manual_seed(0)
    print(header())
    path = fresh_results("prepare")
    copy = copy_gbs()
    print(f"copy {copy:.0f} GB/s")
    for dtype in (torch.float32, torch.bfloat16):
        for out, inner in SHAPES:
            for name, n, m, layout, codes in CASES:
                once = out * inner * dtype.itemsize
                written = out * inner * (1 / 8 + 1 / 4 + codes)
                sets = copies(once + written, most=12)
                w = [torch.randn(out, inner, device="cuda", dtype=dtype) for _ in range(sets)]
                p = sk.prepare_weight(w[0], n, m, layout=layout)
                ranks = w[0].abs().unflatten(1, (-1, m)).argsort(dim=-1, descending=True, stable=True).argsort(-1)
                t = (w[0].float() / p.gamma).round().clamp(-1, 1) * (ranks < n).flatten(1)
                unpacked = sk.unpack(p.packed, out, inner, layout)
                if not (torch.equal(p.codes, t.to(torch.int8)) and torch.equal(unpacked, p.codes)):
                    raise AssertionError(f"prepare_weight {name} differs from its definition")
                del ranks, t, unpacked

                def call(i: int, w=w, n=n, m=m, layout=layout, codes=codes) -> sk.PreparedWeight:
                    return sk.prepare_weight(w[i], n, m, layout=layout, want_codes=codes)

                ms = median_ms([lambda i=i: call(i) for i in range(sets)])
                rate = 1e-6 / ms / copy
                row = {"out": out, "in": inner, "dtype": str(dtype).split(".")[1], "case": name, "us": 1e3 * ms}
                row |= {"of_copy": (once + written) * rate, "passes_of_copy": (2 * once + written) * rate}
                append(path, row)


if __name__ == "__main__":
    main()
