"""Train a small model under a strategy and record what each rank saw.

Without a folder of tokens the ranks share random batches in a fixed way, so that together they see what a single
process sees.
"""

import os
from contextlib import nullcontext
from functools import partial

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from sbn_lightning import (
    DenseToSparseRamp,
    DurableCheckpoint,
    MaskedWeightDecay,
    MaskRefresh,
    SparseTernaryPrecision,
    SparsityPatternLogger,
    TokenDataModule,
)
from sbn_lightning.backends.selection import Choice
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed.strategies import ReplicatedStrategy, ShardedStrategy
from sbn_lightning.layers.sparse_linear import SparseBitLinear, masked_layers
from sbn_lightning.training import precision
from tests.helpers import quiet_trainer, small_module, token_loader
from tests.interpreter import quick_interpreter

GLOBAL_BATCH = 8
EPOCH = 4  # no folder of tokens: random batches
TINY = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ffn": 16}  # kernels run in Triton's interpreter
TINY_EPOCH = 1
sharding = partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1)
STRATEGIES = {
    "auto": lambda: "auto",
    "ddp": ReplicatedStrategy,
    "lightning ddp": DDPStrategy,
    "fsdp2": partial(sharding, save_distributed_checkpoint=False),
    "sharded": sharding,
    "packed": ShardedStrategy,
    "packed step": partial(ShardedStrategy, reduce="step"),
    "tensor-parallel": ModelParallelStrategy,
}


class Witness(Callback):
    def __init__(self):
        self.losses, self.masks, self.gammas, self.samples, self.moments = [], [], [], [], []
        self.backends, self.seeds = [], []

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
        backends = [layer.backend for layer in pl_module.modules() if isinstance(layer, SparseBitLinear)]
        self.backends.append([backend.name for backend in backends])
        seeds = [getattr(backend, "seed", None) for backend in backends]
        self.seeds.append([int(seed) for seed in seeds if seed is not None])
        self.losses.append(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean").item())


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def measure_on_rank_0_only():
    """Replace the measurement of ``auto`` on a GPU, where the ranks may choose differently."""

    def choose(layers, wanted, *_):
        assert int(os.environ["RANK"]) == 0
        return {name: Choice("int8", "portable", f"{wanted} measured") for name in layers}

    precision.choose = choose


def train(output, strategy, steps, checkpoint=None, tokens=None, plugin=None, accumulate=1, decay=0.0):
    """Train, save after each epoch or half an epoch (on tokens: at the end), and return what the rank saw."""
    world = 1 if strategy == "auto" else 2
    options = {"strategy": STRATEGIES[strategy](), "devices": world, "use_distributed_sampler": False}
    options["logger"] = TensorBoardLogger(f"{output}.logs") if tokens is None else False
    if plugin is not None:
        options["plugins"] = [SparseTernaryPrecision(dtype="fp32", **plugin)]
    witness, sparsity = Witness(), SparsityPatternLogger(3)
    every = steps if tokens is not None else 2 if plugin is None else TINY_EPOCH
    saver = DurableCheckpoint(
        dirpath=output, filename="{step}", every_n_train_steps=every, save_top_k=-1, save_last=strategy == "sharded"
    )
    callbacks = [MaskRefresh(interval=2), DenseToSparseRamp("rows", end=0.5), sparsity, witness, saver]
    callbacks += [MaskedWeightDecay(decay)]
    options["accumulate_grad_batches"] = accumulate
    trainer = quiet_trainer(callbacks, max_steps=steps, enable_checkpointing=True, **options)
    module = small_module(pattern="4:8", **({"n_layers": 1} if plugin is None else TINY))
    if tokens is None:
        rank, batch_size = int(os.environ.get("RANK", 0)), GLOBAL_BATCH // world
        data = {"batches": EPOCH} if plugin is None else {"batches": TINY_EPOCH, "length": 3}
        loader = token_loader(batch_size=batch_size, rank=rank, world=world, **data)
        trainer.fit(module, loader, ckpt_path=checkpoint)
    else:
        data = TokenDataModule(tokens, batch_size=GLOBAL_BATCH // world, sequence_length=63, num_workers=0)
        trainer.fit(module, data, ckpt_path=checkpoint)
    ignored = sorted(getattr(module, "_ddp_params_and_buffers_to_ignore", []))
    counts = {name: vars(counts) for name, counts in sparsity.counts.items()}
    kept = ("losses", "masks", "gammas", "samples", "moments", "backends", "seeds")
    return {**{key: getattr(witness, key) for key in kept}, "counts": counts, "ignored": ignored}


def train_all(runs):
    """Train runs one after the other, ``{output folder: arguments of train}``. Records lie beside the folders."""
    for output, options in runs.items():
        measured, options = precision.choose, dict(options)
        if options.pop("measured", False):
            measure_on_rank_0_only()
        try:
            with nullcontext() if options.get("plugin") is None else quick_interpreter():
                record = train(output, **options)
        except ConfigError as error:
            record = {"error": str(error)}
        finally:
            precision.choose = measured
        torch.save(record, f"{output}.rank{os.environ['RANK']}.pt")
