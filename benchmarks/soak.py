"""Every kernel under changing data: a short pass for compute-sanitizer, and a soak of many launches.

    compute-sanitizer --tool memcheck --report-api-errors no python benchmarks/soak.py --short
    compute-sanitizer --tool racecheck --kernel-regex kns=ternary_gemm \\
        python benchmarks/soak.py --short
    python benchmarks/soak.py --launches 100000 --seconds 90
    python benchmarks/soak.py --decode_steps 100000 --seconds 300

``--report-api-errors no``: Triton 3.9 asks the driver for a shared-memory mode that older drivers refuse, and falls
back. Racecheck is slow. Without a filter on kernels it also instruments everything that torch launches.

The soak replays the packed products and the decode kernel on fresh random tokens into poisoned outputs. It counts
differing elements on the GPU against the product of int8 codes. When the time is up it stops early, and says so.

``--decode_steps`` soaks the persistent decode step instead, at batch 1, 4 and 16 in turn, on a model of 4 blocks of the
1.5B shape. Tokens and lengths change with every step. After 1,000 steps the caches and inputs start anew, and from then
on the sum of the bits of all logits must be that of the first round.
"""

from __future__ import annotations

import argparse
import sys
import time

import sbn_kernels as sk
import torch
from common import header, need_gpu, reference_gemm

SLOTS, ROUND = 1024, 1000


def short() -> int:
    """One small ragged launch of every kernel; returns the number of wrong elements."""
    wrong = 0
    capabilities = sk.capabilities()
    for tokens, inner, out in ((33, 272, 200), (130, 640, 264)):
        x = torch.randn(tokens, inner, device="cuda", dtype=torch.bfloat16)
        q, s = sk.quantize_tokens(x)
        sk.quantize_tokens(x, 4)
        for n, m, layout in ((2, 4, "sparse24"), (6, 8, "dense"), (3, 4, "dense")):
            w = torch.randn(out, inner, device="cuda")
            p = sk.prepare_weight(w, n, m, (out - 9, 9), layout=layout, want_stats=True)
            expected = reference_gemm(q, s, p.codes, p.row_scale)
            if capabilities.can("sparse_gemm"):
                gemm = sk.sparse_gemm if layout == "sparse24" else sk.ternary_gemm
                wrong += int((gemm(q, s, p.packed, p.row_scale, out) != expected).sum())
                parts = gemm(q[:33], s[:33], p.packed, p.row_scale, out, splits=3)
                wrong += int((parts != expected[:33]).sum())
            few = sk.decode_gemm(q[:33], s[:33], p.packed, p.row_scale, out, layout=layout)
            wrong += int((few != expected[:33]).sum())
        wrong += int((sk.int8_gemm(q, s, p.codes, p.row_scale) != expected).sum())
    return wrong


def soak(launches: int, seconds: float) -> tuple[int, int]:
    """Returns (launches made, wrong elements)."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    cases = []
    for tokens, inner, out in (
        (512, 1024, 2048),
        (300, 896, 1216),
        (64, 2048, 1024),
        (32, 8960, 1536),
        (8, 1024, 2048),
    ):
        for layout, n, m in (("sparse24", 2, 4), ("dense", 6, 8)):
            p = sk.prepare_weight(torch.randn(out, inner, device="cuda", generator=generator), n, m, layout=layout)
            cases.append((tokens, inner, out, layout, p, p.codes.bfloat16().t().contiguous()))
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    done = 0
    end = time.monotonic() + seconds
    while done < launches and time.monotonic() < end:
        for tokens, inner, out, layout, p, codes in cases:
            x8 = torch.randint(-128, 128, (tokens, inner), device="cuda", dtype=torch.int8, generator=generator)
            s = torch.rand(tokens, device="cuda", generator=generator) + 0.5
            # exact in bfloat16 inputs and float32 sums: |sum| < 2^24
            expected = (torch.mm(x8.bfloat16(), codes, out_dtype=torch.float32) * (s[:, None] * p.row_scale)).bfloat16()
            for _ in range(50):
                poison = torch.full((tokens, out), float("nan"), device="cuda", dtype=torch.bfloat16)
                del poison  # the next output takes this memory
                if tokens <= 8:
                    y = sk.decode_gemm(x8, s, p.packed, p.row_scale, out, layout=layout)
                else:
                    y = (sk.sparse_gemm if layout == "sparse24" else sk.ternary_gemm)(x8, s, p.packed, p.row_scale, out)
                wrong += (y != expected).sum()
                done += 1
        torch.cuda.synchronize()
    return done, int(wrong)


def soak_decode(steps: int, seconds: float) -> tuple[int, int]:
    """Returns (steps made, steps whose logits differ from the same step of the first round)."""
    from sbn_kernels.decode.step import DecodeStep, Layer, Shape, Ternary, Weights, pack

    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", generator=generator)

    def matrix(rows: int, columns: int) -> Ternary:
        codes = torch.randint(-1, 2, (rows, columns), device="cuda", generator=generator, dtype=torch.int8)
        return Ternary(codes, (torch.rand(rows, device="cuda", generator=generator) + 0.5) / columns**0.5)

    shape = Shape(4, 1536, 8960, 12, 2, 128, 32000)
    d, kv, ffn = shape.d_model, 2 * shape.kv_heads * shape.head_size, shape.d_ffn
    layers = [
        Layer(normal(d), matrix(d + kv, d), matrix(d, d), normal(d), matrix(2 * ffn, d), matrix(d, ffn))
        for _ in range(shape.layers)
    ]
    angles = torch.arange(SLOTS, device="cuda").unsqueeze(1) * 1e4 ** (-torch.arange(64, device="cuda") / 64)
    cos, sin = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), 1)
    packed = pack(Weights(shape, layers, normal(d), normal(shape.vocab, d), normal(shape.vocab, d) / 40, cos, sin))
    batches = (1, 4, 16)
    done, wrong = 0, torch.zeros((), dtype=torch.int64, device="cuda")
    for batch in batches:
        size = (batch, shape.kv_heads, SLOTS, shape.head_size)
        first = [(normal(*size).bfloat16(), normal(*size).bfloat16()) for _ in range(shape.layers)]
        step = DecodeStep(packed, [(keys.clone(), values.clone()) for keys, values in first], SLOTS)
        tokens = torch.randint(shape.vocab, (ROUND, batch), device="cuda", generator=generator)
        lengths = torch.randint(SLOTS, (ROUND, batch), device="cuda", generator=generator)
        sums = torch.zeros(ROUND, dtype=torch.int64, device="cuda")
        end, made = time.monotonic() + seconds / len(batches), 0
        while made < steps // len(batches) and time.monotonic() < end:
            for (keys, values), (old_keys, old_values) in zip(step.caches, first, strict=True):
                keys.copy_(old_keys), values.copy_(old_values)
            for j in range(ROUND):
                step.lengths.copy_(lengths[j])
                total = step.step(tokens[j]).view(torch.int16).sum(dtype=torch.int64)
                if made == 0:
                    sums[j] = total
                else:
                    wrong += total != sums[j]
            step.check()
            made += ROUND
        done += made
    return done, int(wrong)


def main() -> None:
    """Runs the short pass, then the soak unless only the short pass is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="only one small launch of every kernel")
    parser.add_argument("--launches", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=120.0, help="stop launching after this long")
    parser.add_argument("--decode_steps", type=int, default=0, help="soak the persistent decode step")
    args = parser.parse_args()
    need_gpu()
    torch.manual_seed(0)
    print(header())
    if args.decode_steps:
        start = time.monotonic()
        done, bad = soak_decode(args.decode_steps, args.seconds)
        print(f"decode step: {done} steps in {time.monotonic() - start:.0f} s, {bad} differ from the first round")
        sys.exit(1 if bad else 0)
    wrong = short()
    print(f"short pass: {wrong} wrong elements")
    if not args.short:
        start = time.monotonic()
        done, bad = soak(args.launches, args.seconds)
        print(f"soak: {done} launches in {time.monotonic() - start:.0f} s, {bad} wrong elements")
        wrong += bad
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
