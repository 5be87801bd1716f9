"""What the ranks of ``test_packed_rows`` check.

On GPUs: ``python -m tests.distributed.packed_worker RANKS FILE RANK cuda``, once for each GPU with the same new FILE.
There layers multiply with kernels, which are compiled first: some 65 variants for ``layers``, and some 25 more for
``models``. What follows ``cuda`` names some of the checks; ``layers:3`` is the check of one kind of layer. With one
rank each, processes with one check each fill Triton's cache beside each other.
"""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from sbn_lightning.backends.integer import KernelBackend
from sbn_lightning.backends.selection import choose
from sbn_lightning.core.errors import SBNError
from sbn_lightning.distributed import rows
from sbn_lightning.distributed.gradient_mean import GradientMean, replicate
from sbn_lightning.distributed.packed import shard_packed
from sbn_lightning.distributed.sharding import shard
from sbn_lightning.distributed.whole_states import load_weights
from sbn_lightning.layers import SparseBitLinear, masked_layers
from sbn_lightning.layers.sparse_bit_linear import ternary_layers
from sbn_lightning.models.transformer import TernaryTransformer
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.training import graphs
from sbn_lightning.training.graphs import GraphedLoss
from tests.helpers import Interrupted, small_config
from tests.interpreter import quick_interpreter

DEVICE = sys.argv[4] if len(sys.argv) > 4 and sys.argv[4] == "cuda" else "cpu"
STARTED = time.monotonic()


def say(what: str) -> None:
    """Print how far this rank is."""
    print(f"{time.monotonic() - STARTED:6.1f} s: {what}", flush=True)


def with_kernels(made: nn.Module) -> nn.Module:
    """The model on the device of this run; on a GPU with kernels in the ternary layers."""
    made.to(DEVICE)
    if DEVICE == "cuda":
        layers = ternary_layers(made)
        for name, choice in choose(
            layers, "int8", torch.device("cuda", torch.cuda.current_device()), torch.float32, 16
        ).items():
            layers[name].backend = choice.make("bf16")
    return made


# The number of ranks does not divide the rows; fewer rows than ranks; ranks that cut the parts of a fused weight.
CASES = [
    {"out": 16, "pattern": "2:4"},
    {"out": 7, "pattern": "6:8"},
    {"out": 1, "pattern": "2:4"},
    {"out": 11, "pattern": "2:4", "split_sizes": (5, 2, 4)},
    {"out": 11, "pattern": "1:4", "split_sizes": (5, 2, 4), "gamma_over": "kept"},
    {"out": 9, "pattern": "2:4", "gamma_over": "masked"},
    {"out": 9, "pattern": "2:4", "gamma_over": "nonzero", "split_sizes": (8, 1)},
    {"out": 9, "pattern": "2:4", "mask_source": "ternary"},
    {"out": 9, "pattern": "2:4", "gradient": "masked"},
    {"out": 9, "pattern": "4:4"},
    {"out": 11, "pattern": "2:4", "split_sizes": (5, 2, 4), "learnable_scales": True},
]


def check(case: dict[str, object], ranks: int, held: bool, share: float, rounding: float) -> None:
    """Compare a layer with the same layer in one process, before and after an optimiser step of two micro-batches.

    Args:
        case: The options of the layer.
        ranks: The number of ranks.
        held: Whether the mask stays as it is.
        share: The share of a ramp of the density.
        rounding: The share of the rounding of weights that is in effect.
    """
    options = dict(case)
    torch.manual_seed(3)
    alone = nn.Sequential(nn.Linear(8, 32), SparseBitLinear(32, options.pop("out"), **options))
    alone = with_kernels(alone)
    sharded = deepcopy(alone)
    weights = shard_packed(sharded, init_device_mesh(DEVICE, (ranks,)))
    assert weights == {parameter for parameter in sharded[1].parameters() if isinstance(parameter, DTensor)}
    models = [alone, sharded]
    # Weights of the first layer are no DTensor, and no operator takes both kinds in one list.
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5, foreach=False) for model in models]
    for model in models:
        model[1].hold_mask = held
        if share < 1:
            model[1].set_density(model[1].pattern.n, share)
        model[1].set_rounding(rounding)
    for _ in range(2):
        tokens = torch.randn(2, 5, 8).to(DEVICE)
        for micro_batch in tokens:
            outputs = [model(micro_batch) for model in models]
            assert torch.equal(*outputs), case
            for output in outputs:
                output.square().sum().backward()
        with torch.no_grad():
            for parameter in sharded[0].parameters():  # DDP or FSDP2 would do this for the plain layer
                dist.all_reduce(parameter.grad)
                parameter.grad /= ranks
        # The sum of three equal gradients, divided by three, is rounded twice.
        torch.testing.assert_close(sharded[1].weight.grad.full_tensor(), alone[1].weight.grad, rtol=1e-5, atol=1e-5)
        with torch.no_grad():  # Use equal gradients, because an average over three ranks is rounded.
            sharded[1].weight.grad.to_local().copy_(
                torch.distributed.tensor.distribute_tensor(
                    alone[1].weight.grad, sharded[1].weight.device_mesh, sharded[1].weight.placements
                ).to_local()
            )
            for mine, other in zip(sharded[0].parameters(), alone[0].parameters(), strict=True):
                mine.grad.copy_(other.grad)
            if sharded[1].learnable_scales:
                scales = sharded[1].log_scale.grad.to_local()
                assert alone[1].log_scale.grad.abs().min() > 0
                torch.testing.assert_close(scales, alone[1].log_scale.grad, rtol=1e-5, atol=1e-5)
                scales.copy_(alone[1].log_scale.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(sharded[1].packed_mask(), alone[1].packed_mask()), case
        assert torch.equal(sharded[1].ternary()[1], alone[1].ternary()[1]), case
    assert torch.equal(sharded.state_dict()["1.weight"].full_tensor(), alone.state_dict()["1.weight"])


def model(
    mesh: DeviceMesh | None,
    gather: str = "packed_step",
    reduce_dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    **changes: object,
) -> nn.Module:
    """A small transformer of mixed layers, sharded over a mesh if there is one."""
    torch.manual_seed(5)
    made = TernaryTransformer(small_config(pattern="2:4", d_ffn=40, **changes))
    learned = made.config.learnable_scales
    for layer, pattern, over in (
        (made.blocks[0].mlp.down, "2:4", "nonzero"),
        (made.blocks[1].attention.o, "4:8", "kept"),
    ):
        layer.sparsity = SparsityConfig(pattern=pattern, gamma_over=over, learnable_scales=learned)
    made = with_kernels(made)
    if mesh is not None:
        shard(made, mesh, gather=gather, reduce_dtype=reduce_dtype)
    if compiled:
        made.compile_blocks(backend="aot_eager")
    return made


def train(
    made: nn.Module,
    steps: int = 2,
    clip: float | None = None,
    graphed: GraphedLoss | None = None,
    mean: GradientMean | None = None,
    interval: int = 1,
) -> list[float]:
    """Losses of some optimiser steps of two micro-batches, and of a validation after each.

    With ``clip`` the norm of all gradients is limited to that number, and the losses are followed by the norm. With
    ``graphed`` micro-batches are replayed. With ``mean`` each rank has tokens of its own, and gradients are averaged in
    the second micro-batch. Masks are made anew in every step whose number ``interval`` divides.
    """

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return made.loss(rows[:, :-1], rows[:, 1:])  # type: ignore[no-any-return, operator]

    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0 if mean is None else dist.get_rank())
    seen = []
    for step in range(steps):
        for _, layer in masked_layers(made):
            layer.hold_mask = step % interval > 0
        for last in (False, True):
            tokens = torch.randint(320, (2, 9), generator=generator).to(DEVICE)
            with nullcontext() if mean is None or last else mean.held():
                loss = loss_of(tokens) if graphed is None else graphed(made, loss_of, tokens)
                with nullcontext() if mean is None else mean.backward(made):
                    loss.backward()
            seen.append(loss.item())
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(made.parameters(), clip)
            seen.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
        optimizer.step()
        optimizer.zero_grad()
        # Compiled blocks validate as they are, because a second graph would take as long as all other checks together.
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
            seen.append(made(tokens).float().sum().item())
    return seen


def check_models(ranks: int) -> None:
    """``packed_step`` and ``packed_layer`` give the same bits, however the blocks run, and those of one process."""
    alone, mesh = model(None), init_device_mesh(DEVICE, (ranks,))
    expected = train(alone)
    masks = {name: layer.packed_mask().clone() for name, layer in masked_layers(alone)}
    first = None
    ways = [
        ("packed_step", {}),
        ("packed_layer", {}),
        ("packed_layer", {"activation_checkpointing": True}),
        ("packed_layer", {"compiled": True}),
        ("packed_step", {"activation_checkpointing": True}),
        ("packed_step", {"compiled": True}),
    ]
    for gather, changes in ways if ranks == 2 else ways[:2]:
        made = model(mesh, gather, **changes)
        compiled = changes.pop("compiled", False)
        losses = train(made)
        say(f"{gather} {changes} {compiled}")
        assert losses[0] == expected[0], gather
        assert losses == pytest.approx(expected, rel=1e-5), gather
        first = first or losses
        assert losses == (first if not compiled else pytest.approx(first, rel=1e-5)), (gather, changes)
        for name, layer in masked_layers(made):
            assert torch.equal(layer.packed_mask(), masks[name]), (gather, name)
            assert torch.equal(layer.ternary()[0] != 0, layer.effective_weight() != 0)
            memory = layer._prepared.codes.untyped_storage().nbytes()
            assert (memory == 0) == (gather == "packed_layer"), name
        if changes or compiled:
            continue
        can_go_on = hasattr(made, "reset_iter_state")
        if can_go_on:
            fail(made)
        load_weights(made, model(None).state_dict())  # A load in the middle: the training starts again.
        assert train(made) == losses, gather
        if not can_go_on:
            fail(made)
            with pytest.raises(SBNError, match="cannot go on after it: start again from the last checkpoint"):
                train(made)
    tokens = torch.arange(9).view(1, 9).to(DEVICE)
    with counted() as calls:
        made = model(mesh)
        for _ in range(2):  # The second micro-batch and the backwards gather nothing.
            made.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    assert calls == [2 + 1], calls  # terms, terms of gamma over non-zero codes, words


def fail(made: nn.Module) -> None:
    """Begin a backward that raises an error on all ranks, when the second block has sent its gradients."""

    def stop(gradient: torch.Tensor) -> None:
        raise Interrupted

    tokens = torch.arange(9).view(1, 9).to(DEVICE)
    handle = made.blocks[0].register_forward_hook(lambda block, x, y: y.register_hook(stop) and None)
    loss = made.loss(tokens[:, :-1], tokens[:, 1:])
    handle.remove()
    with pytest.raises(Interrupted):
        loss.backward()
    made.zero_grad()


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count how many collectives gather rows."""
    calls, gather = [0], rows.all_gather

    def call(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        return gather(*args, **kwargs)

    with mock.patch.object(rows, "all_gather", call):
        yield calls


def check_layers(ranks: int, number: int | None = None) -> None:
    """Check single layers of all kinds.

    Args:
        ranks: The number of ranks.
        number: The only case to check; None for all.
    """
    for case in CASES if number is None else [CASES[number]]:
        for held, share, rounding in ((False, 1.0, 1.0), (True, 1.0, 1.0), (False, 0.6, 1.0), (False, 1.0, 0.4)):
            check(case, ranks, held, share, rounding)
        say(str(case))


def check_scales(ranks: int) -> None:
    """Learned scales train as in one process, whatever the ranks gather."""
    alone, mesh = model(None, learnable_scales=True), init_device_mesh(DEVICE, (ranks,))
    expected = train(alone, clip=0.5)
    for gather in ("packed_step", "packed_layer", "latent"):
        made = model(mesh, gather, learnable_scales=True)
        assert train(made, clip=0.5) == pytest.approx(expected, rel=1e-5), gather
        say(gather)
        for (name, layer), other in zip(ternary_layers(made).items(), ternary_layers(alone).values(), strict=True):
            assert other.log_scale.abs().min() > 0, name
            torch.testing.assert_close(layer.log_scale.full_tensor(), other.log_scale, rtol=1e-4, atol=1e-6, msg=name)
            torch.testing.assert_close(layer.ternary()[1], other.ternary()[1], rtol=1e-4, atol=0, msg=name)
    # FSDP2 shards experts, and their scales with them.
    alone = with_kernels(TernaryTransformer(small_config(n_layers=1, n_experts=4, d_expert=16, learnable_scales=True)))
    made = deepcopy(alone)
    shard(made, mesh)
    assert train(made, clip=0.5) == pytest.approx(train(alone, clip=0.5), rel=1e-5)


def check_graphs(ranks: int) -> None:
    """Micro-batches that are replayed as CUDA graphs, with their collectives, train as they do without graphs."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # The backward of attention adds in any order otherwise.
    mesh, record = init_device_mesh(DEVICE, (ranks,)), graphs.record
    biased = {"qkv_bias": True, "tie_embeddings": False, "reduce_dtype": torch.bfloat16}
    for changes in (biased, {"activation_checkpointing": True, "learnable_scales": True}):
        for compiled in (False, True):
            expected = train(model(mesh, compiled=compiled, **changes), steps=8, clip=0.5)
            with mock.patch.object(graphs, "record", side_effect=record) as recorded:
                made = model(mesh, compiled=compiled, **changes)
                assert train(made, steps=8, clip=0.5, graphed=GraphedLoss()) == expected, changes
            assert recorded.call_count == 2
        say(f"graphs {changes}")
    world = cast(dist.ProcessGroup, dist.group.WORLD)
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for graphed in (None, GraphedLoss()):
            with mock.patch.object(graphs, "record", side_effect=record) as recorded:
                made = model(None)
                mean = replicate(made, world, dtype)
                found.append(train(made, steps=12, clip=0.5, graphed=graphed, mean=mean, interval=2))
        assert recorded.call_count == 8  # Masks that are fresh or held; gradients that stay or travel.
        assert found[0] == found[1], dtype
        say(f"graphs of sbn_ddp {dtype}")


def check_codes(ranks: int) -> None:
    """Layers whose kernels read packed words alone keep no codes, and what reads codes still finds them."""
    mesh = init_device_mesh(DEVICE, (ranks,))
    torch.manual_seed(3)
    alone = nn.Sequential(SparseBitLinear(96, 40, pattern="2:4"), nn.Flatten(0)).to(DEVICE)
    with nullcontext() if DEVICE == "cuda" else quick_interpreter():
        for kernel, drops in (("hopper-sparse", True), ("portable", False)):
            alone[0].backend = KernelBackend(kernel, gradients="int8")
            alone[0].prepare()
            for layered in (False, True):
                made = deepcopy(alone)
                shard_packed(made, mesh, layered=[made] if layered else ())
                compare_forms(made[0], alone[0], drops)


def compare_forms(layer: SparseBitLinear, alone: SparseBitLinear, drops: bool) -> None:
    """Compare what a sharded layer prepares with what the layer prepares in one process.

    Args:
        layer: The sharded layer.
        alone: The same layer in one process.
        drops: Whether the kernels read packed words alone.
    """
    layer.prepare()
    assert (layer._prepared.codes is None) == drops
    assert layer._prepared.mask_bits is layer.mask_bits
    assert torch.equal(layer.ternary()[0], alone.ternary()[0])
    if (unit := layer.backend.unit) is not None:
        words = layer._prepared.transposed.untyped_storage()
        assert words.nbytes() == 0
        unit.gather()
        assert words.nbytes() > 0
    for part in ("packed", "transposed", "row_scale", "mask_bits"):
        found, expected = (getattr(one._prepared, part) for one in (layer, alone))
        assert found is expected is None or torch.equal(found, expected), part
    layer.set_rounding(0.5, 1.0)  # Now the forward reads the codes.
    layer.prepare()
    assert layer._prepared.codes is not None


def main() -> None:
    ranks, file, rank = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
        faulthandler.dump_traceback_later(30, repeat=True)  # So that a log tells what takes long.
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=ranks)
    checks = {"layers": check_layers, "models": check_models, "codes": check_codes, "scales": check_scales}
    if DEVICE == "cuda":
        checks["graphs"] = check_graphs
    for name in sys.argv[5:] or checks:
        say(f"{name} begin")
        kind, _, number = name.partition(":")
        checks[kind](ranks, *([int(number)] if number else []))
    say("done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
