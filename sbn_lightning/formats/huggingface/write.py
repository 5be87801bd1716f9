"""Hugging Face folders: unquantised models, and ternary ones in the packed layout of transformers' bitnet.

The packed layout has one scale a tensor, so q, k, v, gate and up, which are fused here with a gamma each, become
tensors of their own. ``weight_scale`` means two things there: ``bitlinear`` divides by it, so it holds ``1 / gamma``;
``autobitlinear`` multiplies by it, after adding the bias, so it holds ``gamma`` and the bias is written divided by it.
Weights are never written as floats for a reader to quantise again: its own mean would count the masked zeros.
transformers does not cast the dense tensors of a quantised model, so their dtype is chosen when exporting.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from sbn_lightning.checkpoints.tokenizers import TOKENIZER
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.core.files import save_tensors
from sbn_lightning.data.tokenizer import find_eos
from sbn_lightning.formats.huggingface.config import architecture, to_hf
from sbn_lightning.formats.huggingface.names import linear_parts, other_parts
from sbn_lightning.formats.packed import ternary_layers
from sbn_lightning.layers.sparse_linear import SparseLinear

if TYPE_CHECKING:
    from sbn_lightning.formats.load import LoadedModel

WEIGHTS = "model.safetensors"
# What else a tokenizer's folder may hold for transformers.
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


def write_hf(loaded: LoadedModel, folder: Path) -> str:
    """Writes an unquantised model; a masked one with its zeros in place.

    Raises:
        ConfigError: If the model is ternary: as plain weights it would lose the quantisation of activations.
    """
    model = loaded.model
    if ternary_layers(model):
        raise ConfigError(
            "--format hf writes plain weights, which cannot say that activations are quantised; a ternary model "
            "goes out with --format hf-bitnet, packed or gguf"
        )
    tensors = _other_tensors(loaded)
    for part in tqdm(list(linear_parts(model.config)), desc="writing", unit="layer", disable=None):
        layer = model.get_submodule(part.ours)
        weight = layer.effective_weight() if isinstance(layer, SparseLinear) else layer.weight
        assert isinstance(weight, Tensor)
        for kind, tensor in (("weight", weight), ("bias", layer.bias)):
            if isinstance(tensor, Tensor):
                pieces = tensor.detach().split(part.rows or (len(tensor),))
                tensors |= {f"{name}.{kind}": piece for name, piece in zip(part.theirs, pieces, strict=True)}
    _save(loaded, folder, tensors, {})
    return f"{architecture(model.config)}, {_megabytes(folder)}"


def write_hf_bitnet(loaded: LoadedModel, folder: Path, linear_class: str) -> str:
    """Writes a ternary model for ``transformers`` (which needs ``accelerate`` to read it).

    Args:
        loaded: The model.
        folder: Where.
        linear_class: ``"bitlinear"`` or ``"autobitlinear"``.

    Raises:
        ConfigError: If the model is not ternary with 8-bit activations, or a tensor's rows are not a multiple of 4.
    """
    model = loaded.model
    layers = ternary_layers(model)
    check_ternary(loaded, "hf-bitnet")
    tensors = _other_tensors(loaded)
    for part in tqdm(list(linear_parts(model.config)), desc="writing", unit="layer", disable=None):
        layer = layers[part.ours]
        codes, gamma = layer.ternary()
        rows = part.rows or (layer.out_features,)
        biases = (None,) * len(rows) if layer.bias is None else layer.bias.detach().split(rows)
        for name, piece, scale, bias in zip(part.theirs, codes.split(rows), gamma, biases, strict=True):
            if len(piece) % 4:
                raise ConfigError(
                    f"{name} has {len(piece)} rows, not a multiple of 4, which hf-bitnet needs; use --format packed"
                )
            tensors[f"{name}.weight"] = pack_rows(piece)
            divides = linear_class == "bitlinear"
            tensors[f"{name}.weight_scale"] = (1 / scale if divides else scale).reshape(1)
            if bias is not None:
                tensors[f"{name}.bias"] = bias if divides else (bias / scale).to(bias.dtype)
    quantization = {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
        "use_rms_norm": False,
        "rms_norm_eps": model.config.norm_eps,
        "modules_to_not_convert": ["lm_head"],
    }
    _save(loaded, folder, tensors, {"quantization_config": quantization})
    return f"{architecture(model.config)} with {linear_class}, {_megabytes(folder)}"


def check_ternary(loaded: LoadedModel, format: str) -> None:
    """Raises:
    ConfigError: If the model is not ternary, or its activations are not quantised to 8 bits, as the readers of
        ``format`` do.
    """
    config = loaded.config
    if config.linear != "ternary":
        raise ConfigError(f"--format {format} is for ternary models; this one is {config.linear!r}: use --format hf")
    if config.activation_bits != 8:
        raise ConfigError(
            f"what reads {format} quantises activations to 8 bits, this model was trained with activation_bits="
            f"{config.activation_bits}; use --format packed"
        )


def pack_rows(codes: Tensor) -> Tensor:
    """int8 ``[out, in]`` in {-1, 0, 1} -> uint8 ``[out / 4, in]``: row ``r`` holds rows ``r + i out / 4``, 2 bits each.

    The layout of transformers' ``integrations/bitnet.py``: bits ``2 i`` and ``2 i + 1``, code + 1.
    """
    quarters = (codes + 1).to(torch.uint8).chunk(4)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def _other_tensors(loaded: LoadedModel) -> dict[str, Tensor]:
    state = loaded.model.state_dict()
    return {part.theirs[0]: state[part.ours] for part in other_parts(loaded.config)}


def _save(loaded: LoadedModel, folder: Path, tensors: dict[str, Tensor], more: dict[str, Any]) -> None:
    dtype = str(loaded.model.embed.weight.dtype).removeprefix("torch.")
    config = to_hf(loaded.config, dtype) | more
    save_tensors(tensors, folder / WEIGHTS)
    if loaded.tokenizer is not None and loaded.tokenizer_path is not None:
        shutil.copyfile(loaded.tokenizer_path, folder / TOKENIZER)
        described: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        described["clean_up_tokenization_spaces"] = False
        with suppress(ConfigError):  # a tokenizer that names no end of a document
            described["eos_token"], config["eos_token_id"] = find_eos(loaded.tokenizer, None)
        (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
        for name in TOKENIZER_FILES:
            if (file := loaded.tokenizer_path.with_name(name)).is_file():
                shutil.copyfile(file, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _megabytes(folder: Path) -> str:
    return f"{(folder / WEIGHTS).stat().st_size / 1e6:.2f} MB"
