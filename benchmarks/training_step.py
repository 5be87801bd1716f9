"""Whole optimiser steps: tokens a second, peak memory and model-FLOPs utilisation of a Qwen2.5 shape.

    python benchmarks/training_step.py [--shape qwen2.5-1.5b] [--variants NAME ...] [--memory] [--trainer] [--profile]

A step is ``accumulate`` micro-batches of random tokens, gradient clipping and a fused AdamW on float32 weights. All
variants are the same transformer with the same loss (Liger's fused loss where Liger is installed) under torch.compile
and bfloat16 autocast. They differ in their linear layers only. Before one of our variants is timed, its loss is
compared with the loss of the reference backend on the same weights. ``syncs`` counts the synchronisations of the host
in a step.

``--shape`` also takes the blocks of Llama-3-8B, four of them, and a public 1.1B model of ``transformers``
(``step_variants.py``). ``--memory`` writes the memory by part (``step_memory.py``) to ``training_memory.csv``.
``--trainer`` measures each variant through Lightning's Trainer as well, with the same batches. ``--graphs`` measures
each variant a second time with forward and backward replayed as CUDA graphs (``model.cuda_graphs``). ``--optimizer``
takes another optimiser, for example one of a library whose states have 8 bits.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import append, fresh_results, header, need_gpu
from step_memory import memory_by_part
from step_variants import SHAPES, VARIANTS, FakeQuantizedLinear, make_config
from torch import Tensor, nn

from sbn_lightning import SparseTernaryPrecision
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models.flops import flops_per_token, peak_flops
from sbn_lightning.training.graphs import GraphedLoss

__all__ = ["FakeQuantizedLinear"]  # loss_curves.py takes the layer from here

SEQUENCE_LENGTH = 2048
DEVICE = torch.device("cuda")


def groups_of(model: nn.Module) -> list[dict[str, object]]:
    """Groups parameters as ``SparseBitNet`` does: matrices decay, the rest does not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def optimizer_of(model: nn.Module, path: str | None = None) -> torch.optim.Optimizer:
    """The optimiser of every variant: one fused kernel for all parameters; or the class that ``path`` names."""
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95)}
    if path is None:
        return torch.optim.AdamW(groups_of(model), **options, fused=True)
    module, _, name = path.rpartition(".")
    made: torch.optim.Optimizer = getattr(import_module(module), name)(groups_of(model), **options)
    return made


class Step:
    """Runs the optimiser step of one variant repeatedly."""

    def __init__(self, name: str, args: argparse.Namespace, graphs: bool = False) -> None:
        self.graphed = GraphedLoss() if graphs else None
        build, options = VARIANTS[name]
        config = make_config(args.shape, SEQUENCE_LENGTH, args.checkpointing, args.layers)
        torch.manual_seed(0)
        with DEVICE:
            self.model = build(config, args.layers)
        if graphs and config is None:
            self.model.make_no_mask()
        tokens = args.sequences * SEQUENCE_LENGTH
        self.plugin = None if options is None else SparseTernaryPrecision(**options, tokens=tokens)  # type: ignore[arg-type]
        shape = (args.accumulate, args.sequences, SEQUENCE_LENGTH + 1)
        vocabulary = self.model.vocab_size if config is None else config.vocab_size
        self.batches = torch.randint(vocabulary, shape, device=DEVICE).unbind()
        if self.plugin is not None:
            self._verify(name)
            self.plugin.convert_module(self.model)
        if not name.endswith("eager"):
            self.model.compile_blocks()
        self.optimizer = optimizer_of(self.model, args.optimizer)

    def _verify(self, name: str) -> None:
        """Compares the loss with that of the reference backend; bfloat16 rounds on the way through the model."""
        batch = self.batches[0][:1]
        plugin = SparseTernaryPrecision(self.plugin.backend)  # type: ignore[union-attr]
        plugin.convert_module(self.model)
        losses = []
        for context in (torch.autocast(DEVICE.type, torch.bfloat16), plugin.forward_context()):
            with torch.no_grad(), context:
                losses.append(float(self.loss(batch)))
        plugin.teardown()
        if not abs(losses[0] - losses[1]) < 2e-3 * losses[0]:
            raise AssertionError(f"{name}: loss {losses[1]} instead of {losses[0]}")

    def context(self) -> AbstractContextManager[None]:
        """Returns autocast, or the context of the plugin."""
        return torch.autocast(DEVICE.type, torch.bfloat16) if self.plugin is None else self.plugin.forward_context()

    def loss(self, batch: Tensor) -> Tensor:
        """The loss of a micro-batch."""
        found: Tensor = self.model.loss(batch[:, :-1], batch[:, 1:])
        return found

    def forward(self) -> Tensor:
        """The loss of the first micro-batch under the precision of the variant."""
        with self.context():
            return self.loss(self.batches[0])

    def __call__(self) -> None:
        for batch in self.batches:
            with self.context():
                loss = self.loss(batch) if self.graphed is None else self.graphed(self.model, self.loss, batch)
            (loss / len(self.batches)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextmanager
def counted_syncs() -> Iterator[list[int]]:
    """Counts the host's waits for the GPU."""
    counts = [0]
    if DEVICE.type != "cuda":
        yield counts
        return
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield counts
    torch.cuda.set_sync_debug_mode("default")
    counts[0] = sum("synchronizing" in str(warning.message) for warning in caught)


# Parts of a step by the names of kernels; the first match counts.
PARTS = (
    ("fused elementwise", ("triton_",)),  # The compiler names its kernels after all operations around them.
    ("optimiser", ("multi_tensor", "fused_adam", "foreach", "lpnorm")),
    ("preparation", ("prepare_kernel", "row_sums", "gamma_kernel", "mask_kernel", "pack_transposed")),
    ("gradient quantisation", ("quantize_gradient", "gradient_maxima", "gradient_scales", "transpose_kernel")),
    ("token quantisation", ("quantize_rows", "quantize_long", "dequantize")),
    ("sparse and ternary GEMM", ("ternary_gemm", "add_splits", "decode_kernel")),
    ("int8 GEMM", ("int8_gemm", "int8_outer", "add_parts")),
    ("attention", ("flash", "fmha", "attention", "cudnn")),
    ("head and loss", ("liger", "cross_entropy", "softmax", "nll_loss")),
    ("bf16 GEMM", ("nvjet", "gemm", "cutlass", "xmma")),
    ("copies and fills", ("memcpy", "memset", "copy_kernel", "fill", "cat")),
)


def profile(step: Callable[[], None], top: int = 40) -> None:
    """Prints the GPU time of a step by part, with the kernels that take most of it and how often each one ran."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - start)
    parts: dict[str, float] = {}
    kernels: dict[str, list[float]] = {}
    for event in found.events() or []:
        # The annotation of an optimiser spans kernels that are listed separately.
        if event.device_type != torch.autograd.DeviceType.CUDA or event.name.startswith("Optimizer.step"):
            continue
        ms = event.self_device_time_total / 1e3
        lowered = event.name.lower()
        part = next((part for part, words in PARTS if any(word in lowered for word in words)), "other")
        parts[part] = parts.get(part, 0.0) + ms
        kernels.setdefault(f"{part}: {event.name}", []).append(ms)
    busy = sum(parts.values())
    print(f"  wall {wall:.1f} ms (under the profiler), kernels {busy:.1f} ms")
    for part, ms in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"    {part:26s} {ms:8.2f} ms  {100 * ms / busy:5.1f} %")
    for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:top]:
        print(f"      {sum(times):8.2f} ms {len(times):6d} calls  {name[:150]}")


def peak_bytes() -> float:
    """The peak of GPU memory since it was reset; 0 without a GPU."""
    return float(torch.cuda.max_memory_allocated()) if DEVICE.type == "cuda" else 0.0


def through_trainer(step: Step, steps: int, optimizer: str | None = None) -> list[float]:
    """The milliseconds of each optimiser step of Lightning's Trainer on the same model, batches and optimiser.

    Three steps come first, as in the bare loop. A step is timed from its end to the end of the next one.
    """
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.plugins import MixedPrecision, Precision
    from lightning.pytorch.strategies import SingleDeviceStrategy

    events: list[torch.cuda.Event] = []

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = step.model

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return step.loss(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.inner, optimizer)

    class Stays(SingleDeviceStrategy):
        def teardown(self) -> None:
            """At the end a Trainer moves model and optimiser to the CPU: half a minute for 1.5B, and not timed."""

    class Clock(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *rest: object) -> None:
            if (rest[-1] + 1) % len(step.batches) == 0:  # type: ignore[operator]
                events.append(torch.cuda.Event(enable_timing=True))
                events[-1].record()

    class Autocast(MixedPrecision):
        clip_gradients = Precision.clip_gradients  # MixedPrecision refuses fused optimisers, for the sake of float16.

    strategy = Stays(torch.device(DEVICE.type, 0))
    trainer = Trainer(
        accelerator="gpu" if DEVICE.type == "cuda" else "cpu", devices=1, strategy=strategy, max_steps=steps + 3,
        accumulate_grad_batches=len(step.batches), gradient_clip_val=1.0, callbacks=[Clock()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        plugins=[step.plugin or Autocast("bf16-mixed", DEVICE.type)],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(list(step.batches) * (steps + 3), batch_size=None)
    trainer.fit(Module(), loader)
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in list(pairwise(events))[2:]]


def measure(
    path: Path, name: str, args: argparse.Namespace, base: dict[str, float], graphs: bool = False
) -> None:  # fmt: skip
    """Times one variant; ``base`` holds the time of the BF16 dense model for the variants after it."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step = Step(name, args, graphs)
    name += f", {args.optimizer.rpartition('.')[2]}" if args.optimizer else ""
    name += ", CUDA graphs" if graphs else ""
    for _ in range(3):  # Kernels are compiled, and then the preparation of the weights is recorded.
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
    peak = peak_bytes()
    row_of(path, name, args, base, ms, step, {"peak_gib": peak / 2**30, "syncs": syncs[0], "setup_s": setup})
    if args.memory and not graphs:
        table = path.with_name("training_memory.csv")
        for part, size in memory_by_part(step.model, step.optimizer, step.forward, peak).items():
            row: dict[str, object] = {"shape": args.shape, "micro_batch": args.sequences, "variant": name}
            append(table, row | {"part": part, "gib": size / 2**30})
    if args.profile:
        profile(step)
    if args.trainer and not graphs:
        step.optimizer.zero_grad()
        step.optimizer = None  # type: ignore[assignment]  # its states make room for those of the Trainer's optimiser
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ms = statistics.median(through_trainer(step, args.steps, args.optimizer))
        found = {"peak_gib": peak_bytes() / 2**30, "syncs": "", "setup_s": ""}
        row_of(path, f"{name}, Trainer", args, base, ms, step, found)


def row_of(
    path: Path, name: str, args: argparse.Namespace, base: dict[str, float], ms: float, step: Step,
    found: dict[str, object],
) -> None:  # fmt: skip
    """Writes the row of a variant."""
    tokens = args.sequences * args.accumulate * SEQUENCE_LENGTH
    peak = peak_flops(DEVICE)
    worth = flops_per_token(step.model, SEQUENCE_LENGTH) * tokens / (ms / 1e3)
    row: dict[str, object] = {"shape": args.shape, "tokens_per_step": tokens, "micro_batch": args.sequences}
    row |= {"checkpointing": args.checkpointing, "variant": name, "ms": ms, "tokens_per_s": 1e3 * tokens / ms}
    row |= {"vs_bf16": base.setdefault("ms", ms) / ms if name == "bf16 dense" or base else ""}
    row |= {"mfu": worth / peak if peak else float("nan")}
    append(path, row | found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["qwen2.5-1.5b"], choices=SHAPES, help="one after the other")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--layers", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--sequences", type=int, default=8, help="sequences of 2,048 tokens in a micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches in a step")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--memory", action="store_true", help="also write the memory by part to training_memory.csv")
    parser.add_argument("--trainer", action="store_true", help="also measure each variant through Lightning's Trainer")
    parser.add_argument(
        "--graphs", nargs="?", const="also", choices=("also", "only"),
        help="measure each variant with CUDA graphs, too; only: measure bf16 dense alone without them",
    )  # fmt: skip
    parser.add_argument("--optimizer", help="a class in place of the fused AdamW, as torchao.optim.AdamW8bit")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--profile", action="store_true", help="also print where the time of one step goes")
    parser.add_argument("--append", action="store_true", help="keep the rows that the CSV has")
    args = parser.parse_args()
    need_gpu()
    torch.set_float32_matmul_precision("high")
    path = fresh_results("training_step", keep=args.append)
    if args.memory:
        fresh_results("training_memory", keep=args.append)
    print(header())
    bases: dict[str, dict[str, float]] = {}
    for shape, name, graphs in itertools.product(args.shape, args.variants, (False, True)):
        if (graphs and not args.graphs) or (not graphs and args.graphs == "only" and name != "bf16 dense"):
            continue
        one = argparse.Namespace(**vars(args) | {"shape": shape})
        try:
            measure(path, name, one, bases.setdefault(shape, {}), graphs)
        except (ImportError, torch.OutOfMemoryError, ConfigError) as error:  # A shape or graphs refuse some variants.
            print(f"{name}: not measured: {str(error).splitlines()[0]}", flush=True)
        torch.compiler.reset()  # first, because the compiler's caches hold tensors of the model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
