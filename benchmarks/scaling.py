"""Several GPUs of one host: training steps under DDP and FSDP2 against one GPU, and whether all ranks hold one mask.

    python benchmarks/scaling.py [--shapes qwen2.5-0.5b qwen2.5-3b] [--devices 2] [--strategies one ddp]
    python benchmarks/scaling.py --all [--append]    # every shape, gradients, number of micro-batches and strategy
    python benchmarks/scaling.py --all --budget 400  # as many of these rows as fit into 400 seconds

Rows are measured in the order of their worth, and a row takes some 40 seconds, most of them until the first step.
``--profile`` also prints where the time of one step goes.

The link is measured first: all-reduces of 1 GiB over NCCL. ``link_gb_per_s`` is their bus bandwidth, 2 (n - 1) / n of
the bytes of one all-reduce over its time. Each run has processes of its own, one for each GPU, which are killed after
``--limit`` seconds. Runs on one GPU run side by side on different GPUs. A run is ``Trainer`` with ``SparseBitNet``
(2:4, blocks compiled), the precision plugin, clipping and a fused AdamW, as in a recipe, on random tokens. ``fsdp2
packed`` sends packed weights between GPUs once a step, ``fsdp2 layer`` for each block, ``fsdp2 latent`` latent weights.
``fsdp2 step`` is ``fsdp2 packed`` with gradients sent once a step, which takes 4 bytes a weight.
``ddp`` is the strategy ``sbn_ddp``, and ``ddp bfloat16`` sums its gradients in bfloat16, as the rows of FSDP2 do. ``ddp
lightning`` is Lightning's own strategy. In rows whose names end in ``waiting`` kernels make no room for collectives: a
kernel starts one program for each multiprocessor.
Names with ``bf16`` train the dense model in bfloat16, names with ``float8`` on torchao's float8 tensor cores, under
FSDP2 with its float8 all-gather. Every GPU gets as many tokens as the single GPU, so ``scaling`` is the tokens a second
of all GPUs over those of one GPU times their number. ``scaling`` is empty if there is no run on one GPU. ``same_masks``
compares a digest of every layer's mask on every rank after the last step; a run whose ranks differ gets no row.
``wire_mib`` is what a rank receives in one more step, counted as the collectives run (``wire.py``). Rows are written as
they are measured. Progress, with the seconds since the start, goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from functools import partial
from hashlib import sha256
from itertools import groupby, pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from common import append, fresh_results, header, need_gpu
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from processes import Ranks, wait_for_turn
from sbn_kernels.runtime import sharing
from step_profile import summary, timeline
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from wire import Wire

from sbn_lightning import SparseBitNet, SparseTernaryPrecision, TransformerConfig
from sbn_lightning.distributed.sharding import shard
from sbn_lightning.distributed.strategies import ReplicatedStrategy, ShardedStrategy
from sbn_lightning.layers.sparse_linear import masked_layers

LENGTH = 2048
WARM_STEPS = 3
STRATEGIES = ("one", "bf16 one", "float8 one", "fsdp2 packed", "ddp", "bf16 fsdp2", "bf16 ddp", "float8 fsdp2")
STRATEGIES += ("ddp bfloat16", "float8 ddp", "fsdp2 step", "fsdp2 layer", "fsdp2 latent", "ddp lightning")
# Under all other strategies of FSDP2 the ranks gather latent weights.
GATHERS = {"fsdp2 packed": "packed_step", "fsdp2 step": "packed_step", "fsdp2 layer": "packed_layer"}
WAITING = " waiting"  # The end of the name of a row whose kernels make no room for collectives.
STRATEGIES += tuple(name + WAITING for name in ("fsdp2 packed", "ddp", "ddp bfloat16"))
MICRO_BATCHES = (2, 1, 8)  # of a step, with --all
# Shape -> sequences of a micro-batch of one GPU, micro-batches of a step: 32,768 tokens, as in training_step.py.
BATCHES = {"qwen2.5-1.5b": (8, 2), "qwen2.5-3b": (4, 4), "qwen2.5-0.5b": (8, 2)}
LEAST_SECONDS = 40  # A row is not started if fewer seconds of the budget are left.
LINK_BYTES = 2**30
COLUMNS = ("shape", "strategy", "gpus", "gradients", "sequences", "accumulate", "ms", "tokens_per_s", "scaling")
COLUMNS += ("peak_gib", "wire_mib", "same_masks", "link_gb_per_s")
KEY = COLUMNS[:6]

Say = Callable[[str], None]


def say(name: str, started: float, text: str) -> None:
    """Prints a line of progress to stderr, because the parent reads stdout."""
    print(f"[{time.time() - started:5.1f} s] {name}: {text}", file=sys.stderr, flush=True)


class Clock(Callback):
    """Time of each optimiser step, by events on the GPU; and whether the ranks' masks are the same after them.

    Rank 0 prints the result as a line of JSON when the timed steps are done, and once more with the bytes of the step
    after them. So a failure of what follows loses no time that was measured. At the end every process exits, without
    the teardown of ``Trainer``, which moves weights and optimiser states to the CPU: 30 to 40 seconds at 3B.

    Args:
        say: Prints progress.
        steps: The number of steps, warm-up included, before the step that is profiled and the one that is counted.
        profile: Whether to print on rank 0 where the time of one step goes.
    """

    def __init__(self, say: Say, steps: int, profile: bool) -> None:
        self.say = say
        self.steps = steps
        # The steps at the end that are not timed. The one after the report compiles again, and two are profiled.
        self.more = 4 if profile else 1
        self.events: list[torch.cuda.Event] = []
        self.found: dict[str, Any] = {}
        self.profiler: torch.profiler.profile | None = None
        self.wire: Wire | None = None
        self._counting = ExitStack()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # type: ignore[override]
        if trainer.global_step == self.steps and not self.found:
            self.report(trainer, pl_module)
        if trainer.global_step == self.steps + 1 and self.more == 4 and self.profiler is None:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        if trainer.global_step == self.steps + self.more - 1 and self.wire is None:
            self.wire = self._counting.enter_context(Wire())  # Blocks run uncompiled from here on.

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # type: ignore[override]
        if self.steps >= trainer.global_step > len(self.events):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)
            if len(self.events) == 1 and trainer.is_global_zero:
                torch.cuda.synchronize()  # in a warm-up step, so that the timed steps do not wait
                self.say("first step done")
        if trainer.global_step == self.steps + 3 and self.profiler is not None and self.wire is None:
            torch.cuda.synchronize()
            self.profiler.stop()
            if trainer.is_global_zero:
                self.say(summary(self.profiler.key_averages(), steps=2))
                self.say(timeline(self.profiler.events()))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.say("training starts")

    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what the timed steps took."""
        torch.cuda.synchronize()
        masks = sha256()
        for _, layer in masked_layers(pl_module):
            masks.update(layer.packed_mask().cpu().numpy().tobytes())
        digests: list[str | None] = [masks.hexdigest()]
        if dist.is_initialized():
            digests *= dist.get_world_size()
            dist.all_gather_object(digests, masks.hexdigest())
        milliseconds = statistics.median(a.elapsed_time(b) for a, b in pairwise(self.events[WARM_STEPS - 1 :]))
        self.found = {"ms": milliseconds, "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "wire_mib": ""}
        self.found["same_masks"] = len(set(digests)) == 1
        if trainer.is_global_zero:
            self.say(f"all {len(self.events)} steps done")
            print(json.dumps(self.found), flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counting.close()
        torch.cuda.synchronize()
        if trainer.is_global_zero:
            assert self.wire is not None
            print(json.dumps(self.found | {"wire_mib": self.wire.total / 2**20}), flush=True)
        trainer.strategy.barrier()
        os._exit(0)


def strategy_of(name: str, devices: int) -> Any:
    """A strategy for ``Trainer``."""
    if name.endswith("one"):
        return "auto"
    if name == "ddp lightning":
        return DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False)
    if "ddp" in name:
        return ReplicatedStrategy("bfloat16" if "bfloat16" in name else "float32")
    reduce = "step" if name == "fsdp2 step" else "micro_batch"
    return ShardedStrategy("bfloat16", reduce=reduce, gather=GATHERS.get(name.removesuffix(WAITING), "latent"))  # type: ignore[arg-type]


class Dense(SparseBitNet):
    """The baseline in its best form: under FSDP2 parameters are gathered, and gradients reduced, in bfloat16."""

    float8 = False

    def configure_model(self) -> None:
        if self.float8 and not self.model.is_compiled:
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training

            convert_to_float8_training(
                self.model,
                module_filter_fn=lambda module, name: name != "lm_head",
                config=Float8LinearConfig(enable_fsdp_float8_all_gather=self.device_mesh is not None),
            )
        if not self.model.is_compiled:
            self.model.compile_blocks()
        if self.device_mesh is not None:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
            shard(self.model, self.model.blocks, self.device_mesh, methods=("loss",), policy=policy)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Lightning's bf16-mixed clips no gradients before a fused optimiser.
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.float8 and self.device_mesh is not None:  # One all-reduce for the scales of all weights.
            from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

            precompute_float8_dynamic_scale_for_fsdp(self.model)


def run(shape: str, strategy: str, devices: int, args: argparse.Namespace) -> None:
    """Runs one process of one run, to the last step."""
    torch.set_float32_matmul_precision("high")
    if strategy.endswith(WAITING):
        sharing.LEAST_TILES = 2**30
    dense = strategy.startswith(("bf16", "float8"))
    linear = "dense" if dense else "ternary"
    config = TransformerConfig.preset(shape, max_sequence_length=LENGTH, pattern="2:4", linear=linear)
    optimizer = partial(torch.optim.AdamW, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    torch.manual_seed(0)
    # on the GPU, because drawing 3 billion numbers on a CPU takes too long
    with torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))):
        module = (Dense if dense else SparseBitNet)(config, optimizer, schedule="constant", compile=True)
    if isinstance(module, Dense):
        module.float8 = strategy.startswith("float8")
    steps = WARM_STEPS + args.steps
    accumulate, sequences = args.accumulate[0], args.sequences
    clock = Clock(partial(say, f"{shape} {strategy}", args.started), steps, args.profile)
    tokens = torch.randint(config.vocab_size, ((steps + clock.more) * accumulate * sequences, LENGTH + 1))
    precision = (
        {"precision": "bf16-mixed"} if dense else {"plugins": [SparseTernaryPrecision("sparse", args.gradients[0])]}
    )
    trainer = Trainer(
        accelerator="gpu", devices=devices, strategy=strategy_of(strategy, devices), callbacks=[clock], max_epochs=1,
        **precision, accumulate_grad_batches=accumulate, gradient_clip_val=None if dense else 1.0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, logger=False,
    )  # fmt: skip
    if os.environ.get("LOCAL_RANK", "0") == "0":
        clock.say("model made")
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


def start(name: str, options: list[str], args: argparse.Namespace, ranks: int, gpu: int | None = None) -> Ranks:
    """Starts this file with ``options``, for all GPUs or for one."""
    environment = {}
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(args.devices)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu]
    say(name, args.started, "starts")
    return Ranks([sys.executable, __file__, *options, "--started", str(args.started)], ranks, environment)


def result(name: str, ranks: Ranks, args: argparse.Namespace) -> dict[str, Any] | None:
    """The line of JSON of processes that were started; None if they fail."""
    limit = args.limit if args.budget is None else min(args.limit, args.budget - (time.time() - args.started))
    printed, failure = ranks.finish(limit)
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    if failure or not lines:
        say(name, args.started, f"{'after its measurement' if lines else 'not measured'}: {failure or 'no result'}")
    return json.loads(lines[-1]) if lines else None


class Cell(NamedTuple):
    """What one row measures: a shape, a strategy, a kind of gradients, and the batch of a GPU."""

    shape: str
    strategy: str
    gradients: str
    sequences: int
    accumulate: int


def cells(args: argparse.Namespace) -> list[Cell]:
    """The rows that the command line asks for. Gradients of dense models have one kind."""
    found = []
    for i in range(len(args.accumulate or [None])):
        for shape in args.shapes:
            sequences, count = BATCHES[shape]
            count = args.accumulate[i] if args.accumulate else count
            for gradients in args.gradients:
                for name in args.strategies:
                    dense = name.startswith(("bf16", "float8"))
                    if not dense or gradients == args.gradients[0]:
                        found.append(Cell(shape, name, gradients, args.sequences or sequences, count))
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
        self.alone: dict[tuple[Any, ...], float] = {}  # tokens a second of one GPU, by model and batch
        self.missing: list[str] = []

    def start(self, cell: Cell, gpu: int | None = None) -> Ranks | None:
        """Starts the processes of :func:`run`, unless the budget is spent."""
        if self.args.budget is not None and time.time() - self.args.started > self.args.budget - LEAST_SECONDS:
            return None
        shape, strategy, gradients, sequences, accumulate = cell
        ranks = 1 if strategy.endswith("one") else self.args.devices
        numbers = {"--sequences": sequences, "--accumulate": accumulate, "--steps": self.args.steps, "--devices": ranks}
        options = ["--run", strategy, "--shapes", shape, "--gradients", gradients]
        options += [text for name, number in numbers.items() for text in (name, str(number))]
        if self.args.profile:
            options.append("--profile")
        return start(f"{shape} {strategy}", options, self.args, ranks, gpu)

    def finish(self, cell: Cell, ranks: Ranks | None) -> dict[str, Any] | None:
        """Lets the processes of a cell run, and returns what they measured."""
        return None if ranks is None else result(f"{cell.shape} {cell.strategy}", ranks, self.args)

    def add_all(self, cells: list[Cell]) -> None:
        """Measures cells of one shape and batch: those of one GPU, which ``scaling`` needs, and then the others.

        The processes of the next cell import their modules while those of this one have the GPUs.
        """
        several = [cell for cell in cells if not cell.strategy.endswith("one")]
        coming = self.start(several[0]) if several else None
        self.add_singles([cell for cell in cells if cell.strategy.endswith("one")])
        for i, cell in enumerate(several):
            now, coming = coming, self.start(several[i + 1]) if i + 1 < len(several) else None
            self.add(cell, self.finish(cell, now))

    def add(self, cell: Cell, found: dict[str, Any] | None) -> None:
        """Writes a row, if there is one and the ranks agree."""
        shape, strategy, gradients, sequences, accumulate = cell
        if found is None or not found["same_masks"]:
            why = "" if found is None else ": ranks hold different masks"
            self.missing.append(f"{shape} {strategy}, {gradients} gradients, {accumulate} micro-batches{why}")
            return
        gpus = 1 if strategy.endswith("one") else self.args.devices
        kind = next((kind for kind in ("bf16", "float8") if strategy.startswith(kind)), gradients)
        alone = (shape, kind, sequences, accumulate)
        rate = gpus * accumulate * sequences * LENGTH / (found["ms"] / 1e3)
        if gpus == 1:
            self.alone[alone] = rate
        scaling = rate / (gpus * self.alone[alone]) if alone in self.alone else ""
        between = self.link if gpus > 1 and self.link is not None else ""
        values = (shape, strategy, gpus, gradients, sequences, accumulate, found["ms"], rate, scaling)
        values += (found["peak_gib"], found["wire_mib"], found["same_masks"], between)
        append(self.path, dict(zip(COLUMNS, values, strict=True)), KEY)

    def add_singles(self, cells: list[Cell]) -> None:
        """Runs on one GPU, side by side on as many as there are."""
        free: SimpleQueue[int] = SimpleQueue()
        for gpu in range(self.args.devices):
            free.put(gpu)

        def on_a_free_one(cell: Cell) -> dict[str, Any] | None:
            gpu = free.get()
            try:
                return self.finish(cell, self.start(cell, gpu))
            finally:
                free.put(gpu)

        with ThreadPoolExecutor(self.args.devices) as pool:
            running = {pool.submit(on_a_free_one, cell): cell for cell in cells}
            for future in as_completed(running):
                self.add(running[future], future.result())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen2.5-0.5b", "qwen2.5-3b"], choices=list(BATCHES))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--gradients", nargs="+", choices=["bf16", "int8"], default=["bf16"])
    parser.add_argument("--sequences", type=int, help="sequences of 2,048 tokens in a GPU's micro-batch: 8; 4 at 3B")
    parser.add_argument("--accumulate", type=int, nargs="+", help="micro-batches in a step: 2; 4 at 3B")
    parser.add_argument(
        "--all", action="store_true", help="every shape, gradients, strategy, and 1, 2, 8 micro-batches"
    )
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed")
    parser.add_argument("--limit", type=float, default=150, help="seconds after which a run is killed")
    parser.add_argument("--budget", type=float, help="seconds in all; rows that do not fit are left out")
    parser.add_argument("--profile", action="store_true", help="print where the time of one step of each run goes")
    parser.add_argument("--no_link", action="store_true", help="do not measure all-reduces")
    parser.add_argument("--append", action="store_true", help="keep the CSV's rows but those measured anew")
    parser.add_argument("--run", choices=["link", *STRATEGIES], help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.all:
        args.shapes, args.strategies, args.gradients = list(BATCHES), list(STRATEGIES), ["int8", "bf16"]
        args.accumulate = list(MICRO_BATCHES)
    if args.run:
        wait_for_turn()
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
    wanted = cells(args)
    between = None
    if any(not cell.strategy.endswith("one") for cell in wanted) and args.devices > 1 and not args.no_link:
        options = ["--run", "link", "--devices", str(args.devices)]
        found = result("link", start("link", options, args, args.devices), args)
        between = found and found["link_gb_per_s"]
        if between:
            print(f"all-reduce of 1 GiB over {args.devices} GPUs: {between:.1f} GB/s of bus bandwidth", flush=True)
    table = Table(path, args, between)
    for _, group in groupby(wanted, key=lambda cell: (cell.accumulate, cell.shape, cell.gradients)):
        table.add_all(list(group))
    if table.missing:
        sys.exit(f"not measured: {', '.join(table.missing)}")


if __name__ == "__main__":
    main()
