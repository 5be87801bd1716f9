"""Jobs of :mod:`tests.distributed.forked` that replay micro-batches on several ranks, without CUDA."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from sbn_lightning import TernarySparseConversion
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed import gradient_mean
from sbn_lightning.distributed.strategies import ReplicatedStrategy, ShardedStrategy
from sbn_lightning.distributed.whole_parameters import local
from sbn_lightning.fabric import FabricRun, train
from sbn_lightning.models.transformer import TernaryTransformer
from sbn_lightning.training import graphs
from sbn_lightning.training.graphs import GraphedLoss
from tests.helpers import Losses, quiet_trainer, small_module, token_loader, unbounded


def graphed(folder: Path) -> None:
    """Train with graphs of the step under ``sbn_ddp``, and without: the losses and weights are the same."""
    # Micro-batches that send their gradients have graphs of their own.
    with_and_without_graphs(ReplicatedStrategy, recorded=4)
    with_and_without_graphs(partial(ReplicatedStrategy, reduce_dtype="bfloat16"), recorded=4, odd=7)
    # A step has four micro-batches that stay, and one that sends. The second step unfreezes a parameter, so everything
    # is recorded after it: micro-batches that stay in the third step, and those that send in the fourth.
    unfrozen: dict[str, Any] = {"max_steps": 4, "accumulate_grad_batches": 5, "callbacks": [Unfreeze()]}
    with_and_without_graphs(ReplicatedStrategy, unfrozen, {"tie_embeddings": False}, recorded=4, plain=11, batches=20)


class Unfreeze(Callback):
    """Trains the embedding, which is the first parameter, from the second optimiser step on."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.model.embed.weight.requires_grad_(trainer.global_step > 0)


def graphed_sharded(folder: Path) -> None:
    """The same under ``sbn_fsdp2``. Validations run without graphs."""
    validated = {"val_check_interval": 4, "limit_val_batches": 1, "num_sanity_val_steps": 1}
    uneven = {"tie_embeddings": False, "vocab_size": 65, "qkv_bias": True}
    quick = partialmethod(TernaryTransformer.compile_blocks, backend="aot_eager")
    with mock.patch.object(TernaryTransformer, "compile_blocks", quick):
        with_and_without_graphs(ShardedStrategy, validated, uneven, compiled=True)
    recomputed = {"activation_checkpointing": True, "learnable_scales": True, "n_layers": 2}
    halved = partial(ShardedStrategy, reduce_dtype="bfloat16")
    for odd in (6, 7):  # The first micro-batch of an optimiser step, and the second.
        with_and_without_graphs(halved, changes=recomputed, odd=odd)
    with_and_without_graphs(halved, odd=7, odd_rank=0)  # The other rank replays, and sends and receives the same.


class Bare(LightningModule):
    """A module of somebody else, whose whole training step is replayed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Embedding(512, 16), torch.nn.Linear(16, 32), torch.nn.Linear(32, 512))
        self.graphed = GraphedLoss()

    def compute_loss(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Any) -> torch.Tensor:
        return self.graphed(self, self.compute_loss, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def graphed_bare(folder: Path) -> None:
    """FSDP2 gathers a module of somebody else for its training step, and a graph cannot hold that."""
    options = {"devices": 2, "max_steps": 4, "use_distributed_sampler": False}
    for strategy in (ReplicatedStrategy(), ShardedStrategy()):
        module = Bare()
        trainer = quiet_trainer([TernarySparseConversion("2:4", exclude=())], strategy=strategy, **options)
        refused = pytest.raises(ConfigError, match="use the strategy sbn_ddp, or replay in a method for which")
        with recordings(module) as calls, refused if isinstance(strategy, ShardedStrategy) else nullcontext():
            trainer.fit(module, Tokens())
        if isinstance(strategy, ReplicatedStrategy):
            assert calls == {"recorded": 2, "replayed": 2 * (4 - 2)}


class Tokens(LightningDataModule):
    """Ten micro-batches of this rank."""

    def train_dataloader(self) -> Any:
        rank = int(os.environ["RANK"])
        return token_loader(batches=10, batch_size=2, length=9, rank=rank, world=2)

    val_dataloader = train_dataloader


def graphed_fabric(folder: Path) -> None:
    """The same in the Fabric loop, under ``sbn_ddp`` and ``sbn_fsdp2``."""
    options = {"max_steps": 5, "accumulate_grad_batches": 2, "limit_val_batches": 1, "val_check_interval": 4}
    for strategy, recorded in (("sbn_ddp", 4), ("sbn_fsdp2", 2)):
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        found = []
        for cuda_graphs in (False, True):
            module = small_module(pattern="2:4", qkv_bias=True)
            module.cuda_graphs = cuda_graphs
            with recordings(module) as calls, mock.patch("sbn_lightning.training.module.check_graphs"):
                train(FabricRun(fabric, **options, enable_progress_bar=False), module, Tokens())
            found.append(whole_weights(module))
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True)), strategy
        assert calls == {"recorded": recorded, "replayed": 2 * (10 - recorded)}, strategy


@contextmanager
def recordings(module: torch.nn.Module) -> Iterator[dict[str, int]]:
    """Replace CUDA graphs by calls, and count recordings and replays."""
    calls = {"recorded": 0, "replayed": 0}

    def record(function: Any, pool: Any) -> Any:
        sends = [not mean.hold for mean in gradient_mean._attached]

        def replay() -> None:
            calls["replayed"] += 1
            # A graph sends what was sent at its recording, and here hooks decide each time.
            assert sends == [not mean.hold for mean in gradient_mean._attached]
            with torch.enable_grad():
                function()

        calls["recorded"] += 1
        gradients = [local(parameter.grad) for parameter in module.parameters() if parameter.grad is not None]
        before = [gradient.clone() for gradient in gradients]
        function()
        torch._foreach_copy_(gradients, before)  # A recording computes nothing.
        return replay

    with mock.patch.object(graphs, "record", record):
        yield calls


def whole_weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """The parameters of a module, whole on this rank."""
    weights = [parameter.detach() for parameter in module.parameters()]
    return [weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in weights]


def with_and_without_graphs(
    strategy: Any,
    options: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
    compiled: bool = False,
    recorded: int = 2,
    odd: int = 99,
    odd_rank: int | None = None,
    plain: int | None = None,
    batches: int = 10,
) -> None:
    """Train on this rank with graphs and without, and compare.

    Args:
        strategy: A function that makes the strategy.
        options: Further options of the Trainer.
        changes: Changes of the model.
        compiled: Whether blocks are compiled.
        recorded: How many graphs are recorded: a forward and a backward for each kind of micro-batch.
        odd: The number of a micro-batch that has another shape, and runs without the graphs; 99 for none.
        odd_rank: The rank that has this micro-batch; None for all.
        plain: How many micro-batches of one shape run without the graphs; None for as many as graphs are recorded.
        batches: How many micro-batches there are.
    """
    rank = int(os.environ["RANK"])
    if odd_rank not in (None, rank):
        odd = 99
    given: dict[str, Any] = {"max_steps": 5, "accumulate_grad_batches": 2} | (options or {})
    validates, callbacks = "limit_val_batches" in given, given.pop("callbacks", [])
    found = []
    for cuda_graphs in (False, True):
        module, losses = small_module(pattern="2:4", **(changes or {})), Losses()
        module.cuda_graphs, module.hparams["compile"] = cuda_graphs, compiled
        trainer = quiet_trainer(
            [losses, *callbacks], strategy=strategy(), devices=2, gradient_clip_val=0.5,
            use_distributed_sampler=False, **given,
        )  # fmt: skip
        with recordings(module) as calls, mock.patch("sbn_lightning.training.module.check_graphs"):
            loader = token_loader(batches=batches, batch_size=2, length=9, rank=rank, world=2, vocab_size=64)
            given_batches = list(loader)
            given_batches[odd : odd + 1] = [rows[:, :7] for rows in given_batches[odd : odd + 1]]
            trainer.fit(module, unbounded(given_batches), loader if validates else None)
        seen = [trainer.callback_metrics["val/loss"].item()] if validates else []
        found.append((losses.values + seen, whole_weights(module)))
    (losses_before, expected), (losses_of_graphs, weights) = found
    assert losses_of_graphs == losses_before
    assert all(torch.equal(one, other) for one, other in zip(weights, expected, strict=True))
    unreplayed = (recorded if plain is None else plain) + (odd < batches)
    assert calls == {"recorded": recorded, "replayed": 2 * (batches - unreplayed)}
