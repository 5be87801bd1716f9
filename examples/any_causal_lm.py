"""Any causal language model of transformers under Lightning, ternary and 2:4: python examples/any_causal_lm.py"""

import json
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM

from sbn_lightning import DenseToSparseRamp
from sbn_lightning.inference.loop import generate
from sbn_lightning.integrations.huggingface import CausalLM
from sbn_lightning.integrations.opening import open_any

SHAPE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}


def main(folder="logs/any_causal_lm", steps=60):
    torch.manual_seed(0)
    source = {"model_type": "gemma3_text", "vocab_size": 256, "num_key_value_heads": 2, **SHAPE}  # or a folder, a name
    module = CausalLM(source, pattern="2:4", optimizer=partial(torch.optim.AdamW, lr=3e-3), warmup_steps=5)
    tokens = torch.tensor(list(Path(json.decoder.__file__).read_bytes()))  # some text, as bytes
    data = torch.utils.data.DataLoader(tokens[: len(tokens) // 65 * 65].view(-1, 65), batch_size=8, shuffle=True)
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = Trainer(max_steps=steps, max_epochs=-1, callbacks=[DenseToSparseRamp("rows", end=0.3)], **quiet)
    trainer.fit(module, data)

    trainer.save_checkpoint(f"{folder}/last.ckpt")  # `sbn generate`, `evaluate` and `export` read this file
    module.export(f"{folder}/packed")
    packed, prompt = AutoModelForCausalLM.from_pretrained(f"{folder}/packed"), tokens[:16].tolist()
    theirs = packed.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    ours = generate(open_any(f"{folder}/last.ckpt", device="cpu").model, [prompt], max_new_tokens=8)
    return float(trainer.callback_metrics["train/loss"]), ours, theirs


if __name__ == "__main__":
    print(main())
