"""The time of a training step on many GPUs, on paper: bytes, latencies and overlap, for sizes nobody here has measured.

    python benchmarks/simulate.py            # prints the tables
    python benchmarks/simulate.py --write    # writes docs/benchmarks/simulated_scaling.md
    python benchmarks/simulate.py --check    # changes nothing; fails if the page differs from what this file says

Needs nothing but Python. ``simulate_model.py`` has the model. The page says what the model takes for granted, and how
far it is from measured figures.
"""

from __future__ import annotations

import sys
from pathlib import Path

from simulate_model import BUSY, GIB, SHAPES, Cluster, Plan, Shape, memory, scaling, step

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "simulated_scaling.md"


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# Shape, how it is trained, GPUs, micro-batches of a step and their sequences; milliseconds on these GPUs and on one.
MEASURED = (
    (0, "packed_step", 2, 1, 8, 246.7, 236.6),
    (0, "packed_step", 2, 2, 8, 479.6, 458.5),
    (0, "packed_step", 2, 8, 8, 1856.1, 1768.5),
    (0, "packed_step, exact", 2, 1, 8, 296.5, 287.2),
    (0, "packed_step, exact", 2, 2, 8, 587.3, 570.9),
    (0, "packed_step, exact", 2, 8, 8, 2273.2, 2208.3),
    (0, "ddp", 2, 1, 8, 256.1, 237.8),
    (0, "ddp", 2, 2, 8, 481.1, 459.0),
    (0, "ddp", 2, 8, 8, 1823.1, 1801.8),
    (0, "ddp, exact", 2, 1, 8, 316.2, 287.2),
    (0, "ddp, exact", 2, 2, 8, 589.4, 570.9),
    (0, "ddp, exact", 2, 8, 8, 2238.0, 2208.3),
    (0, "bf16", 2, 1, 8, 350.3, 316.3),
    (0, "bf16", 2, 2, 8, 693.6, 631.6),
    (1, "packed_step", 2, 1, 8, 426.4, 415.7),
    (1, "packed_step", 2, 2, 8, 828.9, 807.2),
    (1, "packed_step", 2, 8, 8, 3225.9, 3102.4),
    (1, "ddp", 2, 1, 8, 446.8, 415.7),
    (1, "ddp", 2, 2, 8, 839.2, 807.2),
    (1, "ddp", 2, 8, 8, 3153.8, 3102.4),
    (1, "bf16", 2, 2, 8, 1305.2, 1247.2),
    (0, "packed_step, graphs", 2, 1, 8, 251.9, 246.0),
    (0, "packed_step, graphs", 2, 2, 8, 484.2, 468.3),
    (0, "packed_step, graphs", 2, 8, 8, 1872.5, 1803.3),
    (0, "ddp, graphs", 2, 1, 8, 263.0, 246.0),
    (0, "ddp, graphs", 2, 2, 8, 486.8, 468.3),
    (0, "ddp, graphs", 2, 8, 8, 1826.3, 1803.3),
    (0, "packed_step, exact, graphs", 2, 1, 8, 299.7, 298.0),
    (0, "packed_step, exact, graphs", 2, 2, 8, 581.2, 572.1),
    (0, "packed_step, exact, graphs", 2, 8, 8, 2274.7, 2218.7),
    (1, "packed_step, graphs", 2, 1, 8, 434.0, 433.8),
    (1, "packed_step, graphs", 2, 2, 8, 830.0, 818.3),
    (1, "packed_step, graphs", 2, 8, 8, 3226.6, 3119.3),
    (1, "ddp, graphs", 2, 1, 8, 460.7, 433.8),
    (1, "ddp, graphs", 2, 2, 8, 849.1, 818.3),
    (1, "ddp, graphs", 2, 8, 8, 3162.4, 3119.3),
    (0, "packed_step", 4, 2, 8, 496.4, 459.5),
    (0, "packed_step, graphs", 4, 2, 8, 485.3, 463.8),
    (0, "ddp", 4, 2, 8, 491.4, 459.5),
    (0, "ddp, graphs", 4, 2, 8, 483.0, 463.8),
    (0, "bf16", 4, 2, 8, 699.4, 638.2),
)
SLOW = (  # Rows that the host most likely limited.
    (0, "packed_step, slow host", 2, 1, 8, 276.8, 237.8),
    (0, "packed_step, slow host", 2, 2, 8, 500.8, 459.0),
    (0, "packed_step, slow host", 2, 8, 8, 1965.2, 1801.8),
)
PEAKS = ((0, 43.8), (1, 73.3))  # Shape, and the measured GiB of each of two GPUs under packed_step.
NAMES = {"ddp": "ours, DDP", "packed_step": "ours, `sbn_fsdp2`", "bf16": "BF16 dense, FSDP2, gathered in bf16"}


def predicted(number: int, kind: str, gpus: int, accumulate: int, sequences: int, alone: float) -> float:
    """The milliseconds of a step on some GPUs of one host, from what one GPU took."""
    plan = Plan(gather=kind.split(",")[0], sequences=sequences, length=2048, accumulate=accumulate)
    found = step(SHAPES[number], Cluster(gpus, 400), plan)
    return alone * found.total / found.compute


def check_table() -> str:
    """The model against the figures of two and four GPUs."""
    rows = []
    for number, kind, gpus, accumulate, sequences, measured, alone in MEASURED + SLOW:
        model = predicted(number, kind, gpus, accumulate, sequences, alone)
        gather, _, more = kind.partition(",")
        rows.append(
            [
                f"{SHAPES[number].name}, {NAMES[gather]}{',' * bool(more)}{more}",
                str(gpus),
                f"{accumulate} of {sequences}",
                f"{alone:.0f}",
                f"{measured:.0f}",
                f"{model:.0f}",
                f"{model / measured - 1:+.1%}",
            ]
        )
    headings = ["H200 of one host", "GPUs", "micro-batches", "one GPU, ms", "measured, ms", "model, ms", "error"]
    return table(headings, rows)


def scaling_table(gbit: float, plan: Plan) -> str:
    """Scaling of all shapes over numbers of GPUs."""
    sizes = (8, 16, 64, 256, 1024)
    rows = []
    for shape in SHAPES:
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


def peaks() -> str:
    """The memory of the model against the peaks of two GPUs, in a sentence."""
    told = []
    for number, measured in PEAKS:
        size = sum(memory(SHAPES[number], 2, Plan(sequences=8, length=2048)).values())
        told.append(f"{size:.1f} GiB at {SHAPES[number].name}, where the peak was {measured:.1f}")
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
    small, large = SHAPES[2], SHAPES[3]
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
  These three latencies are assumed.
- A micro-batch of one GPU is two sequences of 4,096 tokens, one micro-batch a step, gradients travel in bfloat16. More
  tokens in a micro-batch hide more.
- The backward hides reductions of gradients, and blocks hide the gathers of the next block. With `packed_step` nothing
  hides the gather of the words, which comes once a step.
- In a micro-batch whose backward sends gradients, several GPUs of a host compute {BUSY - 1:.0%} slower than one.
  Under DDP only the last micro-batch of a step sends gradients. This number is fitted.

## Against the figures of two and four GPUs

{check_table()}

Gradients are int8, or exact where a row says so. "2 of 8" means two micro-batches of 8 sequences. One number was
fitted, to three rows of ours of the day before.

- **Ours, all rows but the last three:** the model is off by at most 5.0 % for `sbn_fsdp2` and by at most 4.3 % for DDP.
  With one micro-batch DDP takes longer than the model says. With CUDA graphs, which take the host away, `sbn_fsdp2` at
  3B takes less time than the model says.
- **Four GPUs** were measured after the model was made. No number was fitted to these rows. For ours the model is off
  by at most 3.7 %.
- **The last three rows:** the model knows nothing of the host, which limited several runs, above all of small models.
  These rows are most likely such a run. It was not profiled. On the same host the model fits exact gradients and 3B,
  for which the GPU computes longer.
- **BF16 at 1.5B** takes longer than the model says, perhaps because its matrix products do not make room for
  collectives.

## Scaling: throughput over that of one GPU times the number of GPUs

`packed_step`, links of 400 Gbit/s:

{scaling_table(400, Plan())}

`packed_step`, links of 50 Gbit/s:

{scaling_table(50, Plan())}

The same with rows shared within a host (a mesh of two dimensions), 50 Gbit/s:

{scaling_table(50, Plan(hybrid=True))}

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
- **Rows shared within a host need fast links**: gradients then cross hosts twice, in both directions of an all-reduce,
  instead of once. At 50 Gbit/s one ring is better up to some hundred GPUs.

## Memory

{memory_table(8)}

This is with int8 gradients on our kernels for Hopper, Ampere and Ada, which read packed words: half a byte a weight for
forward and backward. `packed_layer` holds the words of two blocks. With exact gradients the backward reads int8 codes,
a byte a weight instead of a quarter.

{peaks()}

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
