"""Whole optimiser steps: tokens a second, peak memory and model-FLOPs utilisation of a Qwen2.5 shape.

    python benchmarks/training_step.py [--shape qwen2.5-1.5b] [--variants NAME ...] [--profile]

A step is ``accumulate`` micro-batches of random tokens, gradient clipping and a fused AdamW on float32 weights. All
variants are the same transformer with the same loss (Liger's fused loss where Liger is installed) under torch.compile
and bfloat16 autocast. They differ in their linear layers only. Before one of our variants is timed, its loss is
compared with the loss of the reference backend on the same weights. ``syncs`` counts the synchronisations of the host
in a step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from common import append, fresh_results, header, need_gpu
from torch import Tensor, nn
from torch.nn import functional as F

from sbn_lightning import SparseTernaryPrecision, TransformerConfig
from sbn_lightning.models.flops import flops_per_token, peak_flops
from sbn_lightning.models.transformer import TernaryTransformer
from sbn_lightning.sparsity.pattern import NMPattern, top_n_mask
from sbn_lightning.sparsity.ternary import expand_scale, weight_scale

SEQUENCE_LENGTH = 2048


class FakeQuantizedLinear(nn.Linear):
    """The layer of the public reference: everything is quantised anew for each micro-batch, the product is BF16."""

    pattern = NMPattern(2, 4)
    split_sizes: tuple[int, ...] | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        gamma = expand_scale(weight_scale(weight, self.split_sizes), self.split_sizes, self.out_features).unsqueeze(-1)
        fake = (weight / gamma).round().clamp(-1, 1) * gamma * top_n_mask(weight, self.pattern)
        scale = 127 / x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-5)
        rounded = (x * scale).round().clamp(-128, 127) / scale
        return F.linear(x + (rounded - x).detach(), weight + (fake - weight).detach(), self.bias)


def dense(config: TransformerConfig) -> TernaryTransformer:
    """Makes the BF16 baseline."""
    return TernaryTransformer(TransformerConfig(**config.to_dict() | {"linear": "dense"}))


def fake_quantized(config: TransformerConfig) -> TernaryTransformer:
    """Makes every linear layer of the blocks a layer of the public reference."""
    model = dense(config)
    for layer in model.blocks.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FakeQuantizedLinear
    return model


def torchao_bitnet(config: TransformerConfig) -> TernaryTransformer:
    """Makes torchao's prototype: ternary weights without sparsity, int8 forward."""
    from torchao.prototype.quantized_training import bitnet_training
    from torchao.quantization import quantize_

    model = dense(config)
    quantize_(model.blocks, bitnet_training())
    return model


def ternary(config: TransformerConfig, pattern: str) -> TernaryTransformer:
    """Makes our model."""
    return TernaryTransformer(TransformerConfig(**config.to_dict() | {"pattern": pattern}))


def masked(config: TransformerConfig) -> TernaryTransformer:
    """Makes 2:4 weights in BF16, not quantised."""
    return TernaryTransformer(TransformerConfig(**config.to_dict() | {"linear": "masked", "pattern": "2:4"}))


Build = Callable[[TransformerConfig], TernaryTransformer]
VARIANTS: dict[str, tuple[Build, dict[str, str] | None]] = {
    "bf16 dense": (dense, None),
    "bf16 2:4 masked": (masked, None),
    "fake quantised 2:4": (fake_quantized, None),
    "fake quantised 2:4, eager": (fake_quantized, None),
    "torchao BitNet, dense ternary": (torchao_bitnet, None),
    "ours 2:4": (partial(ternary, pattern="2:4"), {"backend": "sparse"}),
    "ours 2:4, int8 gradients": (partial(ternary, pattern="2:4"), {"backend": "sparse", "gradients": "int8"}),
    "ours 6:8": (partial(ternary, pattern="6:8"), {"backend": "int8"}),
    "ours 6:8, int8 gradients": (partial(ternary, pattern="6:8"), {"backend": "int8", "gradients": "int8"}),
}


def groups_of(model: nn.Module) -> list[dict[str, object]]:
    """Groups parameters as ``SparseBitNet`` does: matrices decay, the rest does not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


class Step:
    """Runs the optimiser step of one variant repeatedly."""

    def __init__(self, name: str, config: TransformerConfig, sequences: int, accumulate: int) -> None:
        build, options = VARIANTS[name]
        torch.manual_seed(0)
        with torch.device("cuda"):
            self.model = build(config)
        self.plugin = None if options is None else SparseTernaryPrecision(**options)  # type: ignore[arg-type]
        shape = (accumulate, sequences, SEQUENCE_LENGTH + 1)
        self.batches = torch.randint(config.vocab_size, shape, device="cuda").unbind()
        if self.plugin is not None:
            self._verify(name)
            self.plugin.convert_module(self.model)
        if not name.endswith("eager"):
            self.model.compile_blocks()
        self.optimizer = torch.optim.AdamW(groups_of(self.model), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def _verify(self, name: str) -> None:
        """Compares the loss with that of the reference backend; bfloat16 rounds on the way through the model."""
        batch = self.batches[0][:1]
        plugin = SparseTernaryPrecision(self.plugin.backend)  # type: ignore[union-attr]
        plugin.convert_module(self.model)
        losses = []
        for context in (torch.autocast("cuda", torch.bfloat16), plugin.forward_context()):
            with torch.no_grad(), context:
                losses.append(float(self.model.loss(batch[:, :-1], batch[:, 1:])))
        plugin.teardown()
        if not abs(losses[0] - losses[1]) < 2e-3 * losses[0]:
            raise AssertionError(f"{name}: loss {losses[1]} instead of {losses[0]}")

    def context(self) -> AbstractContextManager[None]:
        """Returns autocast, or the context of the plugin."""
        return torch.autocast("cuda", torch.bfloat16) if self.plugin is None else self.plugin.forward_context()

    def __call__(self) -> None:
        for batch in self.batches:
            with self.context():
                loss = self.model.loss(batch[:, :-1], batch[:, 1:])
            (loss / len(self.batches)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextmanager
def counted_syncs() -> Iterator[list[int]]:
    """Counts the host's waits for the GPU."""
    counts = [0]
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield counts
    torch.cuda.set_sync_debug_mode("default")
    counts[0] = sum("synchronizing" in str(warning.message) for warning in caught)


# Parts of a step by the names of kernels; the first match counts.
PARTS = (
    ("optimiser", ("multi_tensor", "fused_adam", "foreach", "lpnorm")),
    ("preparation", ("prepare_kernel", "row_sums", "gamma_kernel", "mask_kernel", "pack_transposed")),
    ("gradient quantisation", ("quantize_gradient", "gradient_maxima", "gradient_scales", "transpose_kernel")),
    ("token quantisation", ("quantize_rows", "quantize_long", "dequantize")),
    ("sparse and ternary GEMM", ("ternary_gemm", "add_splits", "decode_kernel")),
    ("int8 GEMM", ("int8_gemm", "int8_outer", "add_parts")),
    ("attention", ("flash", "fmha", "attention", "cudnn")),
    ("head and loss", ("liger", "cross_entropy", "softmax", "nll_loss")),
    ("bf16 GEMM", ("nvjet", "gemm", "cutlass", "xmma")),
    ("fused elementwise", ("triton_",)),
    ("copies and fills", ("memcpy", "memset", "copy_kernel", "fill", "cat")),
)


def profile(step: Callable[[], None], top: int = 12) -> None:
    """Prints the GPU time of a step by part, with the kernels that take most of it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - start)
    parts: dict[str, float] = {}
    kernels: dict[str, float] = {}
    for event in found.events() or []:
        # The annotation of an optimiser spans kernels that are listed separately.
        if event.device_type != torch.autograd.DeviceType.CUDA or event.name.startswith("Optimizer.step"):
            continue
        ms = event.self_device_time_total / 1e3
        lowered = event.name.lower()
        part = next((part for part, words in PARTS if any(word in lowered for word in words)), "other")
        parts[part] = parts.get(part, 0.0) + ms
        kernels[event.name] = kernels.get(event.name, 0.0) + ms
    busy = sum(parts.values())
    print(f"  wall {wall:.1f} ms (under the profiler), kernels {busy:.1f} ms")
    for part, ms in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"    {part:26s} {ms:8.2f} ms  {100 * ms / busy:5.1f} %")
    for name, ms in sorted(kernels.items(), key=lambda item: -item[1])[:top]:
        print(f"      {ms:8.2f} ms  {name[:110]}")


def measure(path: Path, name: str, args: argparse.Namespace, base: dict[str, float]) -> None:
    """Times one variant; ``base`` holds the time of the BF16 dense model for the variants after it."""
    changes = {"n_layers": args.layers} if args.layers else {}
    changes |= {"max_sequence_length": SEQUENCE_LENGTH, "activation_checkpointing": args.checkpointing}
    config = TransformerConfig.preset(args.shape, **changes)
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step = Step(name, config, args.sequences, args.accumulate)
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    setup = time.perf_counter() - started
    with counted_syncs() as syncs:
        step()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(args.steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    ms = statistics.median(a.elapsed_time(b) for a, b in pairwise(events))
    tokens = args.sequences * args.accumulate * SEQUENCE_LENGTH
    peak = peak_flops(torch.device("cuda"))
    worth = flops_per_token(step.model, SEQUENCE_LENGTH) * tokens / (ms / 1e3)
    row: dict[str, object] = {"shape": args.shape, "tokens_per_step": tokens, "micro_batch": args.sequences}
    row |= {"checkpointing": args.checkpointing, "variant": name, "ms": ms, "tokens_per_s": 1e3 * tokens / ms}
    row |= {"vs_bf16": base.setdefault("ms", ms) / ms if name == "bf16 dense" or base else ""}
    row |= {"mfu": worth / peak if peak else float("nan"), "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    row |= {"syncs": syncs[0], "setup_s": setup}
    append(path, row)
    if args.profile:
        profile(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-1.5b")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--layers", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--sequences", type=int, default=8, help="sequences of 2,048 tokens in a micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches in a step")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--profile", action="store_true", help="also print where the time of one step goes")
    parser.add_argument("--append", action="store_true", help="keep the rows that the CSV has")
    args = parser.parse_args()
    need_gpu()
    torch.set_float32_matmul_precision("high")
    path = fresh_results("training_step", keep=args.append)
    print(header())
    base: dict[str, float] = {}
    for name in args.variants:
        try:
            measure(path, name, args, base)
        except (ImportError, torch.OutOfMemoryError) as error:
            print(f"{name}: not measured: {str(error).splitlines()[0]}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()


if __name__ == "__main__":
    main()
