"""The packed form: a folder to run a ternary model from, a twentieth of the training checkpoint's linear layers.

``model.safetensors`` holds, for each ternary layer, ``NAME.codes`` (:mod:`group_code`: 1.273 bits a weight at 2:4, 1.6
without a pattern), ``NAME.gamma`` (float32, one a part: explicit, as a mean over the codes would be wrong) and
``NAME.bias``; the other tensors as they are in the model. ``config.json`` holds the configuration, what each layer's
codes look like, and a checksum of every file and of itself. The checksums find accidents; they are no signature.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.files import save_tensors, sha256
from sbn_lightning.formats.assemble import empty_model, finish_model
from sbn_lightning.formats.group_code import GroupCode, choose_code, decode, encode
from sbn_lightning.formats.huggingface.folder import read_json
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.sparse_linear import SparseBitLinear
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.transformer import TernaryTransformer

FORMAT = "sbn-packed"
VERSION = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def ternary_layers(model: nn.Module) -> dict[str, SparseBitLinear | PackedTernaryLinear]:
    """The ternary layers of a model by name, with latent weights or without."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseBitLinear | PackedTernaryLinear)
    }


def write_packed(model: TernaryTransformer, folder: Path) -> dict[str, float]:
    """Writes weights and configuration into an existing folder that holds a tokenizer, if there is one.

    Returns:
        ``linear_bits``: bits a weight of the ternary layers, codes and gamma; ``file_bits``: bits a parameter of the
        whole file; ``file_bytes``.

    Raises:
        ConfigError: If no layer is ternary.
    """
    layers = ternary_layers(model)
    if not layers:
        raise ConfigError(
            f"the model's linear layers are {model.config.linear!r}, not ternary: there is nothing to pack; "
            "use --format hf"
        )
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    weights = stored = 0
    for name, layer in tqdm(layers.items(), desc="packing", unit="layer", disable=None):
        codes, gamma = (tensor.detach().cpu() for tensor in layer.ternary())
        code = choose_code(codes, layer.pattern.m)
        tensors[f"{name}.codes"] = encode(codes, code)
        tensors[f"{name}.gamma"] = gamma.clone()
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias.detach().cpu()
        described[name] = {
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "split_sizes": layer.split_sizes,
            "activation_bits": layer.activation_bits,
            "pattern": str(layer.pattern),
            "code": {"n": code.n, "m": code.m, "groups": code.groups, "bytes": code.bytes},
        }
        weights += codes.numel()
        stored += tensors[f"{name}.codes"].numel() + gamma.numel() * gamma.element_size()
    ours = tuple(f"{name}." for name in layers)
    others = {name: tensor.cpu() for name, tensor in model.state_dict().items() if not name.startswith(ours)}
    if model.config.tie_embeddings:
        others.pop("lm_head.weight", None)
    tensors |= others
    save_tensors(tensors, folder / WEIGHTS)
    file_bytes = (folder / WEIGHTS).stat().st_size
    biases = sum(layer.out_features for layer in layers.values() if layer.bias is not None)
    parameters = weights + biases + sum(tensor.numel() for tensor in others.values())
    sizes = {
        "linear_bits": 8 * stored / weights,
        "file_bits": 8 * file_bytes / parameters,
        "file_bytes": float(file_bytes),
    }
    values = {
        "format": FORMAT,
        "version": VERSION,
        "config": model.config.to_dict(),
        "layers": described,
        "bits_per_weight": {key: round(value, 4) for key, value in sizes.items() if key != "file_bytes"},
        "sha256": {file.name: sha256(file) for file in sorted(folder.iterdir())},
    }
    (folder / CONFIG).write_text(json.dumps(values | {"sha256_of_this": _digest(values)}, indent=1), encoding="utf-8")
    return sizes


def read_packed(folder: Path) -> TernaryTransformer:
    """Reads a packed folder: a model whose ternary layers are :class:`PackedTernaryLinear`.

    Raises:
        DataError: If a file is missing, cut short or changed; the message names it.
    """
    values = read_json(folder / CONFIG)
    if values.get("version") != VERSION:
        raise DataError(
            f"{folder / CONFIG}: version {values.get('version')} of {FORMAT}, this program reads version {VERSION}"
        )
    if values.pop("sha256_of_this", None) != _digest(values):
        raise DataError(f"{folder / CONFIG} was changed or is damaged: its checksum does not fit; export it again")
    for name, expected in values["sha256"].items():
        file = folder / name
        if not file.is_file():
            raise DataError(f"{file} is missing; export the folder again")
        if sha256(file) != expected:
            raise DataError(f"{file} was changed, cut short or is damaged: its checksum does not fit; export it again")
    try:
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise DataError(f"{folder / WEIGHTS} is damaged: {error}") from error
    try:
        config = TransformerConfig(**values["config"])
    except (ConfigError, TypeError) as error:
        raise DataError(f"{folder / CONFIG}: its configuration cannot be used here: {error}") from error
    return _build(config, values["layers"], state, str(folder))


def _build(
    config: TransformerConfig, layers: dict[str, dict[str, Any]], state: dict[str, Tensor], source: str
) -> TernaryTransformer:
    model = empty_model(config)
    own = set()
    for name, about in tqdm(layers.items(), desc="unpacking", unit="layer", disable=None):
        try:
            codes = decode(
                state.pop(f"{name}.codes"), GroupCode(**about["code"]), about["out_features"], about["in_features"]
            )
        except ValueError as error:
            raise DataError(f"{source}: {name}.codes: {error}") from error
        layer = PackedTernaryLinear(
            codes,
            state.pop(f"{name}.gamma"),
            state.pop(f"{name}.bias", None),
            pattern=about["pattern"],
            split_sizes=None if about["split_sizes"] is None else tuple(about["split_sizes"]),
            activation_bits=about["activation_bits"],
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        own |= {f"{name}.{part}" for part in layer.state_dict()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    return finish_model(model, [name for name in missing if name not in own | tied], unexpected, source)


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
