"""The time of a training step on many GPUs, on paper: bytes, latencies and overlap, for sizes nobody here has measured.

    python benchmarks/simulate.py            # prints the tables
    python benchmarks/simulate.py --write    # writes docs/benchmarks/simulated_scaling.md
    python benchmarks/simulate.py --check    # changes nothing; fails if the page differs from what this file says

Needs nothing but Python. ``simulate_model.py`` has the model. The page says what the model takes for granted, and how
far it is from the measured figures in ``results/scaling.csv``.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from simulate_model import BUSY, GIB, SHAPES, Cluster, Plan, Shape, memory, scaling, step

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "simulated_scaling.md"


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


RESULTS = Path(__file__).parent / "results" / "scaling.csv"
GATHERS = {"fsdp2 packed": "packed_step", "ddp": "ddp", "bf16 fsdp2": "bf16"}  # Strategy of a row -> gather of a Plan.


class Measured(NamedTuple):
    """A row of ``scaling.csv`` with a strategy and a shape that the model knows.

    Attributes:
        shape: The shape.
        gather: How the ranks exchange weights, as in a plan.
        more: What else the row says of itself: exact gradients, CUDA graphs.
        gpus: The number of GPUs of one host.
        accumulate: The micro-batches of a step.
        sequences: The sequences of a micro-batch.
        ms: The milliseconds of a step.
        alone: The milliseconds of the slowest of these GPUs alone.
        gib: The peak memory of a GPU.
    """

    shape: Shape
    gather: str
    more: str
    gpus: int
    accumulate: int
    sequences: int
    ms: float
    alone: float
    gib: float

    def predicted(self) -> float:
        """The milliseconds of a step, from what one GPU took."""
        plan = Plan(gather=self.gather, sequences=self.sequences, length=2048, accumulate=self.accumulate)
        found = step(self.shape, Cluster(self.gpus, 400), plan)
        return self.alone * found.total / found.compute

    def error(self) -> float:
        """How much longer a step is on paper than measured, as a part of what was measured."""
        return self.predicted() / self.ms - 1


def measured() -> list[Measured]:
    """The rows that the model can be checked against: those with a run on one GPU beside them."""
    shapes = {f"qwen2.5-{shape.name.lower()}": shape for shape in SHAPES}
    found = []
    with RESULTS.open(newline="") as file:
        for row in csv.DictReader(file):
            strategy = row["strategy"].removesuffix(" graphs")
            if row["shape"] not in shapes or strategy not in GATHERS or not row["scaling"]:
                continue
            exact = ", exact" if row["gradients"] == "bf16" else ""
            graphs = ", graphs" if strategy != row["strategy"] else ""
            ms = float(row["ms"])
            numbers = (int(row["gpus"]), int(row["accumulate"]), int(row["sequences"]), ms, ms * float(row["scaling"]))
            found.append(
                Measured(shapes[row["shape"]], GATHERS[strategy], exact + graphs, *numbers, float(row["peak_gib"]))
            )
    return found


NAMES = {"ddp": "ours, DDP", "packed_step": "ours, `sbn_fsdp2`", "bf16": "BF16 dense, FSDP2, gathered in bf16"}


def check_table(found: Sequence[Measured]) -> str:
    """The model against the figures of two and four GPUs."""
    rows = [
        [
            f"{row.shape.name}, {NAMES[row.gather]}{row.more}",
            str(row.gpus),
            f"{row.accumulate} of {row.sequences}",
            f"{row.alone:.0f}",
            f"{row.ms:.0f}",
            f"{row.predicted():.0f}",
            f"{row.error():+.1%}",
        ]
        for row in found
    ]
    headings = ["H200 of one host", "GPUs", "micro-batches", "one GPU, ms", "measured, ms", "model, ms", "error"]
    return table(headings, rows)


def worst(found: Sequence[Measured], gpus: int) -> list[str]:
    """The largest errors under ``sbn_fsdp2``, DDP, and for BF16 under FSDP2, in percent."""
    return [
        f"{max(abs(row.error()) for row in found if (row.gather, row.gpus) == (gather, gpus)):.1%}"
        for gather in GATHERS.values()
    ]


def scaling_table(gbit: float, plan: Plan, shapes: Sequence[Shape] = SHAPES) -> str:
    """Scaling of shapes over numbers of GPUs."""
    sizes = (8, 16, 64, 256, 1024)
    rows = []
    for shape in shapes:
        cells = [f"{scaling(shape, Cluster(gpus, gbit), plan):.2f}" for gpus in sizes]
        rows.append([shape.name, *cells])
    return table(["", *(f"{gpus:,} GPUs" for gpus in sizes)], rows)


def parts_table(shape: Shape, gbit: float) -> str:
    """What a step of one shape consists of."""
    rows = []
    for gpus in (8, 64, 1024):
        for name, plan in (
            ("packed_step", Plan()),
            ("packed_step, rows within a host", Plan(hybrid=True)),
            ("packed_layer", Plan(gather="packed_layer")),
            ("BF16 dense", Plan(gather="bf16")),
        ):
            found = step(shape, Cluster(gpus, gbit), plan)
            numbers = (found.compute, found.words, found.gradients, found.rest, found.total)
            rows.append([f"{gpus:,}", name, *(f"{number:,.0f}" for number in numbers), f"{found.gib:.1f}"])
    headings = ["GPUs", "", "compute", "words or weights", "gradients", "embedding, head", "step, ms", "GiB received"]
    return table(headings, rows)


def memory_table(gpus: int) -> str:
    """An 8B model's memory of one rank, by part."""
    step_plan, layer_plan = Plan(), Plan(gather="packed_layer")
    columns = [memory(SHAPES[2], gpus, step_plan), memory(SHAPES[2], gpus, layer_plan, checkpointed=True)]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(f"{column[name]:.1f}" if name in column else "" for column in columns)] for name in names]
    rows.append(["**all**", *(f"**{sum(column.values()):.1f}**" for column in columns)])
    return table([f"8B on {gpus} GPUs, GiB a rank", "packed_step", "packed_layer, checkpointing"], rows)


def peaks(found: Sequence[Measured]) -> str:
    """The memory of the model against the peaks of two GPUs, in a sentence."""
    told = []
    for row in found:
        if (row.gather, row.more, row.gpus, row.accumulate) == ("packed_step", "", 2, 1):
            size = sum(memory(row.shape, 2, Plan(sequences=row.sequences, length=2048)).values())
            told.append(f"{size:.1f} GiB at {row.shape.name}, where the peak was {row.gib:.1f}")
    return f"On two GPUs with 8 sequences of 2,048 tokens the same sums are:\n{'; '.join(told)}."


def first_to_fit(shape: Shape, room: float, plan: Plan) -> str:
    """The smallest number of ranks on which a model fits."""
    for power in range(11):
        if sum(memory(shape, 2**power, plan, checkpointed=True).values()) <= room:
            return f"{2**power:,}"
    return "none up to 1,024"


def fit_table() -> str:
    """The number of ranks that each shape needs, with one sequence on each and blocks that are recomputed."""
    one = {"sequences": 1, "length": 4096}
    plans = [Plan(**one), Plan(gather="packed_layer", **one)]  # type: ignore[arg-type]
    rows = [[shape.name, *(first_to_fit(shape, 72.0, plan) for plan in plans)] for shape in SHAPES]
    return table(["ranks needed with 72 GiB each, checkpointing", "packed_step", "packed_layer"], rows)


def page() -> str:
    """The page of the documentation."""
    small, large, found = SHAPES[2], SHAPES[3], measured()
    two, four = worst(found, 2), worst(found, 4)
    flat = step(SHAPES[0], Cluster(1024, 400), Plan())
    near = step(SHAPES[0], Cluster(1024, 400), Plan(hybrid=True))
    slow = step(small, Cluster(64, 50), Plan())
    return f"""# Many GPUs, on paper

<!-- Written by `python benchmarks/simulate.py --write`. Do not edit. -->

**Nothing on this page was measured beyond four GPUs.** It is what `benchmarks/simulate.py` computes: bytes over
bandwidth, the latencies of rings, and what a backward hides. [Several GPUs](scaling.md) has the measured rows.

## What the model assumes

- One GPU computes as fast as measured: 2:4 with int8 gradients on an H200. The 8B and 70B shapes take the
  rate of four blocks of the 8B shape.
- Hosts of 8 GPUs. Inside a host 312 GB/s, the measured bus bandwidth. Each GPU has its own link to other hosts, of 50
  or 400 Gbit/s. A collective costs 15 microseconds, and 1.5 microseconds a hop inside a host and 6 between hosts.
  These three latencies are assumed. An all-reduce between hosts takes a tree, other collectives a ring.
- A micro-batch of one GPU is two sequences of 4,096 tokens, one micro-batch a step, gradients travel in bfloat16. More
  tokens in a micro-batch hide more.
- The backward hides reductions of gradients, and blocks hide the gathers of the next block. With `packed_step` nothing
  hides the gather of the words, which comes once a step.
- In a micro-batch whose backward sends gradients, several GPUs of a host compute {BUSY - 1:.0%} slower than one.
  Under DDP only the last micro-batch of a step sends gradients. This number is fitted.

## Against the figures of two and four GPUs

{check_table(found)}

Gradients are int8, or exact where a row says so. "2 of 8" means two micro-batches of 8 sequences. "one GPU" is the
slowest of the GPUs. One number was fitted, to three rows of ours of 2026-11-28, which are not in this table.

- **Two GPUs:** the model is off by at most {two[0]} for `sbn_fsdp2`, by {two[1]} for DDP, and by
  {two[2]} for BF16 under FSDP2.
- **Four GPUs:** {four[0]}, {four[1]} and {four[2]}.
- `sbn_fsdp2` takes less time than the model says, above all with one micro-batch. There the ranks share the work of the
  optimiser, which the model does not know.
- The model knows nothing of the host. So shapes that a host limits, such as 0.5B without CUDA graphs, are not here.

## Scaling: throughput over that of one GPU times the number of GPUs

`packed_step`, links of 400 Gbit/s:

{scaling_table(400, Plan())}

`packed_step`, links of 50 Gbit/s:

{scaling_table(50, Plan())}

The same with rows shared within a host (a mesh of two dimensions), 50 Gbit/s:

{scaling_table(50, Plan(hybrid=True))}

`sbn_ddp` for the shapes that fit into one GPU, links of 400 Gbit/s. Gradients travel in float32, once a step:

{scaling_table(400, Plan(gather="ddp"), SHAPES[:2])}

`sbn_ddp`, links of 50 Gbit/s. With eight micro-batches in a step it is the second table:

{scaling_table(50, Plan(gather="ddp"), SHAPES[:2])}

{scaling_table(50, Plan(gather="ddp", accumulate=8), SHAPES[:2])}

## An 8B step by part, milliseconds, 400 Gbit/s

{parts_table(small, 400)}

## The same over 50 Gbit/s

{parts_table(small, 50)}

## What breaks first

- **Slow links: embedding and head.** They are gathered in float32 once a step, and nothing hides them. At
  50 Gbit/s and 64 GPUs they take {slow.rest:,.0f} of the {slow.total:,.0f} ms of an 8B step. The words of all ternary
  layers take {slow.words:,.0f} ms. A `policy` with bfloat16 parameters halves these bytes.
- **Many GPUs in one ring: latency.** Gradients travel together until each rank gets 16 MiB, or all have 128 MiB. On
  1,024 GPUs these reductions have {flat.latency:,.0f} ms of latency in a 1.5B step that computes for
  {flat.compute:,.0f} ms. With rows shared within a host (a mesh of two dimensions) they have {near.latency:,.0f} ms.
  Large models hide this latency.
- **Slow links under `sbn_ddp`: gradients.** An all-reduce in float32 sends four times the bytes of a reduce-scatter in
  bfloat16. With eight micro-batches in a step they weigh less.
- **Rows shared within a host need fast links**: gradients then cross hosts twice, in both directions of an all-reduce,
  instead of once. At 50 Gbit/s one ring is better up to some hundred GPUs.

## Memory

{memory_table(8)}

This is with int8 gradients on our kernels for Hopper, Ampere and Ada, which read packed words: half a byte a weight for
forward and backward. `packed_layer` holds the words of two blocks. With exact gradients the backward reads int8 codes,
a byte a weight instead of a quarter.

{peaks(found)}

The next table takes one sequence of 4,096 tokens on each GPU and recomputes whole blocks. So a model fits on fewer
ranks than the first column above says:

{fit_table()}

## When tensor or pipeline parallelism becomes necessary

- **Not for memory, up to 70B**: everything but masks, words, activations, embedding and head shrinks with the number
  of ranks, and `packed_layer` keeps the words of two blocks. Masks do not shrink: an eighth of a byte a weight,
  {large.ternary / 8 / GIB:.1f} GiB at 70B.
- **For the size of the batch**: data parallelism needs a sequence for each GPU. With 4 million tokens in a step and
  sequences of 4,096, that ends at 1,024 GPUs. Beyond that a sequence has to be cut (context parallelism), or a layer
  (tensor parallelism within a host). This project has neither.
- **For long sequences**: one sequence whose activations do not fit on a GPU needs the same.
"""


def main(arguments: list[str]) -> int:
    """Print, write or check the page; return the exit status."""
    if arguments not in ([], ["--write"], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    if not arguments:
        print(page(), end="")
    elif arguments == ["--write"]:
        PAGE.write_text(page())
        print(PAGE.name)
    elif not PAGE.is_file() or PAGE.read_text() != page():
        print(f"docs/benchmarks/{PAGE.name} is stale: run python benchmarks/simulate.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
