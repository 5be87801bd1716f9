"""Lightning's demo Transformer, ternary and 2:4-sparse; under a minute on a CPU.

    python examples/lightning_demo.py

The LightningModule is a subclass of Lightning's own only to bring data without a download. The feed-forward layers are
converted; what is not (packed attention projections, the head) is logged with the reason. Validation uses an
exponential moving average of the weights, with masks that belong to it.
"""

import argparse
import json
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.transformer import LightningTransformer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from sbn_lightning import DenseToSparseRamp, MaskRefresh, SparsityPatternLogger, TernarySparseConversion
from sbn_lightning.callbacks.weight_averaging import SparseEMAWeightAveraging


class ByteTransformer(LightningTransformer):
    def __init__(self):
        super().__init__(vocab_size=256)

    def prepare_data(self):
        """Downloads nothing, unlike the demo."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", super().training_step(batch, batch_idx), prog_bar=True)


def loaders(length=32):
    """Inputs and targets, as the demo's data set gives them, from the source of a module of the standard library."""
    data = Path(json.decoder.__file__).read_bytes()
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    blocks = tokens[: len(tokens) // (length + 1) * (length + 1)].view(-1, length + 1)
    pairs = [(block[:-1], block[1:]) for block in blocks]
    return DataLoader(pairs[:-40], batch_size=16, shuffle=True), DataLoader(pairs[-40:], batch_size=16)


def main(steps=120):
    torch.manual_seed(0)
    logger = SparsityPatternLogger(interval=20)
    # A name alone would also match model.transformer.decoder.
    conversion = TernarySparseConversion("2:4", exclude=("model.decoder",))
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=min(steps, 40),
        accelerator="cpu",
        callbacks=[
            conversion,
            DenseToSparseRamp("rows", end=0.3),
            MaskRefresh(interval=5),
            SparseEMAWeightAveraging(decay=0.9),
            logger,
        ],
        logger=CSVLogger("logs", "lightning_demo"),
        enable_checkpointing=False,
    )
    module = ByteTransformer()
    trainer.fit(module, *loaders())
    print(f"loss {trainer.callback_metrics['loss']:.3f}, zeros {logger.total().shares()['zeros']:.1%}")
    return trainer, module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    main(**vars(parser.parse_args()))
