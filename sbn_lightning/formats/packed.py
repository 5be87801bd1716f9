"""The packed form: a folder to run a model from, with weights in close to as few bits as they carry.

``model.safetensors`` holds the following tensors.

* Ternary layers: ``NAME.codes`` (:mod:`~sbn_lightning.formats.group_code`: 1.273 bits a weight at 2:4, 1.6 without a
  pattern), ``NAME.gamma`` (float32, one for each part of a fused layer) and ``NAME.bias``. Gamma is stored, because a
  mean over the codes would give another value.
* Masked layers: ``NAME.values``, the weights that the mask leaves in, row by row, and ``NAME.mask``, one bit for each
  weight.
* Embedding and head: 16 bits by default, so a model that computes in float32 has other logits than the checkpoint; 32
  bits give the same. With 8 bits each row is ``NAME.codes`` (int8) times ``NAME.scale`` (float32, one for each row).
* Norms, biases and routers: as they are in the model.

``config.json`` holds the configuration, what each layer's codes look like, and a checksum of every file and of itself.
The checksums find accidents; they are not a signature. Version 1 of the format has neither masked layers nor 8-bit
embeddings. A folder that needs neither is still written as version 1, so that older programs can read it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from sbn_lightning.checkpoints.text_files import TextFiles, read_folder
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.files import save_tensors, sha256
from sbn_lightning.formats.assemble import empty_model, finish_model
from sbn_lightning.formats.files import read_json, refuse_pointer
from sbn_lightning.formats.group_code import GroupCode, choose_code, decode, encode
from sbn_lightning.formats.sizes import Sizes, part_of
from sbn_lightning.layers.experts_linear import SparseBitExperts, packed_experts
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.sparse_linear import SparseBitLinear, SparseLinear
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.transformer import TernaryTransformer
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import unpack_mask

FORMAT = "sbn-packed"
VERSION = 2
VERSIONS = (1, VERSION)
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
LARGE = ("embed.weight", "lm_head.weight")


def ternary_layers(model: nn.Module) -> dict[str, SparseBitLinear | PackedTernaryLinear]:
    """The ternary layers of a model by name, with latent weights or without."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseBitLinear | PackedTernaryLinear)
    }


def write_packed(
    model: TernaryTransformer, folder: Path, text: TextFiles, embedding_bits: int = 16, value_bits: int = 16
) -> Sizes:
    """Write weights, text files and configuration into an existing folder.

    Args:
        model: A ternary or a masked model.
        folder: The folder to write to.
        text: The model's text files.
        embedding_bits: Bits for each weight of embedding and head: 8, 16 or 32. 16 means bfloat16 where the model holds
            more bits; 32 leaves the weights as they are.
        value_bits: Bits for each weight of a masked layer: 16 or 32, with the same meaning.

    Returns:
        The size of each part of the file.

    Raises:
        ConfigError: If the linear layers are neither ternary nor masked.
    """
    ternary = ternary_layers(model)
    masked = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    if not ternary and not masked:
        raise ConfigError(
            f"the model's linear layers are {model.config.linear!r}, not ternary or masked: there is nothing to pack; "
            "use --format hf"
        )
    tensors: dict[str, Tensor] = {}
    sizes = Sizes()
    described = {name: _pack_ternary(name, layer, tensors, sizes) for name, layer in _progress(ternary)}
    described_masked = {
        name: _pack_masked(name, layer, tensors, sizes, value_bits) for name, layer in _progress(masked)
    }
    own = tuple(f"{name}." for name in (*ternary, *masked))
    others = {name: tensor.cpu() for name, tensor in model.state_dict().items() if not name.startswith(own)}
    if model.config.tie_embeddings:
        others.pop("lm_head.weight", None)
    in_8_bits = [name for name in LARGE if name in others] if embedding_bits == 8 else []
    for name, tensor in others.items():
        if name in in_8_bits:
            codes, scale = int8_rows(tensor)
            stored = {f"{name}.codes": codes, f"{name}.scale": scale}
        else:
            stored = {name: in_16_bits(tensor) if name in LARGE and embedding_bits == 16 else tensor}
        tensors |= stored
        sizes.add(part_of(name, model.config.linear), tensor.numel(), sum(map(_size, stored.values())))
    text.write(folder)
    save_tensors(tensors, folder / WEIGHTS)
    linear = sizes[f"{model.config.linear} layers"]
    values: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION if in_8_bits or masked else 1,
        "config": model.config.to_dict(whole=False),
        "layers": described,
        **({"masked_layers": described_masked} if masked else {}),
        **({"int8": in_8_bits} if in_8_bits else {}),
        **({"token_ids": text.token_ids} if text.token_ids else {}),
        "bits_per_weight": {
            "linear_bits": round(linear.bits, 4),
            "file_bits": round(8 * (folder / WEIGHTS).stat().st_size / sizes.weights, 4),
        },
        "sha256": {file.name: sha256(file) for file in sorted(folder.iterdir())},
    }
    (folder / CONFIG).write_text(json.dumps(values | {"sha256_of_this": _digest(values)}, indent=1), encoding="utf-8")
    return sizes


def in_16_bits(tensor: Tensor) -> Tensor:
    """Return a tensor in bfloat16 if its dtype has more than 16 bits; otherwise the tensor itself.

    A GPU computes in bfloat16 by default (``--dtype auto``), so the rounded weights give the same logits there.
    """
    return tensor.bfloat16() if tensor.dtype in (torch.float32, torch.float64) else tensor


def _pack_ternary(
    name: str, layer: SparseBitLinear | PackedTernaryLinear, tensors: dict[str, Tensor], sizes: Sizes
) -> dict[str, Any]:
    """Add the tensors of a ternary layer; return what ``config.json`` says of the layer."""
    codes, gamma = (tensor.detach().cpu() for tensor in layer.ternary())
    code = choose_code(codes, layer.pattern.m)
    tensors[f"{name}.codes"] = encode(codes, code)
    tensors[f"{name}.gamma"] = gamma.clone()
    sizes.add("ternary layers", codes.numel(), _size(tensors[f"{name}.codes"]) + _size(gamma))
    if layer.bias is not None:
        bias = tensors[f"{name}.bias"] = layer.bias.detach().cpu()
        sizes.add("norms and biases", bias.numel(), _size(bias))
    return {
        "out_features": layer.out_features,
        "in_features": layer.in_features,
        "split_sizes": layer.split_sizes,
        "activation_bits": layer.activation_bits,
        "pattern": str(layer.pattern),
        "code": {"n": code.n, "m": code.m, "groups": code.groups, "bytes": code.bytes},
    }


def _pack_masked(
    name: str, layer: SparseLinear, tensors: dict[str, Tensor], sizes: Sizes, value_bits: int
) -> dict[str, Any]:
    """Add the tensors of a masked layer; return what ``config.json`` says of the layer."""
    mask = layer.packed_mask().detach().cpu()
    values = layer.weight.detach().cpu()[unpack_mask(mask, layer.in_features)]
    tensors[f"{name}.values"] = in_16_bits(values) if value_bits == 16 else values
    tensors[f"{name}.mask"] = mask
    sizes.add("masked layers", layer.weight.numel(), _size(tensors[f"{name}.values"]) + _size(mask))
    if layer.bias is not None:
        bias = tensors[f"{name}.bias"] = layer.bias.detach().cpu()
        sizes.add("norms and biases", bias.numel(), _size(bias))
    return {"out_features": layer.out_features, "in_features": layer.in_features, "pattern": str(layer.pattern)}


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to int8 codes ``[rows, columns]`` and a float32 scale for each row.

    ``weight`` is close to ``codes * scale``; the largest weight of a row becomes 127 or -127.
    """
    scale = weight.float().abs().amax(dim=1) / 127
    codes = (weight.float() / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).round()
    return codes.to(torch.int8), scale


def read_packed(folder: Path) -> tuple[TernaryTransformer, TextFiles]:
    """Read a packed folder. Ternary layers become :class:`PackedTernaryLinear`.

    Raises:
        DataError: If a file is missing, cut short or changed; the message names the file.
    """
    values = _read_checked(folder)
    try:
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise DataError(f"{folder / WEIGHTS} is damaged: {error}") from error
    return _build(_config(values, folder), values, state, str(folder)), read_folder(folder, values.get("token_ids"))


def read_packed_config(folder: Path) -> TransformerConfig:
    """Read the configuration of a packed folder; the weights are not looked at.

    Raises:
        DataError: If ``config.json`` is damaged.
    """
    return _config(_read_described(folder), folder)


def read_packed_text(folder: Path) -> TextFiles:
    """Read the text files of a packed folder; the weights are not looked at.

    Raises:
        DataError: If ``config.json`` or a text file is damaged.
    """
    return read_folder(folder, _read_described(folder).get("token_ids"))


def _config(values: dict[str, Any], folder: Path) -> TransformerConfig:
    try:
        return TransformerConfig(**values["config"])
    except (ConfigError, TypeError) as error:
        raise DataError(f"{folder / CONFIG}: its configuration cannot be used here: {error}") from error


def _read_described(folder: Path) -> dict[str, Any]:
    values = read_json(folder / CONFIG)
    if values.get("version") not in VERSIONS:
        raise DataError(
            f"{folder / CONFIG}: version {values.get('version')} of {FORMAT}, this program reads versions "
            f"{' and '.join(map(str, VERSIONS))}"
        )
    if values.pop("sha256_of_this", None) != _digest(values):
        raise DataError(f"{folder / CONFIG} was changed or is damaged: its checksum does not fit; export it again")
    return values


def _read_checked(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder whose files all have the checksums that it states."""
    values = _read_described(folder)
    for name, expected in values["sha256"].items():
        file = folder / name
        if not file.is_file():
            raise DataError(f"{file} is missing; export the folder again")
        if sha256(file) != expected:
            refuse_pointer(file)
            raise DataError(f"{file} was changed, cut short or is damaged: its checksum does not fit; export it again")
    return values


def _build(
    config: TransformerConfig, values: dict[str, Any], state: dict[str, Tensor], source: str
) -> TernaryTransformer:
    model = empty_model(config)
    own = set()
    for name, about in _progress(values["layers"], "unpacking"):
        try:
            codes = decode(
                state.pop(f"{name}.codes"), GroupCode(**about["code"]), about["out_features"], about["in_features"]
            )
        except ValueError as error:
            raise DataError(f"{source}: {name}.codes: {error}") from error
        sparsity = SparsityConfig.make(
            about["pattern"],
            split_sizes=None if about["split_sizes"] is None else tuple(about["split_sizes"]),
            activation_bits=about["activation_bits"],
        )
        parent, _, child = name.rpartition(".")
        gamma, bias, latent = state.pop(f"{name}.gamma"), state.pop(f"{name}.bias", None), model.get_submodule(name)
        if isinstance(latent, SparseBitExperts):
            layer: PackedTernaryLinear = packed_experts(codes, gamma, like=latent, sparsity=sparsity)
        else:
            layer = PackedTernaryLinear(codes, gamma, bias, sparsity=sparsity)
        setattr(model.get_submodule(parent), child, layer)
        own |= {f"{name}.{part}" for part in layer.state_dict()}
    for name, about in values.get("masked_layers", {}).items():
        bits = state[f"{name}.mask_bits"] = state.pop(f"{name}.mask")
        kept = state.pop(f"{name}.values")
        weight = kept.new_zeros(about["out_features"], about["in_features"])
        weight[unpack_mask(bits, about["in_features"])] = kept
        state[f"{name}.weight"] = weight
    for name in values.get("int8", []):
        state[name] = state.pop(f"{name}.codes") * state.pop(f"{name}.scale").unsqueeze(1)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    return finish_model(model, [name for name in missing if name not in own | tied], unexpected, source)


def _progress(layers: dict[str, Any], what: str = "packing") -> Any:
    return tqdm(layers.items(), desc=what, unit="layer", disable=None if layers else True)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
