"""Write a model of transformers that this project trained, in the formats that can hold any architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sbn_lightning.checkpoints.lightning_file import HUGGING_FACE
from sbn_lightning.checkpoints.text_files import GENERATION, TOKEN_IDS, TextFiles
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.formats.huggingface.write import write_text_files
from sbn_lightning.integrations.folder import write_sparse
from sbn_lightning.integrations.huggingface.network import Network
from sbn_lightning.integrations.huggingface.saving import save_packed
from sbn_lightning.integrations.pytorch import revert

FORMATS = ("hf-sbn", "packed", "hf")


def export_network(
    network: Network,
    text: TextFiles,
    folder: Path,
    format: str,
    dtype: torch.dtype | None = None,
    perplexity: float | None = None,
) -> str:
    """Write a network into an empty folder.

    Args:
        network: The network. ``hf`` turns the sparse layers of a masked one into plain layers.
        text: Its text files.
        folder: The folder to write to.
        format: ``"hf-sbn"`` for transformers and vLLM, 2 bits a weight. ``"packed"`` is the smallest, and is read by
            ``sbn generate``, ``sbn evaluate`` and ``load_sparse``. ``"hf"`` has plain weights, for models that are not
            ternary.
        dtype: The dtype of everything but ternary weights; None leaves each tensor as it is.
        perplexity: The perplexity for the model card of ``"hf-sbn"``, if it was measured.

    Returns:
        What was written, for the user.

    Raises:
        ConfigError: If the format cannot hold the network.
    """
    hf: Any = network.hf
    linear = network.config.linear
    name = type(hf).__name__
    if format not in FORMATS:
        fitting = "hf-sbn or packed" if linear == "ternary" else "hf"
        raise ConfigError(
            f"--format {format} is written from our own transformer, and this model is {name} of transformers; use "
            f"--format {fitting}"
        )
    if (format == "hf") == (linear == "ternary"):
        raise ConfigError(
            f"--format hf writes plain weights, which cannot say that activations are quantised; {name} is ternary: "
            "use --format hf-sbn or packed"
            if linear == "ternary"
            else f"--format {format} is for ternary models; this one is {linear!r}: use --format hf"
        )
    if format == "hf-sbn":
        save_packed(hf, folder, dtype=dtype, perplexity=perplexity)
    elif format == "packed":
        write_sparse(hf, folder, "packed", {HUGGING_FACE: _plain(hf.config.to_dict() | _token_ids(text))})
    else:
        revert(hf)
        (hf if dtype is None else hf.to(dtype)).save_pretrained(folder)
    known = write_text_files(text, folder)
    if format != "packed":
        _update(folder / "config.json", known)
        if GENERATION not in text.contents and (folder / GENERATION).is_file():
            _update(folder / GENERATION, known)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return f"{name}, {linear}, {size / 1e6:.2f} MB"


def _token_ids(text: TextFiles) -> dict[str, Any]:
    known = {name: text.token_ids.get(name, text.generation.get(name)) for name in TOKEN_IDS}
    return {name: value for name, value in known.items() if value is not None}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the entries that describe the quantisation or the dtype of its weights."""
    return {name: value for name, value in values.items() if name not in ("quantization_config", "dtype")}


def _update(file: Path, values: dict[str, Any]) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(found | values, indent=2), encoding="utf-8")
