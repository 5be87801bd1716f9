"""One function that reads a model in any of the formats it is kept in.

A model comes out ready to compute: in evaluation mode, without gradients, on the device asked for. Weights are mapped
from the file where the format allows it, so that a checkpoint with its optimiser states costs no more memory than its
weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from sbn_lightning.checkpoints import lightning_file
from sbn_lightning.checkpoints.tokenizers import find_tokenizer
from sbn_lightning.core.errors import DataError
from sbn_lightning.formats.assemble import build_model, cast_model
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.transformer import TernaryTransformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ModelFormat = Literal["lightning", "packed", "hf"]


@dataclass
class LoadedModel:
    """A model that can compute.

    Attributes:
        model: In evaluation mode; no parameter needs a gradient.
        tokenizer: The one found with the model, or None. See :meth:`need_tokenizer`.
        config: Of the model; the same object as ``model.config``.
        format: What it was read from: ``"lightning"``, ``"packed"`` or ``"hf"``.
        path: The file or folder it was read from.
        tokenizer_path: The file of ``tokenizer``, or None.
    """

    model: TernaryTransformer
    tokenizer: Tokenizer | None
    config: TransformerConfig
    format: ModelFormat
    path: Path
    tokenizer_path: Path | None

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            DataError: If there is none with the model; the message says how to pass one.
        """
        if self.tokenizer is None:
            raise DataError(
                f"no tokenizer found with {self.path}: pass --tokenizer with a tokenizer.json or the folder that "
                "`prepare` wrote"
            )
        return self.tokenizer


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
) -> LoadedModel:
    """Reads a model.

    Args:
        path: A checkpoint of this project (``.ckpt``) or the folder of a run (its ``last.ckpt``), a packed folder, or
            a Hugging Face folder of a Qwen2 or Llama model. What it is is told by its content.
        device: Where the model goes.
        dtype: Of embeddings, norms, biases, the head and unquantised layers; None: as stored. Latent weights of
            ternary layers stay as they are: rounding them would give other codes.
        tokenizer: A ``tokenizer.json`` or a folder that holds one; None: look for it next to the model.

    Raises:
        DataError: If there is no model, it is damaged, or there is no such tokenizer.
        ConfigError: If it is a model that :class:`TernaryTransformer` cannot be.
    """
    source = Path(path)
    kind, file = _recognise(source)
    if kind == "lightning":
        config, state = lightning_file.read(file)
        model = build_model(config, state, str(file))
    elif kind == "packed":
        from sbn_lightning.formats.packed import read_packed

        model = read_packed(file)
    else:
        from sbn_lightning.formats.huggingface.folder import read_hf

        config, state = read_hf(file)
        model = build_model(config, state, str(file))
    if dtype is not None:
        cast_model(model, dtype)
    model.to(device).eval().requires_grad_(False)
    tokenizer_path, loaded = find_tokenizer(file, tokenizer)
    return LoadedModel(model, loaded, model.config, kind, file, tokenizer_path)


def _recognise(path: Path) -> tuple[ModelFormat, Path]:
    """What is at ``path``, and the file or folder to read."""
    if path.is_file():
        if path.name in ("config.json", "model.safetensors"):
            return _recognise(path.parent)
        if path.suffix == ".gguf":
            raise DataError(f"{path} is a GGUF file, which is written but not read: give the checkpoint it was made of")
        return "lightning", path
    if not path.is_dir():
        raise DataError(f"{path} does not exist; give {lightning_file.ACCEPTED}")
    if (path / ".metadata").is_file():
        raise DataError(
            f"{path} is a sharded checkpoint; make one file of it: sbn consolidate --checkpoint {path} --output "
            f"{path.with_suffix('.whole.ckpt')}"
        )
    config = path / "config.json"
    if config.is_file():
        try:
            values = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{config} is damaged: {error}") from error
        if isinstance(values, dict):
            return ("packed" if values.get("format") == "sbn-packed" else "hf"), path
    # A run's own folders, or that of a recipe's runs; the newest, of a run that went on in its folder last-v1.ckpt.
    for folder in ("", "checkpoints/", "version_*/checkpoints/"):
        found = [file for file in path.glob(f"{folder}last*.ckpt") if lightning_file.is_last(file) and file.exists()]
        if found:
            return _recognise(max(found, key=lambda file: file.stat().st_mtime))
    raise DataError(f"{path} holds no model: neither last.ckpt nor config.json is there")
