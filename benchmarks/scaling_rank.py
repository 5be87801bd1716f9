"""What one process of ``scaling.py`` does: it trains a list of runs, one after the other, and prints what they took.

All runs share the processes, because a process needs half a minute for its imports and for NCCL. A run is one ``fit``,
and measures all numbers of micro-batches that are wanted of it, so a model is made and compiled once for them. Runs on
one GPU come first, and every rank trains them on its own GPU.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from sbn_kernels.runtime import sharing
from step_profile import summary, timeline
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from wire import Wire

from sbn_lightning import SparseBitNet, SparseTernaryPrecision, TransformerConfig
from sbn_lightning.backends.selection import BackendName
from sbn_lightning.distributed.meeting import prepare_to_meet
from sbn_lightning.distributed.sharding import shard
from sbn_lightning.distributed.strategies import ReplicatedStrategy, ShardedStrategy
from sbn_lightning.layers.sparse_linear import masked_layers

LENGTH = 2048
WARM_STEPS = 2
WARM_STEPS_OF_GRAPHS = 5  # One of these steps records the graphs.
LINK_BYTES = 2**30
# Under all other strategies of FSDP2 the ranks gather latent weights.
GATHERS = {"fsdp2 packed": "packed_step", "fsdp2 step": "packed_step", "fsdp2 layer": "packed_layer"}
IN_FLOAT32 = " float32"  # The end of the name of a row of FSDP2 whose gradients travel in float32.
WAITING = " waiting"  # The end of the name of a row whose kernels make no room for collectives.
GRAPHS = " graphs"  # The end of the name of a row whose micro-batches are replayed as CUDA graphs.
ACCELERATOR = "gpu"
BACKEND: BackendName = "sparse"

Say = Callable[[str], None]  # Prints progress.


class Run(NamedTuple):
    """A model and a strategy, with the numbers of micro-batches of a step that are measured."""

    shape: str
    strategy: str
    gradients: str
    sequences: int
    counts: list[int]

    @property
    def alone(self) -> bool:
        """Whether the run is on one GPU."""
        return self.strategy.removesuffix(GRAPHS).endswith("one")

    @property
    def graphs(self) -> bool:
        """Whether micro-batches are replayed as CUDA graphs."""
        return self.strategy.endswith(GRAPHS)

    def told(self, count: int) -> str:
        """The name of one row."""
        return f"{self.shape} {self.strategy}, {self.gradients} gradients, {count} micro-batches"

    @property
    def dense(self) -> bool:
        """Whether the model has no ternary layers."""
        return self.strategy.startswith(("bf16", "float8"))


class Step(NamedTuple):
    """An optimiser step of a run."""

    batches: int  # The number of micro-batches.
    what: str  # "warm", "timed", "wire" or "profile"


def plan(counts: Sequence[int], steps: int, wire: bool, profile: bool, warm: int = WARM_STEPS) -> list[Step]:
    """The steps of a run. Lightning counts batches, so steps of n micro-batches begin at multiples of n.

    Args:
        counts: The numbers of micro-batches, in the order in which they are measured.
        steps: How many steps are timed, for up to two micro-batches; fewer for larger numbers.
        wire: Whether to count bytes in one more step of the smallest number. Blocks run uncompiled in that step.
        profile: Whether to profile three more steps with the first number.
        warm: How many steps come first.
    """
    wanted = [Step(count, "timed") for count in counts for _ in range(max(1, min(steps, 2 * steps // count)))]
    wanted += [Step(counts[0], "profile")] * 3 if profile else []
    wanted += [Step(min(counts), "wire")] if wire else []
    made = [Step(counts[0], "warm")] * warm
    batches = counts[0] * warm
    for step in wanted:
        while batches % step.batches:
            made.append(made[-1]._replace(what="warm"))
            batches += made[-1].batches
        made.append(step)
        batches += step.batches
    return made


class Clock(Callback):
    """Gives each optimiser step its micro-batches, and measures time, memory and bytes on the wire.

    Args:
        say: Prints progress.
        steps: The steps of the run.
        taken: The bytes that earlier runs of this process have left on the GPU.
        graphs: Whether micro-batches are replayed. Their memory counts while they are recorded, and not in a replay, so
            the peak is that of the whole run.
    """

    def __init__(self, say: Say, steps: Sequence[Step], taken: int, graphs: bool) -> None:
        self.say = say
        self.steps = steps
        self.ends: list[Any] = []
        self.peaks: dict[int, float] = {}
        self.wires: dict[int, float] = {}
        self.profiler: torch.profiler.profile | None = None
        self._wire: Wire | None = None
        self._began = -1
        self._taken = taken
        self._graphs = graphs

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.cuda.reset_peak_memory_stats()
        if trainer.is_global_zero:
            self.say("training starts")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # type: ignore[override]
        now = trainer.global_step
        if now == self._began or now >= len(self.steps):
            return
        self._began = now
        count, what = self.steps[now]
        trainer.accumulate_grad_batches = count
        if what == "timed" and self.steps[now - 1] != self.steps[now] and not self._graphs:
            torch.cuda.reset_peak_memory_stats()
        if what == "wire":
            self._wire = Wire()  # Blocks run uncompiled until its end.
            self._wire.__enter__()
        if what == "profile" and self.profiler is None and trainer.is_global_zero:
            torch.cuda.synchronize()
            # Without the host's events, which take ten times as long to read.
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:  # type: ignore[override]
        now = trainer.global_step
        if now == len(self.ends):
            return
        count, what = self.steps[now - 1]
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.ends.append(event)
        if now == 1:
            torch.cuda.synchronize()
            if trainer.is_global_zero:
                self.say("first step done")
        elif trainer.is_global_zero and (now == len(self.steps) or self.steps[now] != self.steps[now - 1]):
            self.say(f"{what} steps of {count} micro-batches done")
        if what == "timed":
            self.peaks[count] = (torch.cuda.max_memory_allocated() - self._taken) / 2**30
        if self._wire is not None:
            self._wire.__exit__(None, None, None)
            self.wires[count] = self._wire.total / 2**20
            self._wire = None
        ended = now == len(self.steps) or self.steps[now].what != "profile"
        if what == "profile" and ended and self.profiler is not None:
            torch.cuda.synchronize()
            self.profiler.stop()
            self.say(summary(self.profiler.key_averages(), steps=3))
            self.say(timeline(self.profiler.events()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.cuda.synchronize()

    def rows(self) -> Iterator[dict[str, Any]]:
        """What was measured, for each number of micro-batches."""
        for count in self.peaks:
            timed = [i for i, step in enumerate(self.steps) if step == Step(count, "timed")]
            times = [self.ends[i - 1].elapsed_time(self.ends[i]) for i in timed]
            wire = self.wires.get(count, "")
            yield {"accumulate": count, "ms": statistics.median(times), "peak_gib": self.peaks[count], "wire_mib": wire}


def masks_of(module: LightningModule) -> str:
    """A digest of the masks of all layers."""
    masks = sha256()
    for _, layer in masked_layers(module):
        masks.update(layer.packed_mask().cpu().numpy().tobytes())
    return masks.hexdigest()


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
            options = self.trainer.strategy.sharding  # type: ignore[attr-defined]
            shard(self.model, self.device_mesh, policy=policy, **options)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Lightning's bf16-mixed clips no gradients before a fused optimiser.
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.float8 and self.device_mesh is not None:  # One all-reduce for the scales of all weights.
            from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

            precompute_float8_dynamic_scale_for_fsdp(self.model)


def strategy_of(name: str) -> Any:
    """A strategy for ``Trainer``."""
    name = name.removesuffix(GRAPHS)
    if name.endswith("one"):
        return "auto"
    if name == "ddp lightning":
        return DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False)
    name, _, ctas = name.removesuffix(WAITING).removesuffix(" ctas").partition(" on ")
    most = int(ctas) if ctas else None
    name, _, bucket = name.removesuffix(" mb").partition(" in ")
    if "ddp" in name:
        sizes = {"bucket_cap_mb": int(bucket)} if bucket else {}
        return ReplicatedStrategy("bfloat16" if "bfloat16" in name else "float32", max_ctas=most, **sizes)
    reduce = "step" if name == "fsdp2 step" else "micro_batch"
    dtype = "float32" if name.endswith(IN_FLOAT32) else "bfloat16"
    gather: Any = GATHERS.get(name.removesuffix(IN_FLOAT32), "latent")
    return ShardedStrategy(dtype, reduce=reduce, gather=gather, max_ctas=most)  # type: ignore[arg-type]


@contextmanager
def kernels_of(strategy: str) -> Iterator[None]:
    """In a run whose name says so, kernels make no room for collectives."""
    least = sharing.LEAST_STEPS
    sharing.LEAST_STEPS = 2**40 if strategy.endswith(WAITING) else least
    try:
        yield
    finally:
        sharing.LEAST_STEPS = least


def measure(
    run: Run, steps: Sequence[Step], rank: int, devices: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Train one run to its last step.

    Returns:
        What was measured, for each number of micro-batches.
    """
    linear, taken = "dense" if run.dense else "ternary", torch.cuda.memory_allocated()
    config = TransformerConfig.preset(run.shape, max_sequence_length=LENGTH, pattern="2:4", linear=linear)
    optimizer = partial(torch.optim.AdamW, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    torch.manual_seed(0)
    # Drawing 3 billion numbers on a CPU takes too long.
    with torch.device("cuda" if ACCELERATOR == "gpu" else "cpu", rank):
        module = (Dense if run.dense else SparseBitNet)(
            config, optimizer, schedule="constant", compile=True, cuda_graphs=run.graphs
        )
    if isinstance(module, Dense):
        module.float8 = run.strategy.startswith("float8")
    clock = Clock(say, steps, taken, run.graphs)
    tokens = torch.randint(config.vocab_size, (sum(step.batches for step in steps) * run.sequences, LENGTH + 1))
    precision = {"plugins": [SparseTernaryPrecision(BACKEND, run.gradients)]}  # type: ignore[arg-type]
    trainer = Trainer(
        accelerator=ACCELERATOR, devices=[rank] if run.alone else devices, strategy=strategy_of(run.strategy),
        callbacks=[clock], max_epochs=1, **({"precision": "bf16-mixed"} if run.dense else precision),
        accumulate_grad_batches=steps[0].batches, gradient_clip_val=None if run.dense else 1.0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, logger=False,
    )  # fmt: skip
    # The teardown of a strategy moves weights and optimiser states to the CPU: 30 to 40 seconds at 3B.
    trainer.strategy.teardown = trainer.strategy.precision_plugin.teardown  # type: ignore[method-assign]
    trainer.fit(module, DataLoader(tokens, batch_size=run.sequences, pin_memory=ACCELERATOR == "gpu"))  # type: ignore[arg-type]
    digest = masks_of(module)
    digests: list[str | None] = [digest]
    if not run.alone:
        digests *= devices
        dist.all_gather_object(digests, digest)
    return [row | {"same_masks": len(set(digests)) == 1} for row in clock.rows()]


def link(devices: int) -> float:
    """The bus bandwidth between GPUs in GB a second: all-reduces of 1 GiB.

    Raises:
        AssertionError: If a sum is wrong.
    """
    prepare_to_meet(None)
    fabric = Fabric(accelerator=ACCELERATOR, devices=devices, strategy="ddp")
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
    return 2e-9 * (devices - 1) / devices * LINK_BYTES / statistics.median(seconds[warm:])


def put(record: dict[str, Any]) -> None:
    """Tell the parent something, as a line of JSON."""
    print(json.dumps(record), flush=True)


def train_all(runs: Sequence[Run], args: Any) -> None:
    """Train the runs on one GPU, and then all others. Ends the process.

    Args:
        runs: All runs.
        args: The command line's.
    """
    torch.set_float32_matmul_precision("high")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    alone = [run for run in runs if run.alone]
    several = [run for run in runs if not run.alone]
    torch.cuda.set_device(rank)
    for run in [*alone, *several]:
        if several and run is several[0] and not args.no_link:
            rate = link(args.devices)
            if rank == 0:
                put({"link_gb_per_s": rate})
        number = runs.index(run)
        first = run.alone or rank == 0
        say = partial(_say, f"{run.shape} {run.strategy} {run.gradients}", args.started)
        if first:
            put({"run": number, "rank": rank, "began": True})
            say(f"begins; {torch.cuda.memory_allocated() / 2**30:.1f} GiB are taken")
        steps = plan(
            run.counts, args.steps, not (args.no_wire or run.alone or run.graphs), run.strategy in args.profile,
            WARM_STEPS_OF_GRAPHS if run.graphs else WARM_STEPS,
        )  # fmt: skip
        try:
            with kernels_of(run.strategy):
                rows = measure(run, steps, rank, args.devices, say)
        except Exception:
            put({"run": number, "failed": True})
            raise
        for row in rows if first else ():
            put({"run": number, "rank": rank, **row})
        if first:
            say(f"done: {', '.join(format(row['ms'], '.1f') for row in rows)} ms")
        del rows
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    sys.stdout.flush()
    os._exit(0)


def _say(name: str, started: float, text: str) -> None:
    """Print a line of progress to stderr, because the parent reads stdout."""
    print(f"[{time.time() - started:5.1f} s] {name}: {text}", file=sys.stderr, flush=True)
