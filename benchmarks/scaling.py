"""Several GPUs of one host: training steps under DDP and FSDP2 against one GPU, and whether all ranks hold one mask.

    python benchmarks/scaling.py [--shapes qwen2.5-0.5b qwen2.5-3b] [--devices 2] [--strategies one ddp]

The link is measured first: all-reduces of 1 GiB over NCCL. ``link_gb_per_s`` is their bus bandwidth, 2 (n - 1) / n of
the bytes of one all-reduce over its time. Each run is a process tree of its own; runs on one GPU run side by side on
different GPUs. A run is ``Trainer`` with ``SparseBitNet`` (2:4, blocks compiled), the precision plugin, clipping and a
fused AdamW, as in a recipe, on random tokens. ``fsdp2 packed`` sends packed weights between GPUs, ``fsdp2 latent``
latent weights; names with ``bf16`` train the dense model in bfloat16. Every GPU gets as many tokens as the single GPU,
so ``scaling`` is the tokens a second of all GPUs over those of one GPU times their number. ``scaling`` is empty if
there is no run on one GPU. ``same_masks`` compares a digest of every layer's mask on every rank after the last step; a
run whose ranks differ is an error. Rows are written as they are measured. Progress, with the seconds since the start,
goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from common import append, fresh_results, header, need_gpu
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader

from sbn_lightning import SparseBitNet, SparseTernaryPrecision, TransformerConfig
from sbn_lightning.distributed.sharding import shard
from sbn_lightning.distributed.strategies import ShardedStrategy
from sbn_lightning.layers.sparse_linear import masked_layers

LENGTH = 2048
WARM_STEPS = 3
STRATEGIES = ("one", "ddp", "fsdp2 packed", "fsdp2 latent", "bf16 one", "bf16 ddp", "bf16 fsdp2")
# Shape -> sequences of a micro-batch of one GPU, micro-batches of a step: 32,768 tokens, as in training_step.py.
BATCHES = {"qwen2.5-0.5b": (8, 2), "qwen2.5-1.5b": (8, 2), "qwen2.5-3b": (4, 4)}
LINK_BYTES = 2**30
COLUMNS = ("shape", "strategy", "gpus", "gradients", "sequences", "accumulate", "ms", "tokens_per_s", "scaling")
COLUMNS += ("peak_gib", "same_masks", "link_gb_per_s")
KEY = COLUMNS[:6]

Say = Callable[[str], None]


def say(name: str, started: float, text: str) -> None:
    """Prints a line of progress to stderr, because the parent reads stdout."""
    print(f"[{time.time() - started:5.1f} s] {name}: {text}", file=sys.stderr, flush=True)


class Clock(Callback):
    """Time of each optimiser step, by events on the GPU; and whether the ranks' masks are the same at the end.

    Rank 0 prints the result as a line of JSON. Then every process ends, without the teardown of ``Trainer``, which
    moves weights and optimiser states to the CPU: 30 to 40 seconds at 3B.

    Args:
        say: Prints progress.
    """

    def __init__(self, say: Say) -> None:
        self.say = say
        self.events: list[torch.cuda.Event] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # type: ignore[override]
        if trainer.global_step > len(self.events):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)
            if len(self.events) == 1 and trainer.is_global_zero:
                torch.cuda.synchronize()  # in a warm-up step, so that the timed steps do not wait
                self.say("first step done")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.cuda.synchronize()
        if trainer.is_global_zero:
            self.say(f"all {len(self.events)} steps done")
        masks = sha256()
        for _, layer in masked_layers(pl_module):
            masks.update(layer.packed_mask().cpu().numpy().tobytes())
        digests: list[str | None] = [masks.hexdigest()]
        if dist.is_initialized():
            digests *= dist.get_world_size()
            dist.all_gather_object(digests, masks.hexdigest())
        if trainer.is_global_zero:
            found = {"ms": self.milliseconds(), "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
            print(json.dumps(found | {"same_masks": len(set(digests)) == 1}), flush=True)
        trainer.strategy.barrier()
        os._exit(0)

    def milliseconds(self) -> float:
        """Returns the median time of a step, after all steps have ended."""
        return statistics.median(a.elapsed_time(b) for a, b in pairwise(self.events[WARM_STEPS - 1 :]))


def strategy_of(name: str, devices: int) -> Any:
    """A strategy for ``Trainer``."""
    if name.endswith("one"):
        return "auto"
    if name.endswith("ddp"):
        return DDPStrategy(gradient_as_bucket_view=True)
    return ShardedStrategy("bfloat16", gather="latent" if name == "fsdp2 latent" else "packed_step")


class Dense(SparseBitNet):
    """The baseline in its best form: under FSDP2 parameters are gathered, and gradients reduced, in bfloat16."""

    def configure_model(self) -> None:
        if not self.model.is_compiled:
            self.model.compile_blocks()
        if self.device_mesh is not None:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
            shard(self.model, self.model.blocks, self.device_mesh, methods=("loss",), policy=policy)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Lightning's bf16-mixed clips no gradients before a fused optimiser.
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)


def run(shape: str, strategy: str, devices: int, args: argparse.Namespace) -> None:
    """Runs one process of one run, to the last step."""
    torch.set_float32_matmul_precision("high")
    dense = strategy.startswith("bf16")
    linear = "dense" if dense else "ternary"
    config = TransformerConfig.preset(shape, max_sequence_length=LENGTH, pattern="2:4", linear=linear)
    optimizer = partial(torch.optim.AdamW, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    torch.manual_seed(0)
    # on the GPU, because drawing 3 billion numbers on a CPU takes too long
    with torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))):
        module = (Dense if dense else SparseBitNet)(config, optimizer, schedule="constant", compile=True)
    tokens = torch.randint(
        config.vocab_size, ((WARM_STEPS + args.steps) * args.accumulate * args.sequences, LENGTH + 1)
    )
    clock = Clock(partial(say, f"{shape} {strategy}", args.started))
    precision = (
        {"precision": "bf16-mixed"} if dense else {"plugins": [SparseTernaryPrecision("sparse", args.gradients)]}
    )
    trainer = Trainer(
        accelerator="gpu", devices=devices, strategy=strategy_of(strategy, devices), callbacks=[clock], max_epochs=1,
        **precision, accumulate_grad_batches=args.accumulate, gradient_clip_val=None if dense else 1.0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, logger=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(tokens, batch_size=args.sequences, pin_memory=True))  # type: ignore[arg-type]


def link(devices: int) -> None:
    """One process of the link's measurement; rank 0 prints the result as a line of JSON.

    Raises:
        AssertionError: If a sum is wrong.
    """
    fabric = Fabric(accelerator="gpu", devices=devices, strategy="ddp")
    fabric.launch()
    warm, timed = 2, 5
    x = torch.ones(LINK_BYTES // 4, device=fabric.device)
    seconds = []
    for _ in range(warm + timed):
        torch.cuda.synchronize()
        start = time.perf_counter()
        dist.all_reduce(x)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if not bool((x == devices ** (warm + timed)).all()):
        raise AssertionError("an all-reduce of ones gave another sum than the number of ranks")
    if fabric.is_global_zero:
        rate = 2 * (devices - 1) / devices * LINK_BYTES / statistics.median(seconds[warm:])
        print(json.dumps({"link_gb_per_s": 1e-9 * rate}), flush=True)
    dist.destroy_process_group()


def child(name: str, options: list[str], args: argparse.Namespace, gpu: int | None = None) -> dict[str, Any] | None:
    """Runs this file with ``options``, on all GPUs or on one; returns its line of JSON, or None if it fails."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(args.devices)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu]
    say(name, args.started, "starts")
    command = [sys.executable, __file__, *options, "--started", str(args.started)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        say(name, args.started, f"not measured, exit status {done.returncode}")
        return None
    found: dict[str, Any] = json.loads(lines[-1])
    return found


class Table:
    """Rows as they come.

    Args:
        path: The CSV.
        args: The command line's.
        link: GB a second between GPUs, if measured.
    """

    def __init__(self, path: Path, args: argparse.Namespace, link: float | None) -> None:
        self.path = path
        self.args = args
        self.link = link
        self.alone: dict[tuple[str, bool], float] = {}  # tokens a second of one GPU, by shape and kind of model
        self.missing: list[str] = []

    def batch(self, shape: str) -> tuple[int, int]:
        """Returns the sequences of a micro-batch and the micro-batches of a step."""
        sequences, accumulate = BATCHES[shape]
        return self.args.sequences or sequences, self.args.accumulate or accumulate

    def measure(self, shape: str, strategy: str, gpu: int | None = None) -> dict[str, Any] | None:
        """Runs :func:`run` in separate processes."""
        sequences, accumulate = self.batch(shape)
        numbers = {"--sequences": sequences, "--accumulate": accumulate, "--steps": self.args.steps}
        numbers["--devices"] = 1 if strategy.endswith("one") else self.args.devices
        options = ["--run", strategy, "--shapes", shape, "--gradients", self.args.gradients]
        options += [text for name, number in numbers.items() for text in (name, str(number))]
        return child(f"{shape} {strategy}", options, self.args, gpu)

    def add(self, shape: str, strategy: str, found: dict[str, Any] | None) -> None:
        """Writes a row.

        Raises:
            AssertionError: If ranks hold different masks.
        """
        if found is None:
            self.missing.append(f"{shape} {strategy}")
            return
        if not found["same_masks"]:
            raise AssertionError(f"{shape} {strategy}: ranks hold different masks")
        gpus = 1 if strategy.endswith("one") else self.args.devices
        alone = (shape, strategy.startswith("bf16"))
        sequences, accumulate = self.batch(shape)
        rate = gpus * accumulate * sequences * LENGTH / (found["ms"] / 1e3)
        if gpus == 1:
            self.alone[alone] = rate
        scaling = rate / (gpus * self.alone[alone]) if alone in self.alone else ""
        between = self.link if gpus > 1 and self.link is not None else ""
        values = (shape, strategy, gpus, self.args.gradients, sequences, accumulate, found["ms"], rate, scaling)
        values += (found["peak_gib"], found["same_masks"], between)
        append(self.path, dict(zip(COLUMNS, values, strict=True)), KEY)

    def add_singles(self, cells: list[tuple[str, str]]) -> None:
        """Runs on one GPU, side by side on as many as there are; each a shape and a strategy."""
        free: SimpleQueue[int] = SimpleQueue()
        for gpu in range(self.args.devices):
            free.put(gpu)

        def on_a_free_one(cell: tuple[str, str]) -> dict[str, Any] | None:
            gpu = free.get()
            try:
                return self.measure(*cell, gpu)
            finally:
                free.put(gpu)

        with ThreadPoolExecutor(self.args.devices) as pool:
            running = {pool.submit(on_a_free_one, cell): cell for cell in cells}
            for future in as_completed(running):
                self.add(*running[future], future.result())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen2.5-0.5b", "qwen2.5-3b"], choices=list(BATCHES))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--gradients", choices=["bf16", "int8"], default="bf16")
    parser.add_argument("--sequences", type=int, help="sequences of 2,048 tokens in a GPU's micro-batch: 8; 4 at 3B")
    parser.add_argument("--accumulate", type=int, help="micro-batches in a step: 2; 4 at 3B")
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed")
    parser.add_argument("--no_link", action="store_true", help="do not measure all-reduces")
    parser.add_argument("--append", action="store_true", help="keep the CSV's rows but those measured anew")
    parser.add_argument("--run", choices=["link", *STRATEGIES], help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    need_gpu()
    if args.run == "link":
        link(args.devices)
        return
    if args.run:
        run(args.shapes[0], args.run, args.devices, args)
        return
    if torch.cuda.device_count() < args.devices:
        sys.exit(f"{torch.cuda.device_count()} GPUs are visible, {args.devices} asked for")
    path = fresh_results("scaling", args.append, COLUMNS)
    print(header(), flush=True)
    several = [name for name in STRATEGIES if name in args.strategies and not name.endswith("one")]
    between = None
    if several and args.devices > 1 and not args.no_link:
        found = child("link", ["--run", "link", "--devices", str(args.devices)], args)
        between = found and found["link_gb_per_s"]
        if between:
            print(f"all-reduce of 1 GiB over {args.devices} GPUs: {between:.1f} GB/s of bus bandwidth", flush=True)
    table = Table(path, args, between)
    table.add_singles([(shape, name) for shape in args.shapes for name in args.strategies if name.endswith("one")])
    for shape in args.shapes:
        for strategy in several:
            table.add(shape, strategy, table.measure(shape, strategy))
    if table.missing:
        sys.exit(f"not measured: {', '.join(table.missing)}")


if __name__ == "__main__":
    main()
