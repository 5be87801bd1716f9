"""What the ranks of :mod:`tests.distributed.forked` do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

import sbn_lightning.cli.training
import sbn_lightning.data.stream.loader  # noqa: F401
from sbn_lightning import DurableCheckpoint
from sbn_lightning.callbacks import RankWatch
from sbn_lightning.distributed import watch as watching
from sbn_lightning.distributed.strategies import ShardedStrategy
from tests.distributed.sharded_fit import fit
from tests.helpers import quiet_trainer, small_module

# The other rank is dead in the tests, so nobody has to be patient.
watching.BEAT, watching.BROKEN = 0.2, 2.0


class Fault(Callback):
    """Makes one rank fail in the middle of training.

    Args:
        kind: What happens.
        rank: The rank that fails.
        step: The optimiser steps that are done before.
    """

    def __init__(self, kind: str, rank: int, step: int) -> None:
        self.kind, self.rank, self.step = kind, rank, step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self.step or trainer.global_rank != self.rank:
            return
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            return  # torchrun has started the ranks again.
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def fail(folder: Path, kind: str, rank: int) -> None:
    """Train 5 steps that save each, while something happens to one rank after the second step."""
    watch = RankWatch(silence=30, grace=3)
    watch.recipe = {"trainer.max_steps": "5"}
    if kind == "recipe" and int(os.environ["RANK"]) == rank:
        watch.recipe["trainer.max_steps"] = "6"
    full = 3 if kind in ("disk", "shard") and int(os.environ["RANK"]) == rank else None
    callbacks = [watch, Fault(kind, rank, 2)]
    fit(folder, 5, callbacks=callbacks, full_at=full, save_distributed_checkpoint=kind == "shard")


def resume(folder: Path, name: str, steps: int, **options: Any) -> None:
    """Train epochs of two steps, and write down the losses."""
    losses = fit(folder, steps, batches=2, every=2, **options)
    torch.save(losses, folder / f"{name}.rank{os.environ['RANK']}.pt")


def restart(folder: Path, tokens: str) -> None:
    """Let torchrun's agent start two ranks of ``sbn fit``, and start them again after one was killed."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.chdir(folder)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    agent = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, monitor_interval=0.1, start_method="fork",
        run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    elastic_launch(agent, fit_recipe)(tokens)


def fit_recipe(tokens: str) -> None:
    """Run ``sbn fit`` for four steps. In the first attempt rank 1 is killed after two. Later ones start unevenly."""
    from lightning.pytorch.utilities import rank_zero_only

    from sbn_lightning.cli import main
    from tests.cli.test_cli import RECIPE, small

    rank_zero_only.rank = int(os.environ["RANK"])  # Lightning reads the variable when it is imported.

    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" and rank_zero_only.rank == 1:
        time.sleep(1)  # So rank 0 could read what rank 1 of the first attempt has left in the store.
    options = small(tokens, "--trainer.max_steps=4", "--trainer.devices=2", "--trainer.strategy=sbn_fsdp2")
    options += ["--ckpt_path=last", "--trainer.limit_val_batches=0"]
    options += [f"--trainer.callbacks={__name__}.Fault", "--trainer.callbacks.kind=killed"]
    options += ["--trainer.callbacks.rank=1", "--trainer.callbacks.step=2"]
    status = main(["fit", "--config", str(RECIPE), *options])
    if status != 0:
        raise SystemExit(status)


def trained(folder: Path, runs: dict[str, dict[str, Any]], consolidated: list[str]) -> None:
    """Make single files of sharded checkpoints, and then train."""
    from sbn_lightning.checkpoints.sharded import consolidate
    from tests.distributed import worker

    for checkpoint in consolidated:
        consolidate(checkpoint, f"{checkpoint}.consolidated")
    worker.train_all(runs)


def spoilt(folder: Path) -> None:
    """Train steps in which the output of a layer is NaN on some ranks."""
    from tests.distributed.steps_worker import write_errors

    write_errors(folder)


def packed(folder: Path, what: str) -> None:
    """Compare layers or models whose rows are on several ranks with one process."""
    from tests.distributed import packed_worker

    torch.distributed.init_process_group("gloo")
    getattr(packed_worker, f"check_{what}")(torch.distributed.get_world_size())
    torch.distributed.destroy_process_group()


def hybrid(folder: Path) -> None:
    """Two groups of ranks hold the same rows, and the ranks of a group share the rows. Bits are those of one process.

    The ranks train on equal data, and sums of four equal gradients are exact, so losses stay equal to the last bit.
    """
    from torch.distributed.device_mesh import init_device_mesh

    from tests.distributed.packed_worker import model, train

    torch.distributed.init_process_group("gloo")
    expected = train(model(None, learnable_scales=True))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for options in ({}, {"gather": "packed_layer"}):
        made = model(mesh, learnable_scales=True, **options)
        assert train(made) == expected, options
        weight = made.blocks[0].mlp.down.weight
        assert weight.to_local().shape[0] * 2 == weight.shape[0]
    norms = []
    for made in (model(None), model(mesh)):
        tokens = torch.arange(9).view(1, 9)
        made.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        norm = torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    rounded = train(model(mesh, reduce_dtype=torch.bfloat16, learnable_scales=True))
    assert rounded[0] == expected[0]
    assert rounded[-2] != expected[-2]  # The last loss of the training; a validation follows.
    assert rounded[-2] == pytest.approx(expected[-2], rel=1e-2)
    torch.distributed.destroy_process_group()


def wire(folder: Path) -> None:
    """Count the bytes of a step under DDP and under the two ways of sharding, and compare them with the formulas."""
    import sys

    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn.parallel import DistributedDataParallel

    from sbn_lightning import TernaryTransformer
    from sbn_lightning.distributed.sharding import keep_masks_out_of_broadcasts, shard
    from sbn_lightning.layers import masked_layers
    from tests.helpers import small_config

    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from wire import Wire

    torch.distributed.init_process_group("gloo")
    tokens = torch.randint(320, (2, 9))
    mesh = init_device_mesh("cpu", (2,))
    config = small_config(pattern="2:4", n_layers=1)
    counted = {}
    for way in ("ddp", "packed_step", "packed_layer"):
        made = TernaryTransformer(config)
        weights = sum(parameter.numel() for parameter in made.parameters())
        ternary = sum(layer.weight.numel() for _, layer in masked_layers(made))
        if way == "ddp":
            keep_masks_out_of_broadcasts(made)
            made = DistributedDataParallel(made, broadcast_buffers=False)
        else:
            shard(made, mesh, gather=way)
        for _ in range(2):  # DDP arranges its buckets in the first step.
            with Wire() as seen:
                made(tokens).sum().backward()
            made.zero_grad()
            with torch.no_grad():  # So that weights are prepared again.
                for parameter in made.parameters():
                    parameter.add_(1e-3)
        counted[way] = seen.received
    assert counted["ddp"]["all-reduce"] == 4 * weights, counted
    rest = weights - ternary
    # Half of each tensor comes from the other rank. The reference backend sends weights for gamma, and words.
    for way, gathers in (("packed_step", 1), ("packed_layer", 2)):
        received = counted[way]
        assert received["reduce-scatter"] == 4 * (ternary + rest) // 2, counted
        least = (4 * ternary + 0.25 * ternary * gathers + 4 * rest) / 2
        assert least <= received["gather"] <= least * 1.1, (way, least, counted)
    torch.distributed.destroy_process_group()


def fabric(
    folder: Path, steps: int, tokens: str, loop: str, checkpoint: str | None = None, reduce: Any = "micro_batch"
) -> None:
    """Train a recipe with the Fabric loop or the Trainer under the sharded strategy, and write down the losses."""
    from lightning.fabric import Fabric

    from sbn_lightning import MaskRefresh, TokenDataModule
    from sbn_lightning.callbacks.base import RunCallback
    from sbn_lightning.distributed.fabric_strategy import FabricShardedStrategy
    from sbn_lightning.fabric.loop import FabricRun, train

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    losses: list[float] = []

    class Losses(RunCallback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(outputs["loss"].item())

    saver = DurableCheckpoint(dirpath=str(folder), filename="{step}", every_n_train_steps=2, save_top_k=-1)
    callbacks = [MaskRefresh(interval=2), Losses(), saver]
    module = small_module(pattern="4:8", n_layers=1)
    data = TokenDataModule(tokens, batch_size=2, sequence_length=16, num_workers=0)
    options = {"max_steps": steps, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "limit_val_batches": 0}
    if loop == "trainer":
        trainer = quiet_trainer(
            callbacks,
            strategy=ShardedStrategy(),
            devices=ranks,
            enable_checkpointing=True,
            use_distributed_sampler=False,
            **options,
        )
        trainer.fit(module, data, ckpt_path=checkpoint)
    else:
        strategy = FabricShardedStrategy(reduce=reduce)
        lightning = Fabric(accelerator="cpu", devices=ranks, strategy=strategy, callbacks=callbacks)
        lightning.launch()
        train(FabricRun(lightning, enable_progress_bar=False, **options), module, data, checkpoint)
    torch.save(losses, folder / f"rank{rank}.pt")


def students(folder: Path, patterns: list[str]) -> None:
    """Train students of one teacher in the study from published weights: one on each rank, or one after the other.

    A training that is stopped after its second step goes on in a new one.
    """
    from research.pretrained import train
    from research.pretrained.trials import BOTH, Trial
    from sbn_lightning.checkpoints import lightning_file
    from sbn_lightning.models.transformer import TernaryTransformer
    from tests.helpers import small_config

    train.LOOK_EVERY = 2  # type: ignore[attr-defined]
    together = int(os.environ["WORLD_SIZE"]) > 1
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    teacher = TernaryTransformer(small_config(linear="dense", n_layers=1))
    weights = folder / f"teacher{rank}.ckpt"
    torch.save(lightning_file.contents(teacher.config, teacher.state_dict()), weights)
    text = torch.randint(300, (400,), dtype=torch.int32)
    setting = train.Setting(
        str(weights), text, {"code": text[:40]}, folder, torch.device("cpu"), 8, 2, (), compile=False, together=together
    )
    for pattern in patterns[rank : rank + 1] if together else patterns:
        trial = Trial(f"both {pattern}", 7 * 16, pattern, distillation=BOTH, rounding=0.5)
        if together:  # Only one of the ranks is late.
            assert not train.Training(trial, setting).run(time.monotonic() if rank else time.monotonic() + 1000)
        assert train.Training(trial, setting).run()
