"""Accumulated steps under FSDP2 in which a value is not finite."""

import json
import os
from datetime import timedelta

from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from sbn_lightning import NonFiniteGuard
from sbn_lightning.callbacks.non_finite import NonFiniteError
from tests.distributed.worker import TINY
from tests.helpers import quiet_trainer, small_module, token_loader

ACCUMULATE = 2
LAYER = "model.blocks.0.mlp.down"
# For each rank, the micro-batches of the step in which the output of a layer is NaN.
NON_FINITE = {
    "first of one": ([0], []),
    "last of one": ([1], []),
    "first of one, last of the other": ([0], [1]),
    "first of both": ([0], [0]),
}


class Spoilt(Callback):
    """Makes the output of ``LAYER`` NaN in some micro-batches."""

    def __init__(self, at):
        self.at, self.now = at, False

    def on_train_start(self, trainer, pl_module):
        layer = pl_module.get_submodule(LAYER)
        layer.register_forward_hook(lambda module, inputs, output: output * float("nan") if self.now else None)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now = batch_idx in self.at


def fit(callbacks, **options):
    # With a short timeout, a collective that another rank does not join fails soon.
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, timeout=timedelta(seconds=30))
    options = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False} | options
    trainer = quiet_trainer(callbacks, accumulate_grad_batches=ACCUMULATE, **options)
    data = {"batches": 4, "length": 5, "rank": int(os.environ["RANK"]), "world": 2}
    trainer.fit(small_module(pattern="4:8", **TINY), token_loader(**data), token_loader(**data))


def error_of_spoilt(at):
    try:
        fit([Spoilt(at), NonFiniteGuard(1)], max_steps=1, limit_val_batches=0)
    except NonFiniteError as error:
        return str(error)
    return "none"


def write_errors(folder):
    """Write what each rank saw to ``folder``."""
    rank = int(os.environ["RANK"])
    seen = {name: error_of_spoilt(at[rank]) for name, at in NON_FINITE.items()}
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
