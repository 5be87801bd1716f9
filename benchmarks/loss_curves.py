"""Loss over the first optimiser steps of a small model: every backend and kind of gradient against the reference.

    python benchmarks/loss_curves.py [--steps 300] [--seeds 1 3 5]

The model is a 6-layer transformer on bytes of the standard library, trained by ``Trainer`` with
``SparseTernaryPrecision``. Weights, samples and their order are the same in all runs. ``fake quantised`` is the
arithmetic of the public reference (quantise, scale back, multiply in floating point) in float32; the reference backend
runs in float32 here too. The CSV holds the mean loss of every 10 steps, and the distance from ``reference`` averaged
over all steps. With several seeds each seed has a reference of its own, and a run of another seed than 1 says so in its
name.
"""

from __future__ import annotations

import argparse
import sysconfig
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import append, fresh_results, header, need_gpu
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader
from training_step import FakeQuantizedLinear

from sbn_lightning import SparseBitNet, SparseTernaryPrecision, TransformerConfig
from sbn_lightning.layers.sparse_linear import masked_layers

LENGTH, BATCH = 512, 32

# The pattern, the options of the precision plugin (None: no plugin), and changes of the model's config.
RUNS: dict[str, tuple[Any, ...]] = {
    "reference": ("2:4", {"backend": "reference", "dtype": "fp32"}),
    "fake quantised": ("2:4", None),
    "reference, another seed": ("2:4", {"backend": "reference", "dtype": "fp32"}),
    "sparse, float32": ("2:4", {"backend": "sparse", "dtype": "fp32"}),
    "sparse": ("2:4", {"backend": "sparse"}),
    "sparse, int8 gradients": ("2:4", {"backend": "sparse", "gradients": "int8"}),
    "sparse, int8 dX": ("2:4", {"backend": "sparse", "gradients": "int8-dx"}),
    "sparse, int8 dW": ("2:4", {"backend": "sparse", "gradients": "int8-dw"}),
    "sparse, int8 head": ("2:4", {"backend": "sparse"}, {"head_precision": "int8"}),
    "sparse, int8 gradients and head": (
        "2:4",
        {"backend": "sparse", "gradients": "int8"},
        {"head_precision": "int8"},
    ),
    "sparse, int8 gradients, int8 gates": ("2:4", {"backend": "sparse", "gradients": "int8", "saved_gates": "int8"}),
    "sparse, int8 gradients, head and gates": (
        "2:4",
        {"backend": "sparse", "gradients": "int8", "saved_gates": "int8"},
        {"head_precision": "int8"},
    ),
    "reference 6:8": ("6:8", {"backend": "reference", "dtype": "fp32"}),
    "int8 6:8": ("6:8", {"backend": "int8"}),
    "int8 6:8, int8 gradients": ("6:8", {"backend": "int8", "gradients": "int8"}),
}


def corpus() -> Tensor:
    """Returns the sources of the standard library as bytes, uint8."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in folder.rglob("*.py") if "site-packages" not in file.parts)
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


class Curve(Callback):
    """Keeps the losses on the device until the end."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: object, outputs: dict[str, Tensor], *args: object
    ) -> None:  # type: ignore[override]
        self.losses.append(outputs["loss"].detach())


def train(name: str, data: Tensor, steps: int, seed: int) -> Tensor:
    """Returns the loss of every step, float32 ``[steps]``."""
    pattern, options, *changes = RUNS[name]
    seed_everything(seed + 1 if "another seed" in name else seed, verbose=False)
    shape = {"vocab_size": 256, "d_model": 512, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4, "d_ffn": 1408}
    config = TransformerConfig(**shape, max_sequence_length=LENGTH, pattern=pattern, **dict(*changes))
    optimizer = partial(torch.optim.AdamW, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    module = SparseBitNet(config, optimizer, warmup_steps=30)
    if options is None:
        for _, layer in list(masked_layers(module)):
            layer.__class__ = FakeQuantizedLinear  # type: ignore[assignment]
    starts = torch.randint(len(data) - LENGTH - 1, (steps * BATCH,), generator=torch.Generator().manual_seed(0))
    rows = [data[start : start + LENGTH + 1].long() for start in starts.tolist()]
    curve = Curve()
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, callbacks=[curve], gradient_clip_val=1.0, logger=False, devices=1,
        plugins=None if options is None else [SparseTernaryPrecision(**options)],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(rows, batch_size=BATCH, pin_memory=True))  # type: ignore[arg-type]
    return torch.stack(curve.losses).float().cpu()


def _reference_of(name: str) -> str:
    return "reference 6:8" if "6:8" in name else "reference"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds of the weights; odd numbers")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--append", action="store_true", help="keep the rows that the CSV has")
    args = parser.parse_args()
    if missing := {_reference_of(name) for name in args.runs} - set(args.runs):
        parser.error(f"distances need the run {' and '.join(map(repr, sorted(missing)))}, too")
    need_gpu()
    torch.set_float32_matmul_precision("high")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    path = fresh_results("loss_curves", keep=args.append)
    print(header())
    data = corpus()
    for seed in args.seeds:
        curves: dict[str, Tensor] = {}
        for name in sorted(args.runs, key=lambda name: name != _reference_of(name)):  # references first
            curve = curves[name] = train(name, data, args.steps, seed)
            distance = float((curve - curves[_reference_of(name)]).abs().mean())
            row: dict[str, object] = {"run": name if seed == 1 else f"{name}, seed {seed}", "distance": distance}
            row |= {f"step {end}": float(curve[end - 10 : end].mean()) for end in range(50, args.steps + 1, 50)}
            append(path, row)


if __name__ == "__main__":
    main()
