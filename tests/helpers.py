"""Small models, trainers and callbacks that many tests use."""

import subprocess
import sys
import zlib
from functools import partial

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sbn_lightning import SparseBitNet, TransformerConfig
from sbn_lightning.callbacks.base import RunCallback
from sbn_lightning.layers.sparse_linear import masked_layers
from sbn_lightning.training.graphs import GraphedLoss


def small_config(**changes):
    shape = {"vocab_size": 320, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ffn": 64}
    return TransformerConfig(**(shape | {"max_sequence_length": 64} | changes))


def small_module(**changes):
    torch.manual_seed(0)
    optimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    return SparseBitNet(small_config(**changes), optimizer=optimizer, warmup_steps=2)


def token_loader(batches=8, batch_size=4, length=17, vocab_size=320, seed=0, rank=0, world=1):
    """The batches of one rank: it takes every ``world``-th of ``batches * batch_size * world`` sequences."""
    samples = batches * batch_size * world
    tokens = torch.randint(vocab_size, (samples, length), generator=torch.Generator().manual_seed(seed))
    return DataLoader(_Rows(tokens[rank::world]), batch_size=batch_size)


def unbounded(batches):
    """A loader of given batches that has no length, so that a run which resumes takes the first of them first."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(batches)

    return DataLoader(Stream(), batch_size=None)


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def quiet_trainer(callbacks=(), **options):
    defaults = {
        "accelerator": "cpu",
        "max_epochs": -1,
        "max_steps": 6,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **(defaults | options))


class ForeignModule(LightningModule):
    """A module of a user that does not mention this package."""

    def __init__(self, in_configure_model=False):
        super().__init__()
        self.net = None
        if not in_configure_model:
            self.configure_model()

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def regression_loader(seed=0, batch_size=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 16, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :8] * 2), batch_size=batch_size)


def imported(code, names, **options):
    """Run ``code`` in a fresh interpreter; return which of ``names`` were imported, and what was printed."""
    code += f"\nimport sys; print('IMPORTED', *sorted({set(names)!r} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout
    printed, _, found = output.rpartition("IMPORTED")
    return found.split(), printed


def imported_by_help(command, names):
    """Return the same as :func:`imported`, for the ``--help`` of a command."""
    code = f"import sys; sys.argv = ['sbn', '{command}', '--help']; from sbn_lightning.cli import main\n"
    return imported(code + "try: main()\nexcept SystemExit: pass", names)


class Losses(Callback):
    """Records the loss of every micro-batch."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def compiled_frames(model, counter, before=lambda number: None):
    """Train a model with CUDA graphs; return how many frames ``counter`` had compiled after each micro-batch.

    ``before`` is called with the number of each micro-batch.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    graphed, compiled = GraphedLoss(), []
    for number, batch in enumerate(token_loader()):
        before(number)
        with torch.autocast("cpu", torch.bfloat16):
            loss = graphed(model, lambda rows: model.loss(rows[:, :-1], rows[:, 1:]), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        compiled.append(counter.frame_count)
    return compiled


class Interrupted(Exception):
    pass


class Witness(RunCallback):
    """Records place, samples, masks and loss of each micro-batch; raises an error before step ``interrupt_at``."""

    def __init__(self, interrupt_at=None):
        self.interrupt_at = interrupt_at
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.interrupt_at is not None and trainer.global_step >= self.interrupt_at:
            raise Interrupted
        masks = zlib.crc32(b"".join(layer.packed_mask().numpy().tobytes() for _, layer in masked_layers(pl_module)))
        samples = zlib.crc32(batch.numpy().tobytes())
        self.seen.append([trainer.current_epoch, batch_idx, trainer.global_step, samples, masks])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen[-1].append(outputs["loss"].item())
