"""Ternary, 2:4-sparse training with transformers.Trainer, without Lightning: python examples/hugging_face_trainer.py"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

from sbn_lightning import Ramp
from sbn_lightning.integrations.huggingface import SBNConfig, SparsityCallback, save_packed


def main(folder="logs/hugging_face_trainer", steps=60):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    dense = Qwen3ForCausalLM(Qwen3Config(vocab_size=256, head_dim=16, num_key_value_heads=2, **shape))
    dense.save_pretrained(f"{folder}/dense")
    # Most published models are bfloat16, in which most updates of latent weights round away.
    config = SBNConfig("2:4")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/dense", dtype=torch.float32, quantization_config=config)

    tokens = torch.tensor(list(Path(json.decoder.__file__).read_bytes()))  # some text, as bytes
    rows = [{"input_ids": row, "labels": row} for row in tokens[: len(tokens) // 64 * 64].view(-1, 64)]
    arguments = TrainingArguments(
        folder, max_steps=steps, learning_rate=3e-3, logging_steps=20, report_to=[], save_strategy="no"
    )
    schedule = SparsityCallback(ramp=Ramp("walk", end=0.3))
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[schedule])
    trainer.train()

    save_packed(model, f"{folder}/packed")
    packed = AutoModelForCausalLM.from_pretrained(f"{folder}/packed")
    prompt = tokens[None, :16].to(packed.device)
    print(packed.generate(prompt, max_new_tokens=8, do_sample=False))
    return trainer.state.log_history, model.eval(), packed


if __name__ == "__main__":
    main()
