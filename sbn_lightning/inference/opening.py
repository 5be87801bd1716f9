"""Load a model onto its device, and choose dtype and backend by the names that the command line uses.

A model in training gets its kernels from the precision plugin. A model that is loaded to be run has no Trainer, and
gets the same kernels here, by the same choice.
"""

from __future__ import annotations

import sys
from typing import Literal

import torch
from torch import nn

from sbn_lightning.backends.selection import choose, require, table
from sbn_lightning.core.devices import usable_device
from sbn_lightning.formats.load import load_model
from sbn_lightning.formats.loaded import LoadedModel
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.sparse_linear import prepare_layers, ternary_layers

BackendName = Literal["auto", "reference", "int8", "sparse"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]


def open_model(
    checkpoint: str,
    *,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: DTypeName = "auto",
    backend: BackendName = "auto",
    compile: bool = False,
) -> LoadedModel:
    """Load a model and make it ready to run.

    Args:
        checkpoint: The model, in any format that :func:`~sbn_lightning.formats.load_model` reads.
        tokenizer: A ``tokenizer.json`` or a folder with one; None takes the one that comes with the model.
        device: The name of a device; ``"auto"`` takes a GPU if there is one.
        dtype: The dtype of everything but latent weights; ``"auto"`` is bfloat16 on a GPU and float32 elsewhere.
        backend: The backend, as for :func:`use_backend`. The choice is printed to stderr.
        compile: Whether to compile the model's blocks.

    Raises:
        ConfigError: If there is no such device, or the backend cannot run on the device.
        DataError: If there is no such model, or the model is damaged.
    """
    where = choose_device(device)
    chosen = choose_dtype(dtype, where)
    loaded = load_model(checkpoint, device=where, dtype=chosen, tokenizer=tokenizer)
    return make_ready(loaded, where, chosen, backend, compile)


def make_ready(
    loaded: LoadedModel, device: torch.device, dtype: torch.dtype, backend: BackendName, compile: bool
) -> LoadedModel:
    """Make a model that was loaded ready to run, and return it.

    Args:
        loaded: The model, on ``device``.
        device: The device where the model runs.
        dtype: The dtype of the activations.
        backend: The backend, as for :func:`use_backend`. The choice is printed to stderr.
        compile: Whether to compile the model's blocks.

    Raises:
        ConfigError: If the backend cannot run on the device.
    """
    choices = use_backend(loaded.model, backend, dtype)
    if choices and device.type == "cuda":
        print(choices, file=sys.stderr)
    prepare_layers(loaded.model)
    if compile:
        loaded.model.compile_blocks()
    return loaded


def choose_dtype(name: DTypeName, device: torch.device) -> torch.dtype:
    """Find a dtype by its name; ``"auto"`` is bfloat16 on a GPU and float32 elsewhere."""
    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def choose_device(name: str) -> torch.device:
    """Find a device by its name.

    Args:
        name: The name, such as ``"cuda:1"``; ``"auto"`` takes a GPU if there is one.

    Raises:
        ConfigError: If the device cannot be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = usable_device(name, "device", "use auto, cpu or cuda")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Some kernels and graphs run on the current device.
    return device


def use_backend(model: nn.Module, backend: BackendName, dtype: torch.dtype, tokens: int = 2048) -> str:
    """Give the ternary layers of a model a backend.

    With ``"auto"``, layers that hold packed weights choose their kernel by the pattern, without measuring.

    Args:
        model: The model, on the device where it runs.
        backend: ``"auto"`` measures and takes for each layer the fastest backend that gives the dense result (on a CPU
            the reference). ``"sparse"`` takes sparse tensor cores, for 2:4 only. ``"int8"`` takes dense int8 tensor
            cores. ``"reference"`` takes plain PyTorch.
        dtype: The dtype of the activations that the layers get.
        tokens: How many tokens the timing run uses.

    Returns:
        A table of what was chosen for the layers with latent weights; empty if there are none.

    Raises:
        ConfigError: If the backend cannot run here. The message says what it needs and what would work.
    """
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedTernaryLinear)}
    if packed and backend in ("int8", "sparse"):
        device = next(iter(packed.values())).codes.device
        require(packed, backend, device, packed=True)
    for module in packed.values():
        module.backend = "kernels" if backend == "sparse" else backend
    layers = ternary_layers(model)
    if not layers:
        return ""
    choices = choose(layers, backend, next(iter(layers.values())).weight.device, dtype, tokens)
    for name, layer in layers.items():
        layer.backend = choices[name].make("bf16")
    return table(layers, choices)
