"""Several GPUs of one host: training steps under DDP and FSDP2 against one GPU, and whether all ranks hold one mask.

    python kernels/benchmarks/scaling.py [--shapes qwen2.5-0.5b qwen2.5-3b] [--devices 2] [--gradients bf16]

Each run is a process tree of its own, those on one GPU side by side on different ones: ``Trainer`` with
``SparseBitNet`` (2:4, blocks compiled), the precision plugin, clipping and a fused AdamW, as a recipe has it, on random
tokens. Every GPU gets as many tokens as the one alone, so ``scaling`` is the tokens a second of all GPUs over those of
one times their number. ``same_masks`` compares a digest of every layer's mask on every rank after the last step; a run
where they differ is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from itertools import pairwise
from typing import Any

import torch
from common import append, fresh_results, header, need_gpu
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed as dist
from torch.utils.data import DataLoader

from sbn_lightning import SparseBitNet, SparseTernaryPrecision, TransformerConfig
from sbn_lightning.layers import masked_layers

LENGTH = 2048
WARM_STEPS = 3
STRATEGIES = ("ddp", "fsdp2")


class Clock(Callback):
    """Time of each optimiser step, by events on the GPU; and whether the ranks' masks are the same at the end."""

    def __init__(self) -> None:
        self.events: list[torch.cuda.Event] = []
        self.same_masks = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # type: ignore[override]
        if trainer.global_step > len(self.events):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        masks = sha256()
        for _, layer in masked_layers(pl_module):
            masks.update(layer.packed_mask().cpu().numpy().tobytes())
        digests: list[str | None] = [masks.hexdigest()]
        if dist.is_initialized():
            digests *= dist.get_world_size()
            dist.all_gather_object(digests, masks.hexdigest())
        self.same_masks = len(set(digests)) == 1

    def milliseconds(self) -> float:
        """Median time of a step."""
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in pairwise(self.events[WARM_STEPS - 1 :]))


def run(shape: str, strategy: str, devices: int, args: argparse.Namespace) -> None:
    """One process of one run; rank 0 prints the result as a line of JSON."""
    torch.set_float32_matmul_precision("high")
    config = TransformerConfig.preset(shape, max_sequence_length=LENGTH, pattern="2:4")
    optimizer = partial(torch.optim.AdamW, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    torch.manual_seed(0)
    with torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))):  # drawing 3 billion numbers on a CPU takes long
        module = SparseBitNet(config, optimizer, schedule="constant", compile=True)
    tokens = torch.randint(
        config.vocab_size, ((WARM_STEPS + args.steps) * args.accumulate * args.sequences, LENGTH + 1)
    )
    clock = Clock()
    made: dict[str, Any] = {
        "one": lambda: "auto",
        "ddp": partial(DDPStrategy, gradient_as_bucket_view=True),
        "fsdp2": partial(ModelParallelStrategy, data_parallel_size=devices, tensor_parallel_size=1),
    }
    trainer = Trainer(
        accelerator="gpu", devices=devices, strategy=made[strategy](), callbacks=[clock], max_epochs=1, logger=False,
        plugins=[SparseTernaryPrecision("sparse", args.gradients)], accumulate_grad_batches=args.accumulate,
        gradient_clip_val=1.0, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(tokens, batch_size=args.sequences, pin_memory=True))  # type: ignore[arg-type]
    if trainer.is_global_zero:
        ms, peak = clock.milliseconds(), torch.cuda.max_memory_allocated() / 2**30
        print(json.dumps({"ms": ms, "peak_gib": peak, "same_masks": clock.same_masks}), flush=True)


def measure(
    shape: str, strategy: str, devices: int, args: argparse.Namespace, gpu: int | None = None
) -> dict[str, Any] | None:
    """Runs :func:`run` in processes of its own, on all GPUs or the one named; says so if it fails."""
    command = [sys.executable, __file__, "--shapes", shape, "--gradients", args.gradients, "--steps", str(args.steps)]
    command += ["--sequences", str(args.sequences), "--accumulate", str(args.accumulate)]
    command += ["--devices", str(devices), "--run", strategy]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(args.devices)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        print(f"{shape} {strategy}: not measured:\n{done.stderr[-2000:]}", flush=True)
        return None
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen2.5-0.5b", "qwen2.5-3b"])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--gradients", choices=["bf16", "int8"], default="bf16")
    parser.add_argument("--sequences", type=int, default=8, help="sequences of 2,048 tokens in a GPU's micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches in a step")
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed")
    parser.add_argument("--run", choices=["one", *STRATEGIES], help=argparse.SUPPRESS)
    args = parser.parse_args()
    need_gpu()
    if args.run:
        run(args.shapes[0], args.run, args.devices, args)
        return
    if torch.cuda.device_count() < args.devices:
        sys.exit(f"{torch.cuda.device_count()} GPUs are visible, {args.devices} asked for")
    path = fresh_results("scaling")
    print(header())

    def one_after_the_other(gpu: int) -> dict[str, dict[str, Any] | None]:
        return {shape: measure(shape, "one", 1, args, gpu) for shape in args.shapes[gpu :: args.devices]}

    single: dict[str, dict[str, Any] | None] = {}
    with ThreadPoolExecutor(args.devices) as pool:
        for found_there in pool.map(one_after_the_other, range(args.devices)):
            single |= found_there
    for shape in args.shapes:
        alone = None
        for strategy, devices in (("one", 1), *((name, args.devices) for name in STRATEGIES)):
            found = single[shape] if strategy == "one" else measure(shape, strategy, devices, args)
            if found is None:
                continue
            if not found["same_masks"]:
                raise AssertionError(f"{shape} {strategy}: ranks hold different masks")
            rate = devices * args.accumulate * args.sequences * LENGTH / (found["ms"] / 1e3)
            alone = rate if strategy == "one" else alone
            row: dict[str, object] = {
                "shape": shape,
                "strategy": strategy,
                "gpus": devices,
                "gradients": args.gradients,
            }
            row |= {"ms": found["ms"], "tokens_per_s": rate, "scaling": rate / (devices * alone) if alone else ""}
            append(path, row | {"peak_gib": found["peak_gib"], "same_masks": found["same_masks"]})


if __name__ == "__main__":
    main()
