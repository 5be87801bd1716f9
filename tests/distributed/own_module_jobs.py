"""Jobs of :mod:`tests.distributed.forked` that train a LightningModule of a user's own under the sharded strategy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from sbn_lightning import MaskRefresh, SparsityPatternLogger, TernarySparseConversion, convert_linears
from sbn_lightning.distributed import shard
from sbn_lightning.distributed.strategies import ShardedStrategy
from sbn_lightning.layers import masked_layers
from tests.helpers import Losses, quiet_trainer

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
ROWS = 24


class Net(nn.Module):
    """A transformer without attention, and with buffers that are drawn at random. gloo does not send int16."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)  # 4 does not divide 6, so the layer stays dense.
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU()) for _ in range(2))
        self.lm_head = nn.Linear(16, 4)
        self.register_buffer("noise", torch.randn(16))
        self.register_buffer("numbers", torch.randint(1000, (16,), dtype=torch.int16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.first(x) + self.noise
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden


class Own(LightningModule):
    """A module of a user: a step calls parts of the model one by one, and has no argument ``batch_idx``."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = Net()

    def forward(self, x: torch.Tensor) -> Any:
        return self.net.lm_head(self.net(x))

    def training_step(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def validation_step(self, batch: Any) -> None:
        x, y = batch
        self.log("val", nn.functional.mse_loss(self.net.lm_head(self.net(x)), y), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Late(Own):
    """A module that builds its layers in ``configure_model`` and names its blocks."""

    def __init__(self, seed: int) -> None:
        LightningModule.__init__(self)
        self.seed, self.net = seed, None

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(self.seed)
            self.net = Net()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.net.layers


class Whole(Net):
    """The same with its head."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(super().forward(x))
        return logits


class ByHand(Own):
    """A module that calls the backward by hand, and therefore converts and shards its network by hand."""

    def __init__(self, seed: int) -> None:
        LightningModule.__init__(self)
        self.automatic_optimization = False
        torch.manual_seed(seed)
        self.net = Whole()

    def configure_model(self) -> None:
        # The hook is called for each command of a Trainer. The second time there is nothing left to do.
        convert_linears(self.net, "2:4")
        options = self.trainer.strategy.sharding  # type: ignore[attr-defined]
        shard(self.net, self.device_mesh["data_parallel"], blocks=self.net.layers, **options)  # type: ignore[index]

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any) -> torch.Tensor:
        loss, optimizer = super().training_step(batch), self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss

    def validation_step(self, batch: Any) -> None:
        x, y = batch
        self.log("val", nn.functional.mse_loss(self(x), y), sync_dist=True)


def loader(rank: int, ranks: int) -> DataLoader[Any]:
    x = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x[rank::ranks], x[rank::ranks, :4].abs()), batch_size=8 // ranks)


def own_module(folder: Path) -> None:
    """Train on both ranks, which draw other weights. Losses and masks are those of rank 0 alone."""
    rank = int(os.environ["RANK"])

    def train(module: Own, strategy: Any, ranks: int) -> list[Any]:
        losses = Losses()
        callbacks = [MaskRefresh(), losses, SparsityPatternLogger(interval=2)]
        callbacks += [TernarySparseConversion("2:4")] * module.automatic_optimization
        options = {"strategy": strategy, "devices": ranks, "use_distributed_sampler": False}
        options["logger"] = TensorBoardLogger(folder)  # Rank 0 writes histograms, and all ranks gather the codes.
        trainer, mine = quiet_trainer(callbacks, **options), loader(rank if ranks > 1 else 0, ranks)
        trainer.validate(module, mine, verbose=False)
        trainer.fit(module, mine, mine)
        values = torch.tensor(losses.values)
        if ranks > 1:
            torch.distributed.all_reduce(values)
            values /= ranks
            trainer.save_checkpoint(folder / ("own.ckpt" if module.automatic_optimization else "by_hand.ckpt"))
        masks = [layer.packed_mask().clone() for _, layer in masked_layers(module)]
        return [*values.tolist(), trainer.callback_metrics["val"].item(), masks]

    with mock.patch.dict(os.environ):
        for name in PLACE:
            del os.environ[name]
        *expected, masks = train(Own(0), "auto", 1)
    assert len(masks) == 2
    assert len(expected) == 7
    for module, strategy in (
        (Own(rank), ShardedStrategy()),
        (Late(rank), ShardedStrategy(gather="packed_layer")),
        (Late(rank), ShardedStrategy(gather="latent")),
        (ByHand(0), ShardedStrategy(gather="packed_layer")),
    ):
        *found, made = train(module, strategy, 2)
        assert found == pytest.approx(expected, rel=1e-5), strategy.sharding
        assert all(torch.equal(one, other) for one, other in zip(made, masks, strict=True))
    # A checkpoint is one file, after all steps. A plain module takes it.
    for file, options in (("own.ckpt", {}), ("by_hand.ckpt", {"pattern": "2:4"})):
        plain = Own(5)
        TernarySparseConversion.load(plain, folder / file, **options)
        loaded = [layer.packed_mask() for _, layer in masked_layers(plain)]
        assert all(torch.equal(one, other) for one, other in zip(loaded, masks, strict=True))

    # Ranks that hold the same rows must begin with the same weights, also if each has drawn its own.
    torch.manual_seed(rank)
    net = Whole()
    convert_linears(net, "2:4")
    shard(net, init_device_mesh("cpu", (2,)), blocks=net.layers, replicate=2)
    for value in (*net.parameters(), *net.buffers()):
        mine = (value.detach().to_local() if isinstance(value, DTensor) else value.detach()).view(torch.uint8)
        everyone = [torch.empty_like(mine) for _ in range(2)]
        torch.distributed.all_gather(everyone, mine.contiguous())
        assert torch.equal(*everyone)
