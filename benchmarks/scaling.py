"""Several GPUs of one host: training steps under DDP and FSDP2 against one GPU, and whether all ranks hold one mask.

    python benchmarks/scaling.py [--shapes qwen2.5-0.5b qwen2.5-3b] [--devices 2] [--strategies one ddp]
    python benchmarks/scaling.py --all [--append]    # every shape, gradients, number of micro-batches and strategy
    python benchmarks/scaling.py --all --budget 400  # as many of these rows as fit into 400 seconds
    python benchmarks/scaling.py --run qwen2.5-1.5b one int8 2,1 --run qwen2.5-1.5b "fsdp2 packed" int8 2,1

``--profile`` names strategies, and prints where the time of a step goes.

The link is measured first: all-reduces of 1 GiB over NCCL. ``link_gb_per_s`` is their bus bandwidth, 2 (n - 1) / n of
the bytes of one all-reduce over its time. One process for each GPU trains all runs (``scaling_rank.py``). If a run
fails, new processes go on with the next. GPUs of one host differ by some percent, and GPUs that average their gradients
wait for the slowest. So each GPU trains the runs on one GPU, side by side with the others, and the row is that of the
slowest. These runs come first. A run is ``Trainer`` with ``SparseBitNet`` (2:4, blocks compiled), the precision plugin,
clipping and a fused AdamW, as in a recipe, on random tokens. ``fsdp2 packed`` sends packed weights between GPUs once a
step, ``fsdp2 layer`` for each block, ``fsdp2 latent`` latent weights. ``fsdp2 step`` is ``fsdp2 packed`` with gradients
sent once a step, which takes 4 bytes a weight. Gradients of these rows travel in bfloat16, in ``fsdp2 packed float32``
in float32. ``ddp`` is the strategy ``sbn_ddp``, and ``ddp bfloat16`` sums its gradients in bfloat16, as the rows of
FSDP2 do. ``ddp lightning`` is Lightning's own strategy. In rows whose names end in ``waiting`` kernels make no room for
collectives: a kernel starts one program for each multiprocessor. In rows whose names end in ``on 8 ctas``, NCCL takes
at most so many multiprocessors while it sends gradients. In rows whose names end in ``in 25 mb``, torch's DDP averages
the gradients, in buffers of so many megabytes. In rows whose names end in ``graphs``, micro-batches are replayed as
CUDA graphs. They are compared with a single GPU that does the same, ``one graphs``. Names with ``bf16`` train the dense
model in bfloat16, names with ``float8`` on torchao's float8 tensor cores, under FSDP2 with its float8 all-gather. Every
GPU gets as many tokens as the single GPU, so ``scaling`` is the tokens a second of all GPUs over those of one GPU times
their number. ``scaling`` is empty if there is no run on one GPU. ``same_masks`` compares a digest of every layer's mask
on every rank after the last step; a run whose ranks differ gets no row. ``wire_mib`` is what a rank receives in one
more step of the smallest number of micro-batches, counted as the collectives run (``wire.py``). Rows are written as
they are measured. Progress, with the seconds since the start, goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import append, fresh_results, header, need_gpu
from processes import Ranks, wait_for_turn
from scaling_rank import LENGTH, WAITING, Run, train_all

STRATEGIES = ("one", "bf16 one", "float8 one", "fsdp2 packed", "ddp", "bf16 fsdp2", "bf16 ddp", "float8 fsdp2")
STRATEGIES += ("ddp bfloat16", "float8 ddp", "fsdp2 step", "fsdp2 layer", "fsdp2 latent", "ddp lightning")
STRATEGIES += tuple(name + WAITING for name in ("fsdp2 packed", "ddp", "ddp bfloat16"))
STRATEGIES += tuple(f"{name} on {ctas} ctas" for name in ("fsdp2 packed", "ddp") for ctas in (4, 8, 16))
STRATEGIES += ("fsdp2 packed float32", "ddp in 25 mb", "ddp in 100 mb")
STRATEGIES += ("one graphs", "ddp graphs", "fsdp2 packed graphs")
MICRO_BATCHES = (2, 1, 8)  # of a step, with --all
# Shape -> sequences of a micro-batch of one GPU, micro-batches of a step: 32,768 tokens, as in training_step.py.
BATCHES = {"qwen2.5-1.5b": (8, 2), "qwen2.5-3b": (8, 2), "qwen2.5-0.5b": (8, 2)}
COLUMNS = ("shape", "strategy", "gpus", "gradients", "sequences", "accumulate", "ms", "tokens_per_s", "scaling")
COLUMNS += ("peak_gib", "wire_mib", "same_masks", "link_gb_per_s")
KEY = COLUMNS[:6]


def runs_of(args: argparse.Namespace) -> list[Run]:
    """The runs that the command line asks for. Gradients of dense models have one kind."""
    found = [
        Run(shape, name, gradients, args.sequences or BATCHES[shape][0], [int(count) for count in counts.split(",")])
        for shape, name, gradients, counts in args.run or ()
    ]
    if found:
        return found
    for shape in args.shapes:
        sequences, count = BATCHES[shape]
        for gradients in args.gradients:
            for name in args.strategies:
                run = Run(shape, name, gradients, args.sequences or sequences, list(args.accumulate or [count]))
                if not run.dense or gradients == args.gradients[0]:
                    found.append(run)
    return found


class Table:
    """Rows as they come.

    Args:
        path: The CSV.
        devices: The number of GPUs of runs that are not on one.
    """

    def __init__(self, path: Path, devices: int) -> None:
        self.path = path
        self.devices = devices
        self.link: float | str = ""
        self.alone: dict[tuple[Any, ...], float] = {}  # tokens a second of one GPU, by model and batch
        self.found: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}  # run and count -> rank -> what it measured
        self.begun: list[tuple[Run, int]] = []  # Runs of these processes, and the ranks that have begun them.
        self.failed: list[Run] = []  # Runs of these processes that ended with an error.
        self.measured: list[tuple[Run, int]] = []
        self.missing: list[str] = []  # Rows whose ranks hold different masks.

    def take(self, runs: Sequence[Run], line: str) -> None:
        """Writes the row of a line that a process has printed; other lines do not count.

        Args:
            runs: The runs of the processes.
            line: The line.
        """
        if not line.startswith("{"):
            return
        record = json.loads(line)
        self.link = record.get("link_gb_per_s", self.link)
        if "ms" in record:
            run = runs[record["run"]]
            found = self.found.setdefault((*run[:4], record["accumulate"]), {})
            found[record["rank"]] = record
            if len(found) == (self.devices if run.alone else 1):
                self.add(run, max(found.values(), key=lambda one: one["ms"]))
        elif "began" in record:
            self.begun.append((runs[record["run"]], record["rank"]))
        elif "failed" in record:
            self.failed.append(runs[record["run"]])

    def left(self, runs: Sequence[Run]) -> list[Run]:
        """The runs that new processes train. All that began is over, except what GPUs ran alone while others failed.

        Args:
            runs: The runs of the processes, which have ended.
        """
        over = [run for run in runs if all((run, count) in self.measured for count in run.counts)]
        over += self.failed or [
            run for run in runs if all((run, rank) in self.begun for rank in range(self.devices if run.alone else 1))
        ]
        self.found, self.begun, self.failed = {}, [], []
        return [run for run in runs if run not in over]

    def add(self, run: Run, found: dict[str, Any]) -> None:
        """Writes a row, if the ranks agree."""
        count = found["accumulate"]
        self.measured.append((run, count))
        if not found["same_masks"]:
            self.missing.append(f"{run.told(count)}: ranks hold different masks")
            return
        gpus = 1 if run.alone else self.devices
        kind = run.strategy.split()[0] if run.dense else run.gradients
        alone = (run.shape, run.dense, kind, run.graphs, run.sequences, count)
        rate = gpus * count * run.sequences * LENGTH / (found["ms"] / 1e3)
        if gpus == 1:
            self.alone[alone] = rate
        scaling = rate / (gpus * self.alone[alone]) if alone in self.alone else ""
        between = self.link if gpus > 1 else ""
        wire = 0 if gpus == 1 else found["wire_mib"]
        values = (run.shape, run.strategy, gpus, run.gradients, run.sequences, count, found["ms"], rate, scaling)
        values += (found["peak_gib"], wire, found["same_masks"], between)
        append(self.path, dict(zip(COLUMNS, values, strict=True)), KEY)


def start(runs: Sequence[Run], args: argparse.Namespace) -> Ranks:
    """Starts the processes that train ``runs``."""
    options = {"--runs": json.dumps(runs), "--devices": args.devices, "--steps": args.steps, "--started": args.started}
    command = [text for name, value in options.items() for text in (name, str(value))]
    command += [f"--{name}" for name in ("no_link", "no_wire") if getattr(args, name)]
    command += ["--profile", *args.profile] if args.profile else []
    return Ranks([sys.executable, __file__, *command], args.devices, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen2.5-0.5b", "qwen2.5-3b"], choices=list(BATCHES))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--gradients", nargs="+", choices=["bf16", "int8"], default=["bf16"])
    parser.add_argument("--sequences", type=int, help="sequences of 2,048 tokens in a micro-batch of one GPU: 8")
    parser.add_argument("--accumulate", type=int, nargs="+", help="micro-batches in a step: 2")
    parser.add_argument(
        "--all", action="store_true", help="every shape, gradients, strategy, and 1, 2, 8 micro-batches"
    )
    parser.add_argument("--steps", type=int, default=6, help="steps that are timed; fewer of many micro-batches")
    parser.add_argument("--limit", type=float, default=60, help="seconds for each run; then the processes are killed")
    parser.add_argument("--budget", type=float, help="seconds in all; then the processes are killed")
    parser.add_argument(
        "--run", action="append", nargs=4, metavar=("SHAPE", "STRATEGY", "GRADIENTS", "COUNTS"),
        help="one run, with its numbers of micro-batches, as 2,1,8; instead of the lists above, and as often as wanted",
    )  # fmt: skip
    parser.add_argument(
        "--profile", nargs="+", default=[], choices=STRATEGIES, help="print where the time of a step of these runs goes"
    )
    parser.add_argument("--no_link", action="store_true", help="do not measure all-reduces")
    parser.add_argument("--no_wire", action="store_true", help="do not count the bytes that a rank receives")
    parser.add_argument("--append", action="store_true", help="keep the CSV's rows but those measured anew")
    parser.add_argument("--runs", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.all:
        args.shapes, args.strategies, args.gradients = list(BATCHES), list(STRATEGIES), ["int8", "bf16"]
        args.accumulate = list(MICRO_BATCHES)
    if args.runs:
        wait_for_turn()
        train_all([Run(*run) for run in json.loads(args.runs)], args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # So that the processes end, too.
    need_gpu()
    if torch.cuda.device_count() < args.devices:
        sys.exit(f"{torch.cuda.device_count()} GPUs are visible, {args.devices} asked for")
    path = fresh_results("scaling", args.append, COLUMNS)
    print(header(), flush=True)
    table = Table(path, args.devices)
    wanted = left = runs_of(args)
    while left:
        limit = args.limit * (1 + len(left))  # as long as one run for the imports
        if args.budget is not None:
            limit = min(limit, args.budget - (time.time() - args.started))
        if limit > 0 and (failure := start(left, args).finish(limit, partial(table.take, left))[1]):
            print(failure, file=sys.stderr, flush=True)
        rest = table.left(left)
        if len(rest) == len(left):
            break  # Not even one run began on all GPUs.
        left = rest
    missing = [run.told(count) for run in wanted for count in run.counts if (run, count) not in table.measured]
    if missing or table.missing:
        sys.exit(f"not measured: {', '.join(missing + table.missing)}")


if __name__ == "__main__":
    main()
