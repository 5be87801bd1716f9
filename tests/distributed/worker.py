"""Trains a small model under a strategy and records what it saw.

``torchrun worker.py JOBS`` works off a JSON file of jobs, ``{output folder: arguments of train}``: processes take far
longer to start than to train. Without a folder of tokens the ranks share random batches in a fixed way, so that
together they see what a single process sees.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from sbn_lightning import DenseToSparseRamp, DurableCheckpoint, MaskRefresh, SparsityPatternLogger, TokenDataModule
from sbn_lightning.errors import ConfigError
from sbn_lightning.layers import masked_layers
from tests.helpers import quiet_trainer, small_module, token_loader

GLOBAL_BATCH = 8
EPOCH = 4  # random batches
sharding = partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1)
STRATEGIES = {
    "auto": lambda: "auto",
    "ddp": DDPStrategy,
    "fsdp2": partial(sharding, save_distributed_checkpoint=False),
    "sharded": sharding,
    "tensor-parallel": ModelParallelStrategy,
}


class Witness(Callback):
    def __init__(self):
        self.losses, self.masks, self.gammas, self.samples, self.moments = [], [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        layers = dict(masked_layers(pl_module))
        self.masks.append({name: layer.packed_mask().clone() for name, layer in layers.items()})
        self.gammas.append({name: layer.ternary()[1].clone() for name, layer in layers.items()})
        self.samples.append(batch.clone())
        states = trainer.optimizers[0].state
        self.moments.append(
            {
                f"{name} {key}": whole(value).clone()
                for name, parameter in pl_module.named_parameters()
                for key, value in states.get(parameter, {}).items()
            }
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean").item())


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(output, strategy, steps, checkpoint=None, tokens=None):
    """Saves after every second step, or a run on tokens at its end; returns what the rank saw."""
    world = 1 if strategy == "auto" else 2
    options = {"strategy": STRATEGIES[strategy](), "devices": world, "use_distributed_sampler": False}
    options["logger"] = TensorBoardLogger(f"{output}.logs") if tokens is None else False
    witness, sparsity = Witness(), SparsityPatternLogger(2)
    every = 2 if tokens is None else steps
    saver = DurableCheckpoint(
        dirpath=output, filename="{step}", every_n_train_steps=every, save_top_k=-1, save_last=tokens is None
    )
    callbacks = [MaskRefresh(interval=2), DenseToSparseRamp("rows", end=0.5), sparsity, witness, saver]
    trainer = quiet_trainer(callbacks, max_steps=steps, enable_checkpointing=True, **options)
    module = small_module(pattern="4:8")
    if tokens is None:
        rank = int(os.environ.get("RANK", 0))
        loader = token_loader(batches=EPOCH, batch_size=GLOBAL_BATCH // world, rank=rank, world=world)
        trainer.fit(module, loader, ckpt_path=checkpoint)
    else:
        data = TokenDataModule(tokens, batch_size=GLOBAL_BATCH // world, sequence_length=63, num_workers=0)
        trainer.fit(module, data, ckpt_path=checkpoint)
    ignored = sorted(getattr(module, "_ddp_params_and_buffers_to_ignore", []))
    counts = {name: vars(counts) for name, counts in sparsity.counts.items()}
    seen = {key: getattr(witness, key) for key in ("losses", "masks", "gammas", "samples", "moments")}
    return {**seen, "counts": counts, "ignored": ignored}


def main(jobs):
    for output, options in json.loads(Path(jobs).read_text()).items():
        try:
            record = train(output, **options)
        except ConfigError as error:
            record = {"error": str(error)}
        torch.save(record, f"{output}.rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
