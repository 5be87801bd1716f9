"""The model behind ``simulate.py``: the time, the bytes and the memory of a training step on many GPUs.

:func:`step` is the whole model of time, and :func:`memory` that of memory. Nothing here is measured, but for the rates
of :data:`SHAPES` and :data:`BUSY`. The page that ``simulate.py`` writes says what the model takes for granted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

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


# From steps of 32,768 tokens in sequences of 2,048 on one H200 (scaling.csv, training_step.csv). BF16 dense takes 627.8
# and 1185.2 ms at 1.5B and 3B, and 2:4 with int8 gradients 451.9 and 796.5 ms; four blocks of the 8B shape take 354.4
# and 218.8 ms.
SHAPES = (
    Shape("1.5B", 28, 1536, 8960, 512, 151_936, True, 511, 1.39),
    Shape("3B", 36, 2048, 11008, 512, 151_936, True, 546, 1.49),
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

    def transfer(self, size: float, members: int, hosts: int) -> float:
        """Seconds until each GPU of ``members`` has what the others hold of ``size`` bytes, without latency.

        The GPUs of a host share the traffic between hosts. So the last host, which may not be full, is the slowest.
        """
        last = members - (hosts - 1) * self.per_host
        near = size * (members - 1) / members / (self.inside * GB)
        far = size * (members - last) / members / last / (self.gbit / 8 * GB)
        return max(near, far)

    def ring(self, size: float, members: int, hosts: int) -> float:
        """Seconds of an all-gather or a reduce-scatter of ``size`` bytes in all, over ``members`` GPUs of ``hosts``.

        A ring passes through all GPUs of a host before it goes on.
        """
        if members == 1:
            return 0.0
        latency = self.start + (members - hosts) * self.hop + (hosts - 1) * self.far_hop
        return self.transfer(size, members, hosts) + latency

    def all_reduce(self, size: float) -> float:
        """Seconds of an all-reduce of ``size`` bytes over all GPUs.

        As many bytes travel as in a reduce-scatter and an all-gather over a ring. Between hosts NCCL takes a tree. Its
        latency grows with the logarithm of the number of hosts.
        """
        if self.gpus == 1:
            return 0.0
        hops = (min(self.gpus, self.per_host) - 1) * self.hop + ceil(log2(self.hosts)) * self.far_hop
        return 2 * self.transfer(size, self.gpus, self.hosts) + self.start + 2 * hops


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
DDP_COLLECTIVES = 3  # of a block: gate and up, down, and the two smaller ones together
PIECE, MOST = 2**24, 2**27  # Gradients travel together until each rank gets PIECE bytes, or all have MOST bytes.


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
    # The part of the step whose backward sends gradients.
    beside = 1 / plan.accumulate if plan.gather == "ddp" else 1.0
    busy = compute * (1 + (BUSY - 1) * beside if n > 1 else 1.0)
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

    # Gradients. All reductions run beside the backward, except the one of the last matrix.
    size = float(plan.gradient_bytes)
    if plan.gather == "ddp":
        size, times, number = 4.0, 1, float(DDP_COLLECTIVES * blocks)
        each = number * cluster.all_reduce(size * shape.ternary / number)
        last = each / number
        latency = number * cluster.all_reduce(0.0)
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
    if plan.gather == "ddp":
        rest = cluster.all_reduce(back * shape.rest)
    else:
        rest = gathers * cluster.ring(width * shape.rest, group, spread)
        rest += times * cluster.ring(back * shape.rest, group, spread)
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
    """The throughput, divided by the number of GPUs times the throughput of one GPU."""
    found = step(shape, cluster, plan)
    return found.compute / found.total


# Bytes of activations for each token, block and unit of width: (peak - states) of the 1.5B step with int8 gradients on
# one GPU, 55.4 GiB with 16,384 tokens in a micro-batch. 3B gives 42.
ACTIVATION = 45.0


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
    # Packed words, and those of the transpose. Kernels that read packed words alone need no int8 codes.
    words = (0.25 + 0.25) * (shape.ternary if plan.gather == "packed_step" else 2 * block)
    tokens = plan.sequences * plan.length
    per_token = shape.layers * shape.width * (4.0 if checkpointed else ACTIVATION)
    if checkpointed:  # One block at a time is there in full.
        per_token += shape.width * ACTIVATION
    parts = {
        "latent weights, float32, sharded": 4 * shape.ternary / gpus,
        "gradients, float32, sharded": 4 * shape.ternary / gpus,
        "AdamW, float32, sharded": 8 * shape.ternary / gpus,
        "words of own rows": 0.25 * shape.ternary / gpus if plan.gather == "packed_layer" else 0.0,
        "packed words, whole, for forward and backward": words,
        "masks, whole": shape.ternary / 8,
        "whole gradients on their way (2)": 2 * plan.gradient_bytes * largest,
        "embedding and head: sharded states": 16 * shape.rest / gpus,
        "embedding and head: whole, with gradients": 8 * shape.rest,
        f"activations of {tokens:,} tokens" + (", checkpointed" if checkpointed else ""): tokens * per_token,
    }
    return {name: size / GIB for name, size in parts.items() if size > 0}
