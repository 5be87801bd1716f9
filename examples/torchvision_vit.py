"""A torchvision vision transformer whose MLPs are ternary and 6:8-sparse: python examples/torchvision_vit.py

The pictures are made up: noise in which one half, top or bottom, is tinted in one of three colours: six classes.
"""

import torch
from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer

from sbn_lightning import DenseToSparseRamp, MaskRefresh, TernarySparseConversion

SHAPE = {"image_size": 32, "patch_size": 8, "num_layers": 3, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = VisionTransformer(num_classes=6, **SHAPE)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self.model(batch[0]).argmax(-1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def pictures(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 6
    noise = torch.randn(count, 3, 32, 32, generator=generator)
    rows = labels[:, None] // 3 * 16 + torch.arange(16)
    noise[torch.arange(count)[:, None], labels[:, None] % 3, rows] += 1
    return DataLoader(TensorDataset(noise, labels), batch_size=32)


def main(steps: int = 120):
    """Trains the classifier."""
    torch.manual_seed(0)
    # The head stays dense. Attention and patch embedding cannot be converted; the report says why.
    callbacks = [
        TernarySparseConversion("6:8", exclude=("heads",)),
        DenseToSparseRamp("layers", end=0.5),
        MaskRefresh(),
    ]
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=min(steps, 40),
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
    )
    module = Classifier()
    trainer.fit(module, pictures(512, seed=0), pictures(128, seed=1))
    print(f"accuracy {trainer.callback_metrics['accuracy']:.1%}")
    return trainer, module


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
