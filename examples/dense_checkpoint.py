"""A dense checkpoint becomes ternary and 2:4 by training on, and plain again: python examples/dense_checkpoint.py

``ckpt_path`` names a checkpoint of the dense run. Weights, optimiser and step count continue. Masks start from the
dense weights, and a ramp leads to 2:4. At the end ``revert`` gives nn.Linear layers with the effective weights.
"""

import torch
from hugging_face import LanguageModel, text
from jsonargparse import auto_cli
from lightning.pytorch import Trainer

from sbn_lightning import DenseToSparseRamp, MaskRefresh, TernarySparseConversion

QUIET = {"max_epochs": -1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}


def main(steps: int = 80):
    """Trains a dense model for some steps, and the ternary one for as many."""
    torch.manual_seed(0)
    dense = Trainer(max_steps=steps, **QUIET)
    dense.fit(LanguageModel("llama"), text())
    dense.save_checkpoint("dense.ckpt")
    print(f"dense, step {steps}: loss {dense.callback_metrics['loss']:.3f}")

    # The ramp counts the steps of the dense run as well. Without ckpt_path, module.load_state_dict loads weights only.
    conversion = TernarySparseConversion("2:4", activation_bits=None)
    ramp = DenseToSparseRamp("walk", start=0.5, end=0.75)
    trainer = Trainer(max_steps=2 * steps, callbacks=[conversion, ramp, MaskRefresh()], **QUIET)
    module = LanguageModel("llama")
    trainer.fit(module, text(), ckpt_path="dense.ckpt")
    print(f"ternary and 2:4, step {2 * steps}: loss {trainer.callback_metrics['loss']:.3f}")

    name = conversion.revert(module)[0]
    layer = module.get_submodule(name)
    print(f"{name} is {layer}; its values: {layer.weight.unique().tolist()}")
    return trainer, module


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
