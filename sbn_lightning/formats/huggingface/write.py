"""Write Hugging Face folders: unquantised models, and ternary ones in the packed layout of transformers' bitnet.

The packed layout has one scale for each tensor. q, k, v, gate and up are fused here with a gamma for each of them, and
become tensors of their own. ``weight_scale`` has two meanings in transformers. ``bitlinear`` divides by it, so the file
holds ``1 / gamma``. ``autobitlinear`` multiplies by it after it adds the bias, so the file holds ``gamma``, and the
bias divided by ``gamma``.

Weights are never written as floats for a reader to quantise again: the reader's own mean would count the masked zeros.
transformers does not cast the dense tensors of a quantised model, so their dtype is chosen at the export.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from sbn_lightning.checkpoints.text_files import TOKEN_IDS, TOKENIZER_CONFIG, TextFiles
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.core.files import save_tensors
from sbn_lightning.data.tokenizer import find_eos
from sbn_lightning.formats.huggingface.bitnet import SBN
from sbn_lightning.formats.huggingface.config import architecture, to_hf
from sbn_lightning.formats.huggingface.names import linear_parts, other_parts
from sbn_lightning.formats.packed import ternary_layers
from sbn_lightning.formats.sizes import Sizes
from sbn_lightning.layers.sparse_linear import SparseLinear

if TYPE_CHECKING:
    from sbn_lightning.formats.choices import LinearClass
    from sbn_lightning.formats.loaded import LoadedModel

WEIGHTS = "model.safetensors"


def write_hf(loaded: LoadedModel, folder: Path) -> str:
    """Write an unquantised model. A masked model is written with its zeros in place.

    Returns:
        What was written, for the user.

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
    return f"{architecture(model.config)}, {_summary(folder, tensors, f'{model.config.linear} layers')}"


def write_hf_bitnet(loaded: LoadedModel, folder: Path, linear_class: LinearClass) -> str:
    """Write a ternary model for ``transformers`` (which needs ``accelerate`` to read it).

    Args:
        loaded: The model.
        folder: The folder to write to.
        linear_class: The class of transformers that will read the folder.

    Returns:
        What was written, for the user.

    Raises:
        ConfigError: If the model is not ternary with 8-bit activations, or a tensor's rows are not a multiple of 4.
    """
    model = loaded.model
    layers = ternary_layers(model)
    check_ternary(loaded, "hf-bitnet")
    if model.config.n_experts:
        raise ConfigError(
            "hf-bitnet has no experts: transformers packs linear layers, and holds experts in one parameter; use "
            "--format hf-sbn or packed"
        )
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
    own = {"pattern": str(model.config.pattern)}
    _save(loaded, folder, tensors, {"quantization_config": quantization, SBN: own})
    return f"{architecture(model.config)} with {linear_class}, {_summary(folder, tensors, 'ternary layers')}"


def check_ternary(loaded: LoadedModel, format: str) -> None:
    """Check that a model computes what the readers of a format compute.

    Args:
        loaded: The model.
        format: The name of the format, for the message.

    Raises:
        ConfigError: If the model is not ternary, or its activations are not quantised to 8 bits.
    """
    config = loaded.config
    if config.linear != "ternary":
        raise ConfigError(f"--format {format} is for ternary models; this one is {config.linear!r}: use --format hf")
    if config.layers:
        raise ConfigError(
            f"--format {format} holds models whose linear layers are all ternary; model.config.layers makes some of "
            "another kind: use --format packed"
        )
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
    config |= write_text_files(loaded.text, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_text_files(text: TextFiles, folder: Path) -> dict[str, Any]:
    """Write the tokenizer and the other text files of a model into a Hugging Face folder.

    Args:
        text: The text files of the model.
        folder: The folder.

    Returns:
        What ``config.json`` has to say about the tokens that begin, end and pad a text.

    Raises:
        OSError: If a file cannot be written.
    """
    text.write(folder)
    found = {name: text.token_ids.get(name, text.generation.get(name)) for name in TOKEN_IDS}
    known = {name: value for name, value in found.items() if value is not None}
    if text.tokenizer is not None:
        described: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        described["clean_up_tokenization_spaces"] = False
        stops = text.stop_ids
        with suppress(ConfigError):  # A tokenizer may name no token that ends a document.
            stops = stops or [find_eos(text.tokenizer, None)[1]]
            if not text.stop_ids:
                known["eos_token_id"] = stops[0]
            described["eos_token"] = text.tokenizer.id_to_token(stops[0])
        if TOKENIZER_CONFIG not in text.contents:
            (folder / TOKENIZER_CONFIG).write_text(json.dumps(described, indent=2), encoding="utf-8")
    return known


def _summary(folder: Path, tensors: dict[str, Tensor], linear: str) -> str:
    """The size of the file, and of its parts."""
    sizes = Sizes()
    for name, tensor in tensors.items():
        packed = tensor.dtype == torch.uint8  # A byte holds four ternary weights.
        scale = name.endswith(("weight_scale", ".gamma"))  # A scale adds bytes, and is not counted as a weight.
        weights = 0 if scale else tensor.numel() * (4 if packed else 1)
        sizes.add(_part_of(name, linear), weights, tensor.numel() * tensor.element_size())
    return f"{(folder / WEIGHTS).stat().st_size / 1e6:.2f} MB\n{sizes.table()}"


def _part_of(name: str, linear: str) -> str:
    if name.startswith("model.embed_tokens"):
        return "embeddings"
    if name.startswith("lm_head"):
        return "head"
    if name.endswith(".gate.weight"):
        return "routers"
    return "norms and biases" if "norm" in name or name.endswith(".bias") else linear
