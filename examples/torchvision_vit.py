"""A torchvision vision transformer whose MLPs are ternary and 6:8-sparse; under a minute on a CPU.

    python examples/torchvision_vit.py

The pictures are made up: noise in which one half, top or bottom, is tinted in one of three colours: six classes.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer

from sbn_lightning import DenseToSparseRamp, MaskRefresh, SparsityPatternLogger, TernarySparseConversion

CLASSES = 6


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = VisionTransformer(
            image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=CLASSES
        )

    def training_step(self, batch, batch_idx):
        pictures, labels = batch
        loss = F.cross_entropy(self.model(pictures), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        pictures, labels = batch
        self.log("accuracy", (self.model(pictures).argmax(-1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def pictures(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, 3, 32, 32, generator=generator)
    rows = labels[:, None] // 3 * 16 + torch.arange(16)
    noise[torch.arange(count)[:, None], labels[:, None] % 3, rows] += 1
    return TensorDataset(noise, labels)


def main(steps=120):
    torch.manual_seed(0)
    logger = SparsityPatternLogger(interval=20)
    # The head (heads.head) stays dense; the attention and the patch embedding cannot be converted, the report says why.
    conversion = TernarySparseConversion("6:8", exclude=("heads",))
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=min(steps, 40),
        accelerator="cpu",
        callbacks=[conversion, DenseToSparseRamp("layers", end=0.5), MaskRefresh(), logger],
        logger=CSVLogger("logs", "torchvision_vit"),
        enable_checkpointing=False,
    )
    module = Classifier()
    train, val = pictures(512, seed=0), pictures(128, seed=1)
    trainer.fit(module, DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=64))
    accuracy = trainer.callback_metrics["accuracy"]
    print(f"accuracy {accuracy:.1%}, zeros {logger.total().shares()['zeros']:.1%}")
    return trainer, module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    main(**vars(parser.parse_args()))
