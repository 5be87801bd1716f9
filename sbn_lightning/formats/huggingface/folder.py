"""Folders of Hugging Face models: read from safetensors, one file or several with an index."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sbn_lightning.core.errors import DataError
from sbn_lightning.formats.huggingface.config import from_hf
from sbn_lightning.formats.huggingface.names import from_hf_state
from sbn_lightning.models.config import TransformerConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_hf(folder: Path) -> tuple[TransformerConfig, dict[str, Tensor]]:
    """Reads an unquantised Qwen2 or Llama model.

    Returns:
        A dense configuration and the state dict of a :class:`TernaryTransformer`, dtypes as stored.

    Raises:
        ConfigError: If the model has a feature that is not supported.
        DataError: If a file is missing or damaged, or tensors do not fit the configuration.
    """
    config = from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    file_of = _files(folder)
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for file in dict.fromkeys(file_of.values()):
            opened[file] = stack.enter_context(_open(file))
        _check_names(file_of, opened)

        def read(name: str) -> Tensor:
            tensor: Tensor = opened[file_of[name]].get_tensor(name)
            return tensor

        return config, from_hf_state(config, read, set(file_of), str(folder))


def read_json(file: Path) -> dict[str, Any]:
    """Contents of a JSON object.

    Raises:
        DataError: If it is missing or is none.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{file} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{file} is damaged: it is not an object")
    return values


def _files(folder: Path) -> dict[str, Path]:
    """Name of each tensor -> its file."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise DataError(f"{folder / INDEX} is damaged: it has no weight_map")
        return {name: folder / str(file) for name, file in weight_map.items()}
    file = folder / WEIGHTS
    if not file.is_file():
        others = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pth")))
        found = f"; {others[0]} may run code when read: convert it to safetensors first" if others else ""
        raise DataError(f"{folder} has neither {WEIGHTS} nor {INDEX}{found}")
    with _open(file) as opened:
        return dict.fromkeys(opened.keys(), file)


def _open(file: Path) -> Any:
    if not file.is_file():
        raise DataError(f"{file} is missing: {INDEX} names it")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} is damaged: {error}") from error


def _check_names(file_of: dict[str, Path], opened: dict[Path, Any]) -> None:
    for file, handle in opened.items():
        missing = {name for name, where in file_of.items() if where == file} - set(handle.keys())
        if missing:
            raise DataError(f"{file} lacks the tensor {min(missing)} that {INDEX} says it holds")
