"""The backward of one linear layer, part by part: bfloat16, ours with exact gradients, ours with int8 gradients.

    python benchmarks/gradients.py [--shapes 8192,4096,14336 ...]

``bf16`` is what autograd computes for a bfloat16 layer: dX = dy W and dW = dy^T x. ``exact`` has the same two products,
with a weight that is dequantised once an optimiser step (not timed) and activations that are dequantised from int8
(timed). ``int8`` quantises dy in both orders, multiplies dX on packed weights, transposes the saved activations and
multiplies dW. Codes, scales and both int8 products are compared bit for bit with their definitions before anything is
timed. dW is float32 for int8, and bfloat16 for the others, as torch.mm returns it. ``2:4 both ways`` is the time that
dX would take if the mask were 2:4 along out_features too: bfloat16 through cuSPARSELt, int8 through ``sparse_gemm``. No
layer has such masks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import sbn_kernels as sk
import torch
from common import append, copies, fresh_results, header, median_ms, need_gpu, verify
from torch import Tensor

# qkv, o, gate and up, down of Qwen2.5 0.5B, 1.5B and 3B at 16,384 tokens; then one layer of Llama 3 8B
SHAPES = [
    *((16384, k, n) for k, n in ((896, 1152), (896, 896), (896, 9728), (4864, 896))),
    *((16384, k, n) for k, n in ((1536, 2048), (1536, 1536), (1536, 17920), (8960, 1536))),
    *((16384, k, n) for k, n in ((2048, 2560), (2048, 2048), (2048, 22016), (11008, 2048))),
    (8192, 4096, 14336),
]

Calls = list[Callable[[], object]]


class Case:
    """Sets of random tensors of one shape, with what the forward and the optimiser step leave for the backward."""

    def __init__(self, tokens: int, inner: int, out: int, sets: int) -> None:
        def normal(*shape: int) -> list[Tensor]:
            return [torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]

        self.inner, self.sets = inner, sets
        self.x, self.dy, self.weight = normal(tokens, inner), normal(tokens, out), normal(out, inner)
        self.prepared = [sk.prepare_weight(w, 6, 8) for w in self.weight]
        self.packed_t = [sk.pack_transposed(p.codes) for p in self.prepared]
        self.seed = torch.tensor([1], device="cuda")
        self.unit = torch.ones(inner, device="cuda")
        quantized = [sk.quantize_tokens(x) for x in self.x]
        self.x8, self.scale = [q for q, _ in quantized], [s for _, s in quantized]
        self.q = [self.quantize(i) for i in range(sets)]
        self.x8t = [sk.transpose_tokens(x8) for x8 in self.x8]
        half = torch.eye(2, device="cuda").repeat_interleave(2, 0).repeat_interleave(2, 1)  # [4, 4], two in each line
        self.both_mask = half.repeat(inner // 4, out // 4).bool()
        signs = torch.randint(0, 2, (sets, inner, out), device="cuda", dtype=torch.int8) * 2 - 1
        self.both = list((signs * self.both_mask).unbind())
        self.both_packed = [sk.pack_sparse24(codes, self.both_mask) for codes in self.both]
        self.both_compressed = [torch._cslt_compress(codes.bfloat16()) for codes in self.both]

    def quantize(self, i: int) -> sk.QuantizedGradient:
        return sk.quantize_gradient(self.dy[i], self.prepared[i].row_scale, self.scale[i], self.seed)

    def dx(self, i: int, q: sk.QuantizedGradient) -> Tensor:
        return sk.input_gradient_gemm(q.tokens, q.token_scale, self.packed_t[i], self.inner)

    def dx_both_int8(self, i: int) -> Tensor:
        return sk.sparse_gemm(self.q[i].tokens, self.q[i].token_scale, self.both_packed[i], self.unit, self.inner)

    def dx_both_bf16(self, i: int) -> Tensor:
        return torch._cslt_sparse_mm(self.both_compressed[i], self.dy[i].t(), transpose_result=True)

    def int8(self, i: int) -> tuple[Tensor, Tensor]:
        q = self.quantize(i)
        x8t = sk.transpose_tokens(self.x8[i])
        return self.dx(i, q), sk.weight_gradient_gemm(q.channels, q.channel_scale, x8t)

    def exact(self, i: int) -> tuple[Tensor, Tensor]:
        x = sk.dequantize_tokens(self.x8[i], self.scale[i])
        return self.dy[i] @ self.weight[i], self.dy[i].t() @ x

    def bf16(self, i: int) -> tuple[Tensor, Tensor]:
        return self.dy[i] @ self.weight[i], self.dy[i].t() @ self.x[i]

    def check(self) -> None:
        """Checks the first set: part of the codes and scales against the twin, both products against float64."""
        dy, gamma, scale, q = self.dy[0], self.prepared[0].row_scale, self.scale[0], self.q[0]
        rows = sk.quantize_gradient_reference(dy[:512], gamma, scale[:512], self.seed)
        verify("codes of tokens", q.tokens[:512], rows.tokens)
        verify("scales of tokens", q.token_scale[:512], rows.token_scale)
        columns = sk.quantize_gradient_reference(dy[:, :256], gamma[:256], scale, self.seed)
        verify("codes of channels", q.channels[:256], columns.channels)
        verify("scales of channels", q.channel_scale[:256], columns.channel_scale)
        dx = (q.tokens.double() @ self.prepared[0].codes.double()).float() * q.token_scale[:, None]
        verify("dX", self.dx(0, q), dx.bfloat16())
        both = q.tokens.double() @ self.both[0].t().double()
        verify("dX, int8, 2:4 both ways", self.dx_both_int8(0), (both.float() * q.token_scale[:, None]).bfloat16())
        exact = dy.double() @ self.both[0].t().double()
        error = (self.dx_both_bf16(0).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        if not error < 5e-3:
            raise AssertionError(f"dX, bf16, 2:4 both ways: relative RMS error {error:.1e}")
        dw = (q.channels.double() @ self.x8[0].double()).float() * q.channel_scale[:, None]
        verify("dW", sk.weight_gradient_gemm(q.channels, q.channel_scale, self.x8t[0]), dw)

    def calls(self) -> dict[tuple[str, str], Calls]:
        """Times every part. The keys are (variant, part)."""

        def each(call: Callable[[int], object]) -> Calls:
            return [partial(call, i) for i in range(self.sets)]

        def dw(i: int, portable: bool) -> Tensor:
            return sk.weight_gradient_gemm(self.q[i].channels, self.q[i].channel_scale, self.x8t[i], portable=portable)

        return {
            ("bf16", "all"): each(self.bf16),
            ("bf16", "dX"): each(lambda i: self.dy[i] @ self.weight[i]),
            ("bf16", "dW"): each(lambda i: self.dy[i].t() @ self.x[i]),
            ("exact", "all"): each(self.exact),
            ("exact", "dequantize"): each(lambda i: sk.dequantize_tokens(self.x8[i], self.scale[i])),
            ("int8", "all"): each(self.int8),
            ("int8", "quantize"): each(self.quantize),
            ("int8", "transpose"): each(lambda i: sk.transpose_tokens(self.x8[i])),
            ("int8", "dX"): each(lambda i: self.dx(i, self.q[i])),
            ("int8", "dX, 2:4 both ways"): each(self.dx_both_int8),
            ("exact", "dX, 2:4 both ways"): each(self.dx_both_bf16),
            ("int8", "dW"): each(lambda i: dw(i, False)),
            ("int8", "dW, plain Triton"): each(lambda i: dw(i, True)),
            ("int8", "pack (once a step)"): each(lambda i: sk.pack_transposed(self.prepared[i].codes)),
        }


def main() -> None:
    """Checks, then times every part at every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", help="tokens,in_features,out_features")
    parser.add_argument("--seconds", type=float, default=0.1, help="of timing for each number")
    args = parser.parse_args()
    need_gpu()
    torch.manual_seed(0)
    print(header())
    path = fresh_results("gradients")
    shapes = [tuple(map(int, s.split(","))) for s in args.shapes] if args.shapes else SHAPES
    for tokens, inner, out in shapes:
        case = Case(tokens, inner, out, copies(2 * tokens * (inner + out) + 4 * inner * out, most=6))
        case.check()
        base = 0.0
        for (variant, part), calls in case.calls().items():
            ms = median_ms(calls, args.seconds)
            base = base or ms
            row = {"tokens": tokens, "in": inner, "out": out, "variant": variant, "part": part, "ms": ms}
            products = {"all": 2, "dX": 1, "dX, 2:4 both ways": 1, "dW": 1, "dW, plain Triton": 1}.get(part, 0)
            row |= {"tflops": 2e-9 * products * tokens * inner * out / ms}
            append(path, row | {"vs_bf16": base / ms if part == "all" else ""})


if __name__ == "__main__":
    main()
