"""Jobs of :mod:`tests.distributed.forked` that train with a Trainer: signals, validations, averages, and savers."""

from __future__ import annotations

import json
import os
import signal
import threading
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback

from sbn_lightning import DurableCheckpoint
from sbn_lightning.distributed.strategies import ShardedStrategy
from tests.distributed.sharded_fit import fit, full_disk
from tests.helpers import quiet_trainer, small_module, token_loader


def stopped(folder: Path, rank: int) -> None:
    """Send a SIGTERM to one rank in its third micro-batch, and write down where this rank stops."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from sbn_lightning.distributed.strategies import ReplicatedStrategy

    here, batches, ended = int(os.environ["RANK"]), [], "nothing"

    class Stop(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batches.append(batch_idx)
            if here == rank and batch_idx == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    strategy = ReplicatedStrategy(max_ctas=8)  # Only NCCL knows what that is.
    trainer = quiet_trainer([Stop()], strategy=strategy, devices=2, max_steps=8)
    loader = token_loader(batches=8, batch_size=2, length=9, rank=here, world=2)
    try:
        trainer.fit(small_module(pattern="4:8", n_layers=1), loader)
    except SIGTERMException as error:
        ended = type(error).__name__
    (folder / f"rank{here}.json").write_text(json.dumps({"batches": batches, "ended": ended}))


def validated(folder: Path) -> None:
    """Validate in inference mode and then train, in one program. Losses are those of training alone."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    data = {"length": 9, "rank": rank, "world": ranks, "batch_size": 2}

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(outputs["loss"].item())

    for gather in ("packed_step", "latent"):
        found = []
        for first in (False, True):
            seen: list[float] = []
            torch.manual_seed(0)
            module = small_module(pattern="4:8", n_layers=1)
            trainer = quiet_trainer(
                [Losses()], strategy=ShardedStrategy(gather=gather, max_ctas=8), devices=ranks, max_steps=3
            )
            if first:
                # With gloo Lightning does not use the inference mode, as it does with NCCL.
                with mock.patch("lightning.pytorch.loops.utilities._distributed_is_initialized", return_value=False):
                    trainer.validate(module, token_loader(batches=1, **data), verbose=False)
            trainer.fit(module, token_loader(batches=3, **data))
            found.append(seen)
        assert len(found[0]) == 3
        assert found[1] == found[0], (gather, found)


def background(folder: Path) -> None:
    """Write checkpoints in the background: slowly, so that training overtakes them, and then onto a full disk."""
    from torch.distributed.checkpoint import FileSystemWriter

    from sbn_lightning.checkpoints.sharded import what_is_missing
    from sbn_lightning.core.errors import DataError

    rank, may_write, write = int(os.environ["RANK"]), threading.Event(), FileSystemWriter.write_data
    seen: list[dict[str, str]] = []

    def slow(*args: Any) -> Any:
        may_write.wait(60)
        return write(*args)

    def full(*args: Any) -> Any:
        return full_disk("shard") if rank == 1 else write(*args)

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            may_write.clear()  # The callback that saves comes later.

        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            seen.append({path.name: what_is_missing(path) for path in sorted(folder.glob("*.ckpt"))})
            trainer.strategy.barrier()  # Both ranks have looked.
            may_write.set()

        def on_train_end(self, *args: Any) -> None:
            may_write.set()

    options = {"save_distributed_checkpoint": True, "save_in_background": True}
    with mock.patch.object(FileSystemWriter, "write_data", slow):
        fit(folder, 3, callbacks=[Watch()], keep=1, **options)
    assert [set(one) for one in seen] == [set(), {"step=1.ckpt"}, {"step=1.ckpt", "step=2.ckpt"}]
    assert [bool(one[name]) for one in seen[1:] for name in sorted(one)] == [True, False, True]  # What is not whole.
    if rank == 0:  # It writes the last file.
        assert [(path.name, what_is_missing(path)) for path in folder.glob("*.ckpt")] == [("step=3.ckpt", "")]
    with (
        mock.patch.object(FileSystemWriter, "write_data", full),
        pytest.raises(DataError, match=r"cannot write the checkpoint .*step=1.ckpt: rank 1: .*No space left on device"),
    ):
        fit(folder / "full", 3, **options)


def mean(folder: Path) -> None:
    """Average gradients where they lie, and compare them with those of torch's DDP."""
    from copy import deepcopy

    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.checkpoint import checkpoint

    from sbn_lightning import TernaryTransformer
    from sbn_lightning.core.errors import ConfigError
    from sbn_lightning.distributed import gradient_mean
    from sbn_lightning.distributed.gradient_mean import GradientMean
    from tests.helpers import small_config

    torch.distributed.init_process_group("gloo")
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    torch.manual_seed(0)
    model = TernaryTransformer(small_config(pattern="4:8", n_layers=2))
    model.norm.weight.requires_grad_(False)
    torch.manual_seed(rank)
    batches = torch.randint(320, (2, 2, 9))

    def gradients(made: Any, between: Any, last: Any = nullcontext) -> list[torch.Tensor]:
        with between():
            made(batches[0]).square().mean().backward()
        with last():
            made(batches[1]).square().mean().backward()
        return [parameter.grad for parameter in made.parameters() if parameter.requires_grad]

    def by_torch(made: Any) -> list[torch.Tensor]:
        other = DistributedDataParallel(deepcopy(made))
        other.zero_grad()
        return gradients(other, other.no_sync)

    expected = by_torch(model)
    sizes = sorted({parameter.nbytes for parameter in model.parameters()})
    # Some parameters travel alone, and the others together. Then all travel together, and copies have no room.
    for alone, copies in ((sizes[-2], 2**28), (2**24, 1)):
        with (
            mock.patch.object(gradient_mean, "ALONE", alone),
            mock.patch.object(gradient_mean, "COPIES", copies),
        ):
            for dtype, bound in ((torch.float32, 0.0), (torch.bfloat16, 0.01)):
                made = deepcopy(model)
                averages = GradientMean(made, group, dtype)
                held = partial(mock.patch.object, averages, "hold", True)
                found = gradients(made, held, partial(averages.backward, made))
                for mine, other in zip(found, expected, strict=True):
                    assert (mine - other).norm() <= bound * other.norm()
    # A parameter that is freed gets its mean as the others do, and one that is frozen is not missed.
    for frozen in ("embed.weight", None):
        made.zero_grad()
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(name != frozen)
        found = gradients(made, held, partial(averages.backward, made))
        for mine, other in zip(found, by_torch(made), strict=True):
            assert (mine - other).norm() <= 0.01 * other.norm()
    averages.detach()

    def refused(message: str, backward: Any) -> None:
        broken = deepcopy(model)
        averages = GradientMean(broken, group)
        with pytest.raises(ConfigError, match=message), averages.backward(broken):
            backward(broken.embed)
        with pytest.raises(ConfigError, match="an earlier backward raised an error"), averages.backward(broken):
            pass
        averages.detach()

    def twice(embed: Any) -> None:
        for _ in range(2):
            embed(batches[0]).sum().backward()

    def sparse(embed: Any) -> None:
        torch.nn.functional.embedding(batches[0], embed.weight, sparse=True).sum().backward()

    missing = r"blocks\.1\.mlp\.down\.weight.*, \.\.\. took no part in the loss"
    refused(missing, lambda embed: embed(batches[0]).sum().backward())
    refused(r"embed\.weight got a gradient again before all parameters had one", twice)
    refused(r"embed\.weight has a sparse gradient", sparse)
    # Gradients of float64 are not rounded. The replay of a graph calls no hooks, and has sent its gradients.
    made = deepcopy(model).double()
    averages = GradientMean(made, group)
    held = partial(mock.patch.object, averages, "hold", True)
    found, expected = gradients(made, held, partial(averages.backward, made)), by_torch(made)
    with averages.backward(made):
        averages.replayed()
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)
    # A reentrant checkpoint has a backward of its own within the backward.
    layers, found = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))), []
    for run in (lambda layer, x: layer(x), partial(checkpoint, use_reentrant=True)):
        layers.zero_grad()
        with mock.patch.object(gradient_mean, "ALONE", 1):
            averages = GradientMean(layers, group)
        x = batches[0, :, :4].float().requires_grad_()
        for layer in layers:
            x = run(layer, x)
        with averages.backward(layers):
            x.square().mean().backward()
        averages.detach()
        found.append([parameter.grad for parameter in layers.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    torch.distributed.destroy_process_group()


def fabric_mean(folder: Path) -> None:
    """Train two models under ``sbn_ddp`` of Fabric. Ranks begin with other weights, and end with those of one rank."""
    from lightning.fabric import Fabric

    from sbn_lightning import TernaryTransformer
    from sbn_lightning.core.errors import ConfigError
    from tests.helpers import small_config

    torch.manual_seed(0)
    tokens = torch.randint(320, (2, 2, 2, 9))  # Micro-batches, ranks, rows.

    def make(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return TernaryTransformer(small_config(pattern="4:8", n_layers=1))

    alone = make(1)
    for micro_batch in tokens:
        alone(micro_batch.flatten(0, 1)).square().mean().backward()
    fabric = Fabric(accelerator="cpu", devices=2, strategy="sbn_ddp")
    fabric.launch()
    rank = fabric.global_rank
    models = [fabric.setup_module(make(1 + 10 * rank + i)) for i in range(2)]
    with pytest.raises(ConfigError, match=r"fabric\.backward\(loss, model=model\)"):
        fabric.backward(models[0](tokens[0, rank]).square().mean())
    for i, micro_batch in enumerate(tokens):
        with fabric.no_backward_sync(models[0], enabled=i == 0):
            fabric.backward(models[0](micro_batch[rank]).square().mean(), model=models[0])
    for mine, other in zip(models[0].parameters(), alone.parameters(), strict=True):
        assert (mine.grad - other.grad).norm() <= 1e-5 * other.grad.norm()
    assert all(parameter.grad is None for parameter in models[1].parameters())


def averaged(folder: Path, first: str | None = None) -> None:
    """Train with averaged weights under the sharded strategy, or alone, and write down what a validation saw.

    Args:
        folder: The folder to write to.
        first: The folder of the run to continue from its third step; None for a new run.
    """
    from sbn_lightning import MaskRefresh
    from sbn_lightning.callbacks.weight_averaging import SparseEMAWeightAveraging
    from sbn_lightning.layers import masked_layers

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seen: dict[str, list[Any]] = {"losses": [], "validations": [], "masks": []}

    class Witness(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen["losses"].append(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean").item())

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen["masks"].append([layer.packed_mask().clone() for _, layer in masked_layers(pl_module)])

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen["validations"].append(trainer.callback_metrics["val/loss"].item())

    saver = DurableCheckpoint(dirpath=str(folder), filename="{step}", every_n_train_steps=3, save_top_k=-1)
    average = SparseEMAWeightAveraging(decay=0.6)
    strategy: Any = "auto" if ranks == 1 else ShardedStrategy()
    trainer = quiet_trainer(
        [MaskRefresh(interval=2), average, Witness(), saver],
        strategy=strategy,
        devices=ranks,
        max_steps=6,
        limit_val_batches=1,
        enable_checkpointing=True,
        use_distributed_sampler=False,
    )
    data = {"length": 9, "rank": rank, "world": ranks, "batch_size": 4 // ranks}
    checkpoint = None if first is None else str(Path(first) / "step=3.ckpt")
    module = small_module(pattern="4:8", n_layers=1)
    trainer.fit(module, token_loader(batches=3, **data), token_loader(batches=1, **data), ckpt_path=checkpoint)
    torch.save(seen, folder / f"rank{rank}.pt")
    trainer.save_checkpoint(folder / "end.ckpt")


def distilled(folder: Path) -> None:
    """Train students whose teacher is whole on each rank. Losses under each strategy are those of one process."""
    from lightning.fabric import Fabric
    from lightning.pytorch import LightningDataModule

    from sbn_lightning import RoundingWarmup, SparseBitNet, TernaryTransformer
    from sbn_lightning.callbacks.base import RunCallback
    from sbn_lightning.checkpoints import lightning_file
    from sbn_lightning.distributed.strategies import ReplicatedStrategy
    from sbn_lightning.fabric.loop import FabricRun, train
    from sbn_lightning.training.answers import AnswerLoss
    from sbn_lightning.training.distillation import Distillation
    from tests.helpers import small_config

    rank, shape = int(os.environ["RANK"]), {"n_layers": 1, "tie_embeddings": False}
    teacher, theirs = folder / f"teacher{rank}.ckpt", folder / f"hugging_face{rank}"
    torch.manual_seed(0)
    dense = TernaryTransformer(small_config(linear="dense", **shape))
    torch.save(lightning_file.contents(dense.config, dense.state_dict()), teacher)
    optimizer = partial(torch.optim.AdamW, lr=3e-3)
    warmup, relations = RoundingWarmup(0.5, total_steps=3), {"relations": 0.1, "relation_block": -1}

    def own(**options: Any) -> SparseBitNet:
        torch.manual_seed(1)
        losses = Distillation(str(teacher), **({"language_model": 0.5, "hidden": 0.1, **relations} | options))
        config = small_config(pattern="2:4", **shape)
        return SparseBitNet(config, optimizer, init_from=str(teacher), distillation=losses)

    def hugging_face() -> SparseBitNet:
        from transformers import LlamaConfig, LlamaForCausalLM

        from sbn_lightning.integrations.huggingface.causal_lm import CausalLM

        torch.manual_seed(1)
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(vocab_size=320, **small)).save_pretrained(theirs)
        options = {"distillation": Distillation(str(theirs), language_model=0.5), "learnable_scales": True}
        return CausalLM(str(theirs), "ternary", "2:4", optimizer=optimizer, **options)

    def answers(distil: bool) -> SparseBitNet:  # Rank 1 has no answer.
        module = own(hidden=0.0, relations=0.0)
        module.distillation = module.distillation if distil else None
        module.answer_loss = AnswerLoss(token_loader(batches=1, length=9).dataset[0][:1].tolist(), [319])
        return module

    class Data(LightningDataModule):
        def __init__(self, ranks: int = 2) -> None:
            super().__init__()
            self.options = {"batch_size": 4 // ranks, "length": 9, "rank": rank % ranks, "world": ranks}

        def train_dataloader(self) -> Any:
            return token_loader(batches=3, **self.options)

        def val_dataloader(self) -> Any:
            return token_loader(batches=1, **self.options)

    class Losses(RunCallback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            loss = outputs["loss"].detach().clone()
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(loss)
                loss /= 2
            seen.append(loss.item())

    def fit(module: SparseBitNet, strategy: Any = "auto", ranks: int = 2) -> list[float]:
        seen.clear()
        options = {"strategy": strategy, "devices": ranks, "use_distributed_sampler": False}
        trainer = quiet_trainer([warmup, Losses()], max_steps=3, **options)
        trainer.fit(module, Data(ranks))
        return [*seen, trainer.callback_metrics["val/loss"].item()]

    seen: list[float] = []
    strategies = (ReplicatedStrategy, ShardedStrategy)
    more = {own: [partial(ShardedStrategy, gather="latent")]}
    for make in (hugging_face, own) if find_spec("transformers") else (own,):
        with mock.patch.dict(os.environ):
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
                del os.environ[name]
            expected = fit(make(), ranks=1)
        for strategy in (*strategies, *more.get(make, ())):
            assert fit(make(), strategy()) == pytest.approx(expected, rel=1e-5), (make, strategy)
    for distil in (False, True):
        found = [fit(answers(distil), strategy()) for strategy in strategies]
        assert found[0] == pytest.approx(found[1], rel=1e-5)
    for name in ("sbn_ddp", "sbn_fsdp2"):
        seen.clear()
        fabric = Fabric(accelerator="cpu", devices=2, strategy=name, callbacks=[warmup, Losses()])
        fabric.launch()
        train(FabricRun(fabric, max_steps=3, enable_progress_bar=False, limit_val_batches=0), own(), Data())
        assert seen == pytest.approx(expected[:-1], rel=1e-5)
