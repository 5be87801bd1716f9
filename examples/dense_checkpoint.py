"""A dense checkpoint becomes ternary and 2:4 by continued training, and plain again; under a minute on a CPU.

    python examples/dense_checkpoint.py

``ckpt_path`` names a checkpoint of the dense run: weights, optimiser and step count continue, masks start from the
dense weights, and a ramp leads to 2:4. ``revert`` then gives ``nn.Linear`` layers with the effective weights.
"""

import argparse

import torch
from hugging_face import LanguageModel, blocks_of_text, build
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from sbn_lightning import DenseToSparseRamp, MaskRefresh, TernarySparseConversion


def train(steps, callbacks=(), ckpt_path=None):
    torch.manual_seed(0)
    module = LanguageModel(build("llama"))
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(blocks_of_text(), batch_size=8, shuffle=True), ckpt_path=ckpt_path)
    return trainer, module


def main(steps=80):
    trainer, _ = train(steps)
    trainer.save_checkpoint("dense.ckpt")
    print(f"dense, step {steps}: loss {trainer.callback_metrics['loss']:.3f}")

    # Weights alone would do: module.load_state_dict(...), and no ckpt_path. The ramp counts from the dense run's steps.
    conversion = TernarySparseConversion("2:4", activation_bits=None)
    ramp = DenseToSparseRamp("walk", start=0.5, end=0.75)
    trainer, module = train(2 * steps, [conversion, ramp, MaskRefresh()], ckpt_path="dense.ckpt")
    print(f"ternary and 2:4, step {2 * steps}: loss {trainer.callback_metrics['loss']:.3f}")

    reverted = conversion.revert(module)
    layer = module.get_submodule(reverted[0])
    print(f"{reverted[0]} is {layer}; its values: {layer.weight.unique().tolist()}")
    return trainer, module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    main(**vars(parser.parse_args()))
