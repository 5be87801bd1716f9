"""Lightning's demo Transformer, ternary and 2:4-sparse: python examples/lightning_demo.py

The feed-forward layers are converted. What is not converted (packed attention projections, the head) is logged with the
reason. Validation uses an average of the weights, with masks that belong to the average.
"""

import json
from pathlib import Path

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Trainer
from lightning.pytorch.demos.transformer import LightningTransformer
from torch.utils.data import DataLoader

from sbn_lightning import DenseToSparseRamp, MaskRefresh, SparseEMAWeightAveraging, TernarySparseConversion


class ByteTransformer(LightningTransformer):
    def __init__(self):
        super().__init__(vocab_size=256)

    def prepare_data(self):
        """Downloads nothing, unlike the demo."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), prog_bar=True)


def loaders(length=32):
    """Inputs and targets, from the source code of a module of the standard library."""
    data = torch.frombuffer(bytearray(Path(json.decoder.__file__).read_bytes()), dtype=torch.uint8).long()
    blocks = data[: len(data) // (length + 1) * (length + 1)].view(-1, length + 1)
    pairs = [(block[:-1], block[1:]) for block in blocks]
    return DataLoader(pairs[:-40], batch_size=16, shuffle=True), DataLoader(pairs[-40:], batch_size=16)


def main(steps: int = 120):
    """Trains the demo."""
    torch.manual_seed(0)
    conversion = TernarySparseConversion("2:4", exclude=("model.decoder",))  # "decoder" would match its layers as well
    average = SparseEMAWeightAveraging(decay=0.9)
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=min(steps, 40),
        accelerator="cpu",
        callbacks=[conversion, DenseToSparseRamp("rows", end=0.3), MaskRefresh(interval=5), average],
        logger=False,
        enable_checkpointing=False,
    )
    module = ByteTransformer()
    trainer.fit(module, *loaders())
    print(f"validation loss {trainer.callback_metrics['val_loss']:.3f}")
    return trainer, module


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
