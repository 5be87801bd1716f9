"""Ternary, 2:4-sparse training of a Hugging Face model: python examples/hugging_face.py --model qwen2

The LightningModule knows nothing of sparsity; everything is in the callbacks. The plugin runs the layers on the integer
tensor cores of a GPU, if there is one. At the end the model is a plain one again, saved with save_pretrained.
"""

import json
from pathlib import Path

import torch
from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from sbn_lightning import DenseToSparseRamp, MaskRefresh, SparseTernaryPrecision, TernarySparseConversion

SHAPE = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}


class LanguageModel(LightningModule):
    def __init__(self, name):
        super().__init__()
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SHAPE, **HEADS))

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def text(length=64):
    """The source code of a module of the standard library, as bytes."""
    data = torch.frombuffer(bytearray(Path(json.decoder.__file__).read_bytes()), dtype=torch.uint8).long()
    return DataLoader(list(data[: len(data) // length * length].view(-1, length)), batch_size=8, shuffle=True)


def main(model: str = "qwen2", steps: int = 120):
    """Trains qwen2, llama or gpt2."""
    torch.manual_seed(0)
    module = LanguageModel(model)
    conversion = TernarySparseConversion("2:4", exclude=("lm_head",))
    callbacks = [conversion, DenseToSparseRamp("walk", end=0.3), MaskRefresh()]
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        devices=1,
        plugins=[SparseTernaryPrecision(dtype="fp32")],
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, text())
    print(f"loss {trainer.callback_metrics['loss']:.3f}")

    conversion.revert(module)
    module.model.save_pretrained("logs/hugging_face")
    return trainer, module, AutoModelForCausalLM.from_pretrained("logs/hugging_face")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
