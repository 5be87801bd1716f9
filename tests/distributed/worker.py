"""Trains a small model under a strategy and records what it saw; started once for each process by torchrun.

``python worker.py STRATEGY OUTPUT STEPS [--checkpoint FILE] [--tokens FOLDER]``. Without a folder of tokens the ranks
share random batches in a fixed way, so that together they see what a single process sees.
"""

import os
from argparse import ArgumentParser
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from sbn_lightning import DenseToSparseRamp, MaskRefresh, SparsityPatternLogger, TokenDataModule
from sbn_lightning.layers import masked_layers
from tests.helpers import quiet_trainer, small_module, token_loader

GLOBAL_BATCH = 8


class Witness(Callback):
    def __init__(self):
        self.losses, self.masks, self.gammas, self.samples = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        layers = dict(masked_layers(pl_module))
        self.masks.append({name: layer.packed_mask().clone() for name, layer in layers.items()})
        self.gammas.append({name: layer.ternary()[1].clone() for name, layer in layers.items()})
        self.samples.append(batch.clone())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean").item())


def main(strategy, output, steps, checkpoint=None, tokens=None):
    make = {
        "auto": lambda: "auto",
        "ddp": DDPStrategy,
        "fsdp2": partial(
            ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
        ),
        "fsdp2-auto": ModelParallelStrategy,
    }[strategy]
    world = 1 if strategy == "auto" else 2
    options = {"strategy": make(), "devices": world, "use_distributed_sampler": False}
    witness = Witness()
    callbacks = [MaskRefresh(interval=2), DenseToSparseRamp("rows", end=0.5), SparsityPatternLogger(2), witness]
    saver = ModelCheckpoint(dirpath=output, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks.append(saver)
    trainer = quiet_trainer(callbacks, max_steps=steps, enable_checkpointing=True, **options)
    module = small_module(pattern="4:8")
    rank = int(os.environ.get("RANK", 0))
    loader = token_loader(batches=8, batch_size=GLOBAL_BATCH // world, rank=rank, world=world)
    if tokens is None:
        trainer.fit(module, loader, ckpt_path=checkpoint)
    else:
        data = TokenDataModule(tokens, batch_size=GLOBAL_BATCH // world, sequence_length=63, num_workers=0)
        trainer.fit(module, data, ckpt_path=checkpoint)
    record = {"losses": witness.losses, "masks": witness.masks, "gammas": witness.gammas, "samples": witness.samples}
    record["counts"] = {name: vars(counts) for name, counts in callbacks[2].counts.items()}
    record["ignored"] = sorted(getattr(module, "_ddp_params_and_buffers_to_ignore", []))
    torch.save(record, Path(output) / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("strategy")
    parser.add_argument("output")
    parser.add_argument("steps", type=int)
    parser.add_argument("--checkpoint")
    parser.add_argument("--tokens")
    main(**vars(parser.parse_args()))
