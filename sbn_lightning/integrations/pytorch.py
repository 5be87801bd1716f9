"""The whole method for plain PyTorch: convert a model, run its layers on the kernels, and turn the model back.

Nothing here imports Lightning. :class:`~sbn_lightning.schedule.SparsitySchedule` is the part that changes masks over
the course of training, and :mod:`sbn_lightning.integrations.folder` saves and loads.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sbn_lightning.backends.base import Gradients, SavedGates
from sbn_lightning.backends.reference import REFERENCE
from sbn_lightning.backends.selection import BackendName, check_options, choose, table
from sbn_lightning.core.devices import usable_device
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.conversion import (
    ConversionReport,
    connect_layers,
    convert_linears,
    convert_quietly,
    revert_linears,
)
from sbn_lightning.layers.experts import convert_experts, fused_block, fused_weights
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.seeds import draw_seeds
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear, ternary_layers
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern

__all__ = ["convert", "convert_by_name", "revert", "use_kernels"]


def convert(
    model: nn.Module,
    sparsity: SparsityConfig | NMPattern | str | None = None,
    *,
    include: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
    **options: Any,
) -> ConversionReport:
    """Convert the linear layers of a model, and the fused experts of a mixture of experts, in place.

    Args:
        model: The model.
        sparsity: The options of the new layers: a :class:`SparsityConfig`, or only a pattern. None takes the defaults
            of :class:`SparsityConfig`, with the pattern 6:8.
        include: Name patterns of the layers to convert. Output heads and routers are converted only if a pattern other
            than ``"*"`` names them.
        exclude: Name patterns of further layers to leave alone; they win over ``include``.
        **options: Further options of :func:`~sbn_lightning.layers.conversion.convert_linears`, and single fields of
            :class:`SparsityConfig`.

    Returns:
        What was converted, and what was skipped and why.

    Raises:
        ConfigError: If nothing was converted.
    """
    return convert_linears(model, sparsity, include=include, exclude=exclude, **options)


def revert(model: nn.Module) -> list[str]:
    """Turn sparse layers, latent or packed, back into plain ones with the effective weights, and return their names.

    A model of transformers is no longer marked as quantised; see
    :func:`~sbn_lightning.layers.reversion.revert_linears`.
    """
    return revert_linears(model)


def convert_by_name(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Convert exactly the layers that are named, each with its own options.

    Args:
        model: The model, changed in place.
        layers: For each name the options of ``convert`` (``pattern``, ``kind``, ``activation_bits`` and so on), and
            ``split_sizes`` for a fused layer.

    Raises:
        ConfigError: If a layer cannot be converted.
        AttributeError: If the model has no layer of that name.
    """
    for name, options in layers.items():
        given = {key: value for key, value in options.items() if key != "split_sizes"}
        if (fused := fused_block(model, name)) is not None:
            if fused_weights(fused[0]):  # Both weights of the experts are converted with the first one.
                convert_experts(fused[0], SparsityConfig.make(**given))
            continue
        layer = model.get_submodule(name)
        only = _alone(name, layer)
        # A pattern that names the layer converts it whatever it is called, also an output head.
        convert_quietly(only, include=(glob.escape(name),), shown=False, **given)
        sizes = options.get("split_sizes")
        wanted = None if sizes is None else tuple(sizes)
        if (
            isinstance(layer, SparseBitLinear) and layer.split_sizes != wanted
        ):  # Conversion guesses split sizes if none are given.
            layer.sparsity = replace(layer.sparsity, split_sizes=wanted)
    connect_layers(model)


_seed_hooks: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()


def _alone(name: str, layer: nn.Module) -> nn.Module:
    """Return a module that holds this one layer under its whole name, so that no other layer can match."""
    *parents, last = name.split(".")
    root = place = nn.Module()
    for parent in parents:
        place._modules[parent] = nn.Module()
        place = place.get_submodule(parent)
    place._modules[last] = layer
    return root


def use_kernels(
    model: nn.Module,
    device: torch.device | str | None = None,
    *,
    backend: BackendName = "auto",
    gradients: Gradients = "bf16",
    dtype: torch.dtype | None = None,
    tokens: int = 8192,
    seed: int = 0,
    saved_gates: SavedGates = "full",
    join_layers: bool = True,
) -> str:
    """Choose what each ternary layer of a model computes with.

    The choice changes speed alone: every backend gives the products of the reference. Layers without latent weights
    (:class:`PackedTernaryLinear`) choose their kernel by themselves at their first forward.

    Args:
        model: The model, with ternary layers.
        device: Where to move the model first; None leaves the model where it is.
        backend: ``"auto"`` measures on a GPU and takes the reference elsewhere. ``"sparse"`` is for sparse tensor
            cores (2:4 only), ``"int8"`` for dense int8 tensor cores, ``"reference"`` for plain PyTorch.
        gradients: ``"bf16"`` for exact straight-through gradients. ``"int8"`` rounds the gradient of each output
            stochastically to int8 and runs the backward on int8 tensor cores. ``"int8-dx"`` does so for the gradient of
            the tokens alone, and ``"int8-dw"`` for the gradient of the weight alone.
        dtype: The dtype in which layers get their tokens. None means bfloat16 on a GPU and float32 elsewhere.
        tokens: The number of tokens that the timing run uses.
        seed: The seed of the stochastic rounding.
        saved_gates: How the gates and ups of a SwiGLU are saved for the backward: ``"full"``, or as codes (``"int8"``).
        join_layers: Whether a compiled training step computes layers that read the same tokens as one product. The
            forward has the same bits either way.

    Returns:
        A table that says what each layer runs on and why.

    Raises:
        ConfigError: If the model has no ternary layer, or the device or a backend that was asked for cannot be used
            here.
    """
    check_options("use_kernels", backend, gradients, saved_gates, tokens)
    if device is not None:
        here = usable_device(
            device, "use_kernels: device", "leave device out: on a CPU every layer runs on the reference"
        )
        model.to(here)
    packed = [module for module in model.modules() if isinstance(module, PackedTernaryLinear)]
    layers = ternary_layers(model)
    if not layers and not packed:
        raise ConfigError(f"use_kernels found no ternary layer in {type(model).__name__}; call convert(model) first")
    choices = {}
    if layers:
        where = next(iter(layers.values())).weight.device
        if dtype is None:
            dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
        choices = choose(layers, backend, where, dtype, tokens)  # Raises what can go wrong, before a layer is changed.
    connect_layers(model)  # Layers that torchao converted one by one have not been connected.
    for module in packed:
        module.backend = "kernels" if backend == "sparse" else backend
    if (handle := _seed_hooks.pop(model, None)) is not None:
        handle.remove()
    if not layers:
        return f"{len(packed)} packed layers: backend {packed[0].backend}"
    for name, layer in layers.items():
        layer.backend = choices[name].make(gradients, saved_gates == "int8", join_layers)
    if gradients != "bf16":
        _seed_hooks[model] = model.register_forward_pre_hook(_SeedEachPass(seed))
    return table(layers, choices)


class _SeedEachPass:
    """Give each layer a fresh seed before each forward that needs gradients, as rounded gradients require."""

    def __init__(self, seed: int) -> None:
        self._seed, self._passes = seed, count()

    def __call__(self, model: nn.Module, inputs: Any) -> None:
        layers = [layer for layer in ternary_layers(model).values() if layer.backend is not REFERENCE]
        if torch.is_grad_enabled() and layers:
            draw_seeds(layers, self._seed, next(self._passes))
