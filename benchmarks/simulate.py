"""The time of a training step on many GPUs, on paper: bytes, latencies and overlap, for sizes nobody here has measured.

    python benchmarks/simulate.py            # prints the tables
    python benchmarks/simulate.py --write    # writes docs/benchmarks/simulated_scaling.md
    python benchmarks/simulate.py --check    # changes nothing; fails if the page differs from what this file says

Needs nothing but Python. :func:`step` is the whole model; the page says what it takes for granted, and how far it is
from the two-GPU figures.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import ceil, log2
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "simulated_scaling.md"
GIB, GB = 2**30, 1e9


@dataclass(frozen=True)
class Shape:
    """A model.

    Attributes:
        name: The name in the tables.
        layers: The number of blocks.
        width: d_model.
        hidden: The width of the feed-forward layer.
        kv: The width of keys and of values together.
        vocabulary: The number of tokens in the vocabulary.
        tied: Whether embedding and head are one matrix.
        bf16: bfloat16 TFLOP/s of a whole dense step on an H200, as measured for a model of this size or one near it.
        faster: How many times faster a 2:4 step with int8 gradients is, measured for the same model.
    """

    name: str
    layers: int
    width: int
    hidden: int
    kv: int
    vocabulary: int
    tied: bool
    bf16: float
    faster: float

    @property
    def ternary(self) -> float:
        """The weights of ternary layers."""
        attention = self.width * (2 * self.width + self.kv)
        return self.layers * (attention + 3.0 * self.width * self.hidden)

    @property
    def rest(self) -> float:
        """The weights of the embedding and of the head."""
        return float(self.width * self.vocabulary * (1 if self.tied else 2))

    def flops(self, length: int) -> float:
        """The FLOPs of a token, forward and backward (PaLM, appendix B)."""
        return 6 * (self.ternary + self.width * self.vocabulary) + 6.0 * self.layers * self.width * length


# From steps of 32,768 tokens in sequences of 2,048 on one H200 (scaling.csv, training_step.csv). BF16 dense takes 619.2
# and 1221.9 ms at 1.5B and 3B, and 2:4 with int8 gradients 463.1 and 838.9 ms; four blocks of the 8B shape take 354.4
# and 218.8 ms.
SHAPES = (
    Shape("1.5B", 28, 1536, 8960, 512, 151_936, True, 518, 1.34),
    Shape("3B", 36, 2048, 11008, 512, 151_936, True, 530, 1.46),
    Shape("8B", 32, 4096, 14336, 2048, 128_256, False, 585, 1.62),
    Shape("70B", 80, 8192, 28672, 2048, 128_256, False, 585, 1.62),
)


@dataclass(frozen=True)
class Cluster:
    """Hosts of GPUs.

    Attributes:
        gpus: The number of GPUs.
        gbit: Gbit/s of each GPU's link to other hosts.
        per_host: The GPUs of a host.
        inside: GB/s of each GPU's link inside a host; measured as the bus bandwidth of an all-reduce on two H200.
        start: Seconds to start a collective.
        hop: Seconds of one hop of a ring inside a host.
        far_hop: Seconds of one hop of a ring between hosts.
    """

    gpus: int
    gbit: float
    per_host: int = 8
    inside: float = 312.0
    start: float = 15e-6
    hop: float = 1.5e-6
    far_hop: float = 6e-6

    @property
    def hosts(self) -> int:
        return -(-self.gpus // self.per_host)

    def ring(self, size: float, members: int, hosts: int) -> float:
        """Seconds of an all-gather or a reduce-scatter of ``size`` bytes in all, over ``members`` GPUs of ``hosts``.

        A ring passes through all GPUs of a host before it goes on. The GPUs of a host share the traffic between hosts.
        """
        if members == 1:
            return 0.0
        near = size * (members - 1) / members / (self.inside * GB)
        far = size * (hosts - 1) / hosts / (members / hosts) / (self.gbit / 8 * GB)
        latency = self.start + (members - hosts) * self.hop + (hosts - 1) * self.far_hop
        return max(near, far) + latency


@dataclass(frozen=True)
class Plan:
    """How a model is trained.

    Attributes:
        gather: ``"packed_step"``, ``"packed_layer"``, ``"bf16"`` (dense BF16 under FSDP2) or ``"ddp"`` (ours).
        hybrid: Whether rows are shared within a host, and hosts hold the same rows.
        gradient_bytes: The bytes of a gradient on the wire.
        sequences: The sequences of a micro-batch of one GPU.
        length: The tokens of a sequence.
        accumulate: The micro-batches of a step.
    """

    gather: str = "packed_step"
    hybrid: bool = False
    gradient_bytes: int = 2
    sequences: int = 2
    length: int = 4096
    accumulate: int = 1


BUSY = 1.04  # How much longer several GPUs of a host compute than one: the one number that is fitted, see the page.
MATRICES = 4  # Ternary matrices of a block: qkv, o, gate and up, down.
PIECE, MOST = 2**22, 2**27  # Gradients travel together until each rank gets PIECE bytes, or all have MOST bytes.


@dataclass(frozen=True)
class Step:
    """The milliseconds of a step: computing, what of the communication is not hidden, and what part of that is latency.

    Attributes:
        compute: The time of one GPU alone.
        words: Gathers of codes or of weights that nothing hides.
        gradients: Reductions of gradients that the backward does not hide.
        rest: Embedding and head.
        latency: The part of the reductions that does not depend on bytes.
        total: The time of the step.
        gib: GiB that each GPU receives in a step.
    """

    compute: float
    words: float
    gradients: float
    rest: float
    latency: float
    total: float
    gib: float


def step(shape: Shape, cluster: Cluster, plan: Plan) -> Step:
    """The time of a step."""
    n, hosts, per_host = cluster.gpus, cluster.hosts, min(cluster.gpus, cluster.per_host)
    group, spread = (per_host, 1) if plan.hybrid else (n, hosts)
    tokens = plan.sequences * plan.length
    faster = 1.0 if plan.gather == "bf16" else shape.faster
    compute = shape.flops(plan.length) * tokens * plan.accumulate / (shape.bf16 * 1e12 * faster)
    busy = compute * (BUSY if n > 1 else 1.0)
    backward, forward = busy * 2 / 3 / plan.accumulate, busy / 3 / plan.accumulate
    blocks = shape.layers

    def over_blocks(bytes_a_weight: float, pieces: int) -> float:
        """Seconds of collectives for all ternary weights, in ``pieces`` collectives a block; 0 pieces: one for all."""
        number = pieces * blocks or 1
        return number * cluster.ring(bytes_a_weight * shape.ternary / number, group, spread)

    # Codes. A block hides the gather of the next block; the first one is not hidden.
    gamma = cluster.ring(4.0 * shape.ternary / shape.width, group, spread)
    if plan.gather == "packed_step":
        sent = 0.25 * shape.ternary
        words = gamma + over_blocks(0.25, 0)
    elif plan.gather == "packed_layer":
        sent = 0.25 * shape.ternary * (1 + 2 * plan.accumulate)
        each = over_blocks(0.25, 1)
        hidden = max(each - forward, 0) + max(each - backward, 0) + 2 * each / blocks
        words = gamma + over_blocks(0.25, 0) + plan.accumulate * hidden
    elif plan.gather == "bf16":
        sent = 2 * 2.0 * shape.ternary * plan.accumulate
        each = over_blocks(2.0, 1)
        words = plan.accumulate * (max(each - forward, 0) + max(each - backward, 0) + 2 * each / blocks)
    else:
        sent = words = 0.0

    # Gradients. The backward hides all reductions but that of its last matrix.
    size = float(plan.gradient_bytes)
    if plan.gather == "ddp":
        size, times = 4.0, 1
        buckets = max(1, round(4 * shape.ternary / 25e6))
        each = 2 * buckets * cluster.ring(4 * shape.ternary / buckets, n, hosts)
        last = each / buckets
        latency = 2 * buckets * cluster.ring(0.0, n, hosts)
    else:
        times = plan.accumulate
        number = float(blocks)
        if plan.gather != "bf16":
            number = min(MATRICES * blocks, max(1.0, size * shape.ternary / min(PIECE * group, MOST)))
        each = number * cluster.ring(size * shape.ternary / number, group, spread)
        last = each / number
        latency = times * number * cluster.ring(0.0, group, spread)
        if plan.hybrid and hosts > 1:  # Then each GPU reduces its own rows across hosts.
            own = size * shape.ternary / group
            across = 2 * own * (hosts - 1) / hosts / (cluster.gbit / 8 * GB)
            far = number * (cluster.start + 2 * ceil(log2(hosts)) * cluster.far_hop)  # a tree, not a ring
            each, latency = each + across + far, latency + times * far
            last += (across + far) / number
    gradients = times * (max(each - backward, 0) + last)
    sent += size * shape.ternary * times * (2 if plan.gather == "ddp" else 1)

    # Embedding and head are gathered before the forward, by us once in a step. Their gradients are reduced after the
    # backward of each micro-batch.
    width = 2.0 if plan.gather == "bf16" else 4.0
    back = 4.0 if plan.gather == "ddp" else size
    gathers = times if plan.gather == "bf16" else 1
    members = n if plan.gather == "ddp" else group
    rest = gathers * cluster.ring(width * shape.rest, members, spread) + times * cluster.ring(
        back * shape.rest, members, spread
    )
    if plan.hybrid and hosts > 1:
        rest += times * 2 * back * shape.rest / group * (hosts - 1) / hosts / (cluster.gbit / 8 * GB)
    sent += (gathers * width + times * back) * shape.rest
    if n == 1:
        words = gradients = rest = latency = sent = 0.0
    total = busy + words + gradients + rest
    milliseconds = [1e3 * seconds for seconds in (compute, words, gradients, rest, latency, total)]
    received = sent * (group - 1) / group
    if plan.hybrid and hosts > 1:
        received += 2 * (hosts - 1) / hosts * times * (size * shape.ternary + back * shape.rest) / group
    return Step(*milliseconds, received / GIB)


def scaling(shape: Shape, cluster: Cluster, plan: Plan) -> float:
    """The throughput over that of one GPU times the number of GPUs."""
    found = step(shape, cluster, plan)
    return found.compute / found.total


# Bytes of activations for each token, block and unit of width: (peak - states) of the 1.5B step with int8 gradients,
# 59.4 GiB with 16,384 tokens in a micro-batch. 3B gives 47.
ACTIVATION = 50.0


def memory(shape: Shape, gpus: int, plan: Plan, checkpointed: bool = False) -> dict[str, float]:
    """GiB of one rank, by part.

    Args:
        shape: The model.
        gpus: The ranks that share the rows.
        plan: How the model is trained.
        checkpointed: Whether blocks are computed again in the backward.
    """
    largest = shape.width * 2.0 * shape.hidden
    block = shape.ternary / shape.layers
    whole = 1 + 0.25 + 0.25  # int8 codes, packed words, packed words of the transpose
    codes = whole * (shape.ternary if plan.gather == "packed_step" else 2 * block)
    tokens = plan.sequences * plan.length
    per_token = shape.layers * shape.width * (4.0 if checkpointed else ACTIVATION)
    if checkpointed:  # One block at a time is there in full.
        per_token += shape.width * ACTIVATION
    parts = {
        "latent weights, float32, sharded": 4 * shape.ternary / gpus,
        "gradients, float32, sharded": 4 * shape.ternary / gpus,
        "AdamW, float32, sharded": 8 * shape.ternary / gpus,
        "words of own rows": 0.25 * shape.ternary / gpus if plan.gather == "packed_layer" else 0.0,
        "codes and packed words": codes,
        "masks, whole, two copies": 0.25 * shape.ternary,
        "whole gradients on their way (2)": 2 * plan.gradient_bytes * largest,
        "embedding and head: sharded states": 16 * shape.rest / gpus,
        "embedding and head: whole, with gradients": 8 * shape.rest,
        f"activations of {tokens:,} tokens" + (", checkpointed" if checkpointed else ""): tokens * per_token,
    }
    return {name: size / GIB for name, size in parts.items() if size > 0}


# The page.


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# Shape, how it is trained, micro-batches of a step and their sequences; milliseconds on two GPUs and on one.
MEASURED = (
    (0, "ddp", 2, 8, 483.3, 463.1),
    (0, "packed_step", 2, 8, 483.5, 463.1),
    (0, "bf16", 2, 8, 660.0, 619.2),
    (1, "packed_step", 4, 4, 881.8, 838.9),
    (1, "bf16", 4, 4, 1336.7, 1221.9),
)
NAMES = {"ddp": "ours, DDP", "packed_step": "ours, `sbn_fsdp2`", "bf16": "BF16 dense, FSDP2, gathered in bf16"}


def check_table() -> str:
    """The model against the two-GPU figures."""
    rows = []
    for number, gather, accumulate, sequences, measured, alone in MEASURED:
        plan = Plan(gather=gather, sequences=sequences, length=2048, accumulate=accumulate)
        found = step(SHAPES[number], Cluster(2, 400), plan)
        predicted = alone * found.total / found.compute
        rows.append(
            [
                f"{SHAPES[number].name}, {NAMES[gather]}",
                f"{alone:.0f}",
                f"{measured:.0f}",
                f"{predicted:.0f}",
                f"{predicted / measured - 1:+.1%}",
            ]
        )
    return table(["two H200 of one host", "one GPU, ms", "measured, ms", "model, ms", "error"], rows)


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

**Nothing on this page was measured beyond two GPUs.** It is what `benchmarks/simulate.py` computes: bytes over
bandwidth, the latencies of rings, and what a backward hides. [Several GPUs](scaling.md) has the measured rows.

## What the model takes for granted

- One GPU computes as fast as it was measured to: 2:4 with int8 gradients on an H200. The 8B and 70B shapes take the
  rate of four blocks of the 8B shape.
- Hosts of 8 GPUs. Inside a host 312 GB/s, the measured bus bandwidth. Each GPU has its own link to other hosts, of 50
  or 400 Gbit/s. A collective costs 15 microseconds, and 1.5 microseconds a hop inside a host and 6 between hosts.
  These three latencies are assumed.
- A micro-batch of one GPU is two sequences of 4,096 tokens, one micro-batch a step, gradients travel in bfloat16. More
  tokens in a micro-batch hide more.
- The backward hides reductions of gradients, and blocks hide the gathers of the next block. With `packed_step` nothing
  hides the gather of the words, which comes once a step.
- Several GPUs of a host compute {BUSY - 1:.0%} slower than one, whatever they send. This number is fitted.

## Against the figures of two GPUs

{check_table()}

One number was fitted to our three rows, so their errors say how well one number serves all three, and no more. BF16 is
slower than the model, perhaps because its matrix products do not make room for collectives.

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
- **Many GPUs in one ring: latency.** Gradients travel together until each rank gets 4 MiB, or all have 128 MiB. On
  1,024 GPUs these reductions have {flat.latency:,.0f} ms of latency in a 1.5B step that computes for
  {flat.compute:,.0f} ms. With rows shared within a host (a mesh of two dimensions) they have {near.latency:,.0f} ms.
  Large models hide this latency.
- **Rows shared within a host need fast links**: gradients then cross hosts twice, in both directions of an all-reduce,
  instead of once. At 50 Gbit/s one ring is better up to some hundred GPUs.

## Memory

{memory_table(8)}

The int8 codes that the products read weigh more than the words on the wire: a byte a weight, with packed words for the
forward and for the gradient of the input 1.5 bytes. `packed_layer` holds those of two blocks.

The next table takes one sequence of 4,096 tokens on each GPU and recomputes whole blocks. So a model fits on fewer
ranks than the first column above says:

{fit_table()}

## When tensor or pipeline parallelism becomes necessary

- **Not for memory, up to 70B**: everything but masks, codes, activations, embedding and head shrinks with the number
  of ranks, and `packed_layer` keeps the codes of two blocks. Masks do not shrink: a quarter of a byte a weight,
  {large.ternary / 4 / GIB:.1f} GiB at 70B.
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
