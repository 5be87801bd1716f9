"""Folders of transformers' bitnet: ternary codes and one scale for each tensor, or latent weights.

A folder can hold ternary weights in three forms:

* 2-bit codes, as in BitNet b1.58 2B4T and in ``hf-bitnet`` exports of this project,
* the same codes as floating-point numbers, which transformers reads as well,
* latent weights that transformers quantises in each forward (``quantization_mode`` "online").

``hf-bitnet`` exports are read back to the same codes, and to the same gamma up to rounding. transformers has no field
for the N:M pattern of the weights. Exports of this project add the pattern to ``config.json`` under ``sbn``. Other
models are taken to be dense.

transformers' ``bitlinear`` divides by ``weight_scale`` and ``autobitlinear`` multiplies by it; see
:mod:`sbn_lightning.formats.huggingface.write`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sbn_lightning.checkpoints.text_files import TextFiles
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.formats.assemble import build_model, empty_model, finish_model
from sbn_lightning.formats.files import read_json
from sbn_lightning.formats.huggingface.config import from_hf
from sbn_lightning.formats.huggingface.folder import CONFIG, Read, open_weights, read_hf_text
from sbn_lightning.formats.huggingface.names import Part, from_hf_state, linear_parts, other_parts
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.transformer import TernaryTransformer
from sbn_lightning.sparsity.pattern import pack_mask

SBN = "sbn"  # The entry in config.json for options that transformers does not know.
DENSE = "8:8"  # The pattern for weights that follow no pattern.


def read_hf_bitnet(folder: Path) -> tuple[TernaryTransformer, TextFiles]:
    """Read a ternary model. Where the folder has codes, layers become :class:`PackedTernaryLinear`.

    Raises:
        ConfigError: If the model has a feature that is not supported.
        DataError: If a file is missing or damaged, or the tensors do not fit the configuration.
    """
    values = read_json(folder / CONFIG)
    config = bitnet_config(values, str(folder / CONFIG))
    if _is_online(values):
        with open_weights(folder) as (names, read):
            state = from_hf_state(config, read, names, str(folder))
            for part in linear_parts(config):  # All weights count.
                every = torch.ones_like(state[f"{part.ours}.weight"], dtype=torch.bool)
                state[f"{part.ours}.mask_bits"] = pack_mask(every)
            return build_model(config, state, str(folder)), read_hf_text(folder)
    divides = values["quantization_config"].get("linear_class", "bitlinear") == "bitlinear"
    model = empty_model(config)
    own: set[str] = set()
    with open_weights(folder) as (names, read):
        for part in tqdm(list(linear_parts(config)), desc="unpacking", unit="layer", disable=None):
            layer = _layer(part, config, read, names, divides, str(folder))
            parent, _, child = part.ours.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
            own |= {f"{part.ours}.{name}" for name in layer.state_dict()}
        state = {part.ours: read(part.theirs[0]) for part in other_parts(config) if part.theirs[0] in names}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    tied = {"lm_head.weight"} if config.tie_embeddings else set()
    finish_model(model, [name for name in missing if name not in own | tied], unexpected, str(folder))
    return model, read_hf_text(folder)


def read_bitnet_config(folder: Path) -> TransformerConfig:
    """Read the configuration of a folder with packed ternary weights; the errors are those of the model's reader."""
    return bitnet_config(read_json(folder / CONFIG), str(folder / CONFIG))


def _is_online(values: dict[str, Any]) -> bool:
    return bool(values["quantization_config"].get("quantization_mode", "offline") == "online")


def bitnet_config(values: dict[str, Any], source: str) -> TransformerConfig:
    """Read the ``config.json`` of a ternary model.

    Args:
        values: The contents of the file.
        source: The path of the file, for messages.

    Raises:
        ConfigError: If the model has a feature that is not supported.
    """
    quantization = values["quantization_config"]
    if (mode := quantization.get("quantization_mode", "offline")) not in ("offline", "online"):
        raise ConfigError(f"{source}: quantization_mode {mode!r} is neither offline nor online")
    if quantization.get("use_rms_norm"):
        raise ConfigError(f"{source}: use_rms_norm puts a norm before each linear layer, which is not supported")
    dense = from_hf({name: value for name, value in values.items() if name != "quantization_config"}, source)
    own = values.get(SBN)
    pattern = own.get("pattern", DENSE) if isinstance(own, dict) else DENSE
    return replace(dense, linear="ternary", pattern=pattern, activation_bits=8)


def _layer(
    part: Part, config: TransformerConfig, read: Read, names: set[str], divides: bool, source: str
) -> PackedTernaryLinear:
    """Build one linear layer of ours from the packed tensors of transformers that it consists of."""
    codes, gammas, biases = [], [], []
    for name in part.theirs:
        for kind in ("weight", "weight_scale"):
            if f"{name}.{kind}" not in names:
                raise DataError(f"{source} lacks the tensor {name}.{kind}")
        codes.append(_codes(read(f"{name}.weight"), f"{source}: {name}.weight"))
        scale = read(f"{name}.weight_scale").float().reshape(1)
        gammas.append(1 / scale if divides else scale)
        if f"{name}.bias" in names:
            bias = read(f"{name}.bias")
            biases.append(bias if divides else (bias * scale).to(bias.dtype))
    rows = part.rows or (len(codes[0]),)
    for name, piece, expected in zip(part.theirs, codes, rows, strict=True):
        if len(piece) != expected:
            raise DataError(f"{source}: {name} has {len(piece)} rows, its config.json says {expected}")
    return PackedTernaryLinear(
        torch.cat(codes),
        torch.cat(gammas),
        torch.cat(biases) if biases else None,
        pattern=config.pattern,
        split_sizes=part.rows if len(part.theirs) > 1 else None,
    )


def _codes(stored: Tensor, label: str) -> Tensor:
    """The codes of one tensor, int8 ``[out, in]``, from two bits each or from floating-point numbers."""
    if stored.dtype == torch.uint8:
        return unpack_rows(stored)
    codes = stored.to(torch.int8)
    if not stored.is_floating_point() or not torch.equal(codes.to(stored.dtype), stored) or int(codes.abs().max()) > 1:
        raise DataError(f"{label} is of {stored.dtype}; codes are packed in uint8, or are -1, 0 and 1")
    return codes


def unpack_rows(packed: Tensor) -> Tensor:
    """uint8 ``[out / 4, in]`` -> int8 ``[out, in]`` in {-1, 0, 1}: the inverse of ``pack_rows``."""
    return torch.cat([(packed >> shift & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)])
