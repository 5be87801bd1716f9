"""A model from disk to the device it runs on: dtype and backend by name, as the command line gives them.

A model in training gets its kernels from the precision plugin. One that is loaded to be run has no Trainer; here it
gets the same kernels by the same choice.
"""

from __future__ import annotations

import sys
from typing import Literal

import torch
from torch import nn

from sbn_lightning.backends.selection import choose, require, table
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.formats.load import LoadedModel, load_model
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
    """Loads a model and makes it ready to run.

    Args:
        checkpoint: What :func:`~sbn_lightning.formats.load_model` reads.
        tokenizer: A ``tokenizer.json`` or a folder with one; None: the one with the model.
        device: A device's name; ``"auto"``: a GPU if there is one.
        dtype: Of everything but latent weights; ``"auto"``: bfloat16 on a GPU, float32 elsewhere.
        backend: As of :func:`use_backend`; what it chose is printed to stderr.
        compile: Compile the model's blocks.

    Raises:
        ConfigError: If there is no such device, or the backend cannot run on it.
        DataError: If there is no such model, or it is damaged.
    """
    where = choose_device(device)
    chosen = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if where.type == "cuda" else torch.float32
    loaded = load_model(checkpoint, device=where, dtype=chosen, tokenizer=tokenizer)
    choices = use_backend(loaded.model, backend, chosen)
    if choices and where.type == "cuda":
        print(choices, file=sys.stderr)
    prepare_layers(loaded.model)
    if compile:
        loaded.model.compile_blocks()
    return loaded


def choose_device(name: str) -> torch.device:
    """A device by name, or ``"auto"``.

    Raises:
        ConfigError: If it does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # "meta" exists, but holds nothing
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # of kernels and graphs that ask for none
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here ({reason}); use auto, cpu or cuda") from error
    return device


def use_backend(model: nn.Module, backend: BackendName, dtype: torch.dtype, tokens: int = 2048) -> str:
    """Gives the ternary layers of a model a backend.

    Layers that hold packed weights pick their kernel themselves under ``"auto"``, by the pattern and without measuring.

    Args:
        model: On the device where it runs.
        backend: ``"auto"``: for each layer the fastest that gives the dense result, measured (on a CPU the reference);
            ``"sparse"``: sparse tensor cores, 2:4 only; ``"int8"``: dense int8 tensor cores; ``"reference"``.
        dtype: In which the layers get their tokens.
        tokens: At a time, for the measurement.

    Returns:
        What was chosen for layers with latent weights, as a table; empty if there are none.

    Raises:
        ConfigError: If the backend cannot run here: what it needs and what would work.
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
