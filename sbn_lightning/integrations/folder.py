"""Save a converted PyTorch model to a folder, and load it.

The folder holds two files. ``model.safetensors`` has the tensors. ``config.json`` is the manifest: which layers are
sparse, their options, and a checksum of each file and of the manifest itself. There are two forms:

* ``"packed"`` is for running a model. A ternary layer is stored as ``NAME.codes`` (the group code of
  :mod:`sbn_lightning.formats.group_code`, 1.27 bits a weight at 2:4), ``NAME.gamma`` and ``NAME.bias``. The fused
  weight of a mixture of experts is stored in the same way, as one matrix of all experts.
* ``"latent"`` is for training on. A layer is stored as its latent weight, its packed mask and its bias.

The folder does not hold the model's code. :func:`load_sparse` takes a model that the user built as usual, and checks
everything before it changes that model.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.files import save_tensors, sha256
from sbn_lightning.formats.group_code import GroupCode, choose_code, decode, encode
from sbn_lightning.formats.output import output_folder
from sbn_lightning.integrations.pytorch import convert_by_name
from sbn_lightning.layers.conv1d import is_conv1d
from sbn_lightning.layers.experts import fused_block, fused_shape, put_packed
from sbn_lightning.layers.experts_linear import PackedExperts
from sbn_lightning.layers.masked_linear import MaskedLinear
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.reversion import revert_layers
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.sparsity.config import OPTION_NAMES, TRAINING_NAMES

FORMAT = "sbn-sparse"
VERSION = 1
WEIGHTS = "model.safetensors"
MANIFEST = "config.json"


Form = Literal["packed", "latent"]
SparseLayer = MaskedLinear | PackedTernaryLinear


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """Return the layers of a model that are sparse, with or without latent weights, by name."""
    return {
        name.replace("_orig_mod.", ""): module
        for name, module in model.named_modules()
        if isinstance(module, MaskedLinear | PackedTernaryLinear)
    }


def warn_of_partial_rounding(layers: Mapping[str, SparseLayer], caller: str) -> None:
    """Warn if packed layers would compute something else than the present ones, which are in their rounding warm-up.

    Args:
        layers: The layers that are to be packed, by name.
        caller: The name of the function that packs them.
    """
    found = [name for name, layer in layers.items() if getattr(layer, "is_partly_rounded", False)]
    if found:
        named = f"{found[0]} is" if len(found) == 1 else f"{found[0]} and {len(found) - 1} more layers are"
        warnings.warn(
            f"{caller}: {named} in the middle of the rounding warm-up. The folder holds rounded weights, so it "
            "computes something else than this model at present",
            stacklevel=3,
        )


def save_sparse(model: nn.Module, directory: str | Path, form: Form = "packed", *, overwrite: bool = False) -> Path:
    """Write a converted model to a folder.

    Args:
        model: The model, converted by ``convert``, or loaded by :func:`load_sparse`.
        directory: The folder to write to.
        form: ``"packed"`` to run the model later, ``"latent"`` to train it further.
        overwrite: Whether to replace an earlier export in that folder.

    Returns:
        The folder.

    Raises:
        ConfigError: If no layer is sparse, the form cannot hold a layer, or the folder is taken.
        DataError: If the folder cannot be written. Nothing that was there is lost.
    """
    target = Path(directory)
    if form == "packed":
        warn_of_partial_rounding(sparse_layers(model), "save_sparse")
    with output_folder(target, overwrite) as folder:
        write_sparse(model, folder, form)
    return target


def write_sparse(model: nn.Module, folder: Path, form: Form, extra: Mapping[str, Any] | None = None) -> None:
    """Write a converted model into an empty folder that is there; see :func:`save_sparse`.

    Args:
        model: The model.
        folder: The folder.
        form: ``"packed"`` or ``"latent"``.
        extra: Further entries of the manifest, as plain values.

    Raises:
        ConfigError: If no layer is sparse, or the form cannot hold a layer.
        OSError: If a file cannot be written.
    """
    layers = sparse_layers(model)
    if not layers:
        raise ConfigError(f"save_sparse found no sparse layer in {type(model).__name__}; call convert(model) first")
    if form not in ("packed", "latent"):
        raise ConfigError(f"save_sparse: form={form!r} is not 'packed' or 'latent'")
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        described[name] = describe(layer)
        if form == "packed":
            described[name] |= _pack(name, layer, tensors)
        elif isinstance(layer, PackedTernaryLinear):
            raise ConfigError(f"{name} has no latent weight to save; use form='packed'")
    whole = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    packed = tuple(f"{name}." for name in layers) if form == "packed" else ()
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, value in whole.items():
        if packed and (name in layers or name.startswith(packed)):
            continue
        if not isinstance(value, Tensor):
            raise ConfigError(f"save_sparse: {name} of the model's state dict is a {type(value).__name__}, no tensor")
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        if place in first:  # Tied weights are stored once.
            aliases[name] = first[place]
        else:
            first[place] = name
            tensors[name] = value.detach().cpu()
    save_tensors(tensors, folder / WEIGHTS)
    values = {
        "format": FORMAT,
        "version": VERSION,
        **(extra or {}),
        "form": form,
        "layers": described,
        "aliases": aliases,
        "sha256": {WEIGHTS: sha256(folder / WEIGHTS)},
    }
    values["sha256_of_this"] = _digest(values)
    (folder / MANIFEST).write_text(json.dumps(values, indent=1), encoding="utf-8")


def load_sparse(model: nn.Module, directory: str | Path, *, strict: bool = True) -> list[str]:
    """Load a folder of :func:`save_sparse` into a model that has the same layers.

    Args:
        model: The model that the folder was saved from, built anew: plain or converted. Its layers are converted, or
            replaced by packed ones, in place.
        directory: The folder to read.
        strict: Whether every tensor of the model must be in the folder.

    Returns:
        The names of the sparse layers.

    Raises:
        DataError: If a file is missing, changed or damaged.
        ConfigError: If the model does not fit the folder. The model is unchanged then.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    try:
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise DataError(f"{folder / WEIGHTS} is damaged: {error}") from error
    for name, source in manifest["aliases"].items():
        state[name] = state[source]
    layers: dict[str, dict[str, Any]] = manifest["layers"]
    places = {name: _place(model, name, about, folder) for name, about in layers.items()}
    packed = manifest["form"] == "packed"
    built = {name: unpack_layer(name, about, state, str(folder)) for name, about in layers.items()} if packed else {}
    _check_fit(model, state, layers, packed, strict, folder)
    if packed:
        for name, (parent, child) in places.items():
            old = getattr(parent, child)
            new = built[name].to(_device_of(old)).train(getattr(old, "training", parent.training))
            if isinstance(new, PackedExperts):
                put_packed(parent, child, new)
            else:
                new.plain_class = _plain_class_of(old)
                setattr(parent, child, new)
        model.load_state_dict(state, strict=False)
        return list(layers)
    revert_layers(model)
    convert_by_name(model, {name: conversion_options(about) for name, about in layers.items()})
    model.load_state_dict(state, strict=False)
    return list(layers)


def describe(layer: SparseLayer) -> dict[str, Any]:
    """Return the options of a layer as plain values."""
    about: dict[str, Any] = {
        "out_features": layer.out_features,
        "in_features": layer.in_features,
        **layer.sparsity.to_dict(),
    }
    if hasattr(layer, "experts"):
        about["experts"] = layer.experts
    return about


def conversion_options(about: dict[str, Any]) -> dict[str, Any]:
    """Return what ``convert_by_name`` takes, from what :func:`describe` gave."""
    return {option: value for option, value in about.items() if option in (*OPTION_NAMES, *TRAINING_NAMES)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a folder, and the files it names.

    Raises:
        DataError: If a file is missing, changed or damaged.
    """
    file = folder / MANIFEST
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file} is damaged: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DataError(f"{file} is not the manifest of a folder that save_sparse wrote")
    if values.get("version") != VERSION:
        raise DataError(f"{file}: version {values.get('version')} of {FORMAT}, this program reads version {VERSION}")
    if values.pop("sha256_of_this", None) != _digest(values):
        raise DataError(f"{file} was changed or is damaged: its checksum does not fit; save the model again")
    for name, expected in values["sha256"].items():
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing; save the model again")
        if sha256(folder / name) != expected:
            raise DataError(f"{folder / name} was changed or cut short: its checksum does not fit")
    return values


def unpack_layer(name: str, about: dict[str, Any], state: dict[str, Tensor], source: str) -> PackedTernaryLinear:
    """Build a packed layer from its group code, and take its tensors out of ``state``."""
    try:
        codes = decode(
            state.pop(f"{name}.codes"), GroupCode(**about["code"]), about["out_features"], about["in_features"]
        )
    except (KeyError, ValueError) as error:
        raise DataError(f"{source}: the codes of {name} are missing or damaged: {error}") from error
    layer = (PackedExperts if "experts" in about else PackedTernaryLinear)(
        codes,
        state.pop(f"{name}.gamma"),
        state.pop(f"{name}.bias", None),
        pattern=about["pattern"],
        split_sizes=None if about["split_sizes"] is None else tuple(about["split_sizes"]),
        activation_bits=about["activation_bits"],
    )
    if isinstance(layer, PackedExperts):
        layer.experts = about["experts"]
    return layer


def _pack(name: str, layer: SparseLayer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if not isinstance(layer, SparseBitLinear | PackedTernaryLinear):
        raise ConfigError(f"{name} is sparse, but not ternary: it has no codes to pack; use form='latent'")
    codes, gamma = (tensor.detach().cpu() for tensor in layer.ternary())
    code = choose_code(codes, layer.pattern.m)
    tensors[f"{name}.codes"] = encode(codes, code)
    tensors[f"{name}.gamma"] = gamma.clone()
    if layer.bias is not None:
        tensors[f"{name}.bias"] = layer.bias.detach().cpu()
    return {"code": {"n": code.n, "m": code.m, "groups": code.groups, "bytes": code.bytes}}


def _place(model: nn.Module, name: str, about: dict[str, Any], folder: Path) -> tuple[nn.Module, str]:
    """Return the parent and the attribute of a layer, after checking its shape."""
    parent, _, child = name.rpartition(".")
    if (fused := fused_block(model, name)) is not None:
        experts, rows, width = fused_shape(*fused)
        if (experts, experts * rows, width) != (about.get("experts"), about["out_features"], about["in_features"]):
            raise ConfigError(f"{name} has {experts} experts of {width} -> {rows} in the model; {folder} has others")
        return fused
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise ConfigError(f"{folder} has the layer {name}, {type(model).__name__} has not") from error
    if isinstance(layer, nn.Linear | PackedTernaryLinear):
        shape = (layer.out_features, layer.in_features)
    elif is_conv1d(layer):
        shape = (layer.nf, layer.nx)  # type: ignore[assignment]
    else:
        raise ConfigError(f"{folder} has the layer {name}, which is a {type(layer).__name__} in the model")
    if shape != (about["out_features"], about["in_features"]):
        raise ConfigError(
            f"{name} is {about['in_features']} -> {about['out_features']} in {folder}, "
            f"{shape[1]} -> {shape[0]} in the model"
        )
    return model.get_submodule(parent), child


def _check_fit(
    model: nn.Module, state: dict[str, Tensor], layers: dict[str, Any], packed: bool, strict: bool, folder: Path
) -> None:
    ours = tuple(f"{name}." for name in layers)
    wanted = {
        name.replace("_orig_mod.", ""): value
        for name, value in model.state_dict().items()
        if name not in layers and not name.replace("_orig_mod.", "").startswith(ours)
    }
    found = {name for name in state if name not in layers and not name.startswith(ours)}
    if missing := sorted(wanted.keys() - found) if strict else []:
        raise ConfigError(f"{folder} lacks {len(missing)} tensors of the model, the first is {missing[0]}")
    if extra := sorted(found - wanted.keys()):
        raise ConfigError(f"{folder} has {len(extra)} tensors that the model lacks, the first is {extra[0]}")
    for name in found:
        if state[name].shape != wanted[name].shape:
            raise ConfigError(
                f"{name} is {list(state[name].shape)} in {folder}, {list(wanted[name].shape)} in the model"
            )


def _plain_class_of(layer: nn.Module) -> type[nn.Module]:
    """The class that a layer has when it is not sparse."""
    if isinstance(layer, PackedTernaryLinear):
        return layer.plain_class
    return type(layer) if is_conv1d(layer) else vars(layer).get("converted_from", nn.Linear)


def _device_of(layer: nn.Module | Tensor) -> torch.device:
    if isinstance(layer, Tensor):
        return layer.device
    return next((tensor.device for tensor in layer.state_dict().values()), torch.device("cpu"))


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
