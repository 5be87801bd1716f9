"""Ternary, 2:4-sparse training of Hugging Face models in a plain LightningModule; under a minute on a CPU.

    python examples/hugging_face.py --model qwen2      (or llama, gpt2)

The models are small and start from random weights; nothing is downloaded. The LightningModule knows nothing of
sparsity: everything is in the list of callbacks, and the plugin runs the layers on a GPU's integer tensor cores, if
there is one. At the end the model turns back into a plain one, whose weights are ternary and 2:4, and is saved with
``save_pretrained``.
"""

import argparse
import json
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sbn_lightning import (
    DenseToSparseRamp,
    MaskRefresh,
    SparseTernaryPrecision,
    SparsityPatternLogger,
    TernarySparseConversion,
)


def build(name):
    """A small model over bytes."""
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
        )
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(vocab_size=256, num_key_value_heads=2, tie_word_embeddings=True, **shape))
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **shape))


class LanguageModel(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def blocks_of_text(length=64):
    """Some English: the source of a module of the standard library, as bytes."""
    data = Path(json.decoder.__file__).read_bytes()
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    return list(tokens[: len(tokens) // length * length].view(-1, length))


def main(model="qwen2", steps=120):
    torch.manual_seed(0)
    module = LanguageModel(build(model))
    logger = SparsityPatternLogger(interval=20)
    conversion = TernarySparseConversion("2:4", exclude=("lm_head",))
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        devices=1,
        plugins=[SparseTernaryPrecision(dtype="fp32")],
        callbacks=[conversion, DenseToSparseRamp("walk", end=0.3), MaskRefresh(), logger],
        logger=CSVLogger("logs", "hugging_face"),
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(blocks_of_text(), batch_size=8, shuffle=True))
    print(f"loss {trainer.callback_metrics['loss']:.3f}, zeros {logger.total().shares()['zeros']:.1%}")

    conversion.revert(module)
    module.model.save_pretrained("logs/hugging_face/model")
    again = AutoModelForCausalLM.from_pretrained("logs/hugging_face/model")
    return trainer, module, again


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("qwen2", "llama", "gpt2"), default="qwen2")
    parser.add_argument("--steps", type=int, default=120)
    main(**vars(parser.parse_args()))
