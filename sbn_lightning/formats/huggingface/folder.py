"""Folders of Hugging Face models: weights in safetensors, in one file or in several, and the text files beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sbn_lightning.checkpoints.text_files import TextFiles, only_token_ids, read_folder
from sbn_lightning.core.errors import DataError
from sbn_lightning.formats.files import read_json, refuse_pointer
from sbn_lightning.formats.huggingface.config import from_hf
from sbn_lightning.formats.huggingface.names import from_hf_state
from sbn_lightning.models.config import TransformerConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

Read = Callable[[str], Tensor]


def read_hf(folder: Path) -> tuple[TransformerConfig, dict[str, Tensor], TextFiles]:
    """Read an unquantised model.

    Returns:
        A dense configuration; the state dict of a :class:`TernaryTransformer`, in the stored dtypes; the text files.

    Raises:
        ConfigError: If the model has a feature that is not supported.
        DataError: If a file is missing or damaged, or the tensors do not fit the configuration.
    """
    config = read_hf_config(folder)
    with open_weights(folder) as (names, read):
        return config, from_hf_state(config, read, names, str(folder)), read_hf_text(folder)


def read_hf_config(folder: Path) -> TransformerConfig:
    """Read the configuration of a Hugging Face folder; the errors are those of :func:`read_hf`."""
    return from_hf(read_json(folder / CONFIG), str(folder / CONFIG))


def read_hf_text(folder: Path) -> TextFiles:
    """Read the text files of a Hugging Face folder, with the token ids of its ``config.json``."""
    return read_folder(folder, only_token_ids(read_json(folder / CONFIG)))


@contextmanager
def open_weights(folder: Path) -> Iterator[tuple[set[str], Read]]:
    """Open all files with weights.

    Yields:
        The names of all tensors, and a function that reads a tensor by its name.

    Raises:
        DataError: If a file is missing or damaged.
    """
    file_of = _files(folder)
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for file in dict.fromkeys(file_of.values()):
            opened[file] = stack.enter_context(_open(file))
        _check_names(file_of, opened)

        def read(name: str) -> Tensor:
            tensor: Tensor = opened[file_of[name]].get_tensor(name)
            return tensor

        yield set(file_of), read


def _files(folder: Path) -> dict[str, Path]:
    """Name of each tensor -> the file that holds the tensor."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise DataError(f"{folder / INDEX} is damaged: it has no weight_map")
        return {name: folder / str(file) for name, file in weight_map.items()}
    file = folder / WEIGHTS
    if file.is_file():
        with _open(file) as opened:
            return dict.fromkeys(opened.keys(), file)
    if shards := _shards_without_index(folder):
        names: dict[str, Path] = {}
        for shard in shards:
            with _open(shard) as opened:
                names |= dict.fromkeys(opened.keys(), shard)
        return names
    raise DataError(f"{folder} has neither {WEIGHTS} nor {INDEX}{_what_else(folder)}")


def _shards_without_index(folder: Path) -> list[Path]:
    """The files of a model in several parts. Their names say how many there are, so the index is not needed."""
    found = {}
    total = 0
    for file in folder.glob("*.safetensors"):
        if numbered := re.fullmatch(r"model-(\d+)-of-(\d+)\.safetensors", file.name):
            found[int(numbered[1])], total = file, int(numbered[2])
    if missing := [number for number in range(1, total + 1) if number not in found]:
        raise DataError(
            f"{folder} has {len(found)} of {total} parts of a model and no {INDEX}: part {missing[0]} is missing"
        )
    return [found[number] for number in sorted(found)]


def _what_else(folder: Path) -> str:
    """The weights of another kind that a folder without safetensors holds, and the way out."""
    if others := sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pth"))):
        return f"; {others[0]} may run code when read: convert it to safetensors first"
    if others := sorted(path.name for path in folder.glob("*.gguf")):
        return f"; {others[0]} is a model by itself: give the file"
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        return f"; {others[0]} is not a name that transformers gives to weights"
    return ""


def _open(file: Path) -> Any:
    if not file.is_file():
        raise DataError(f"{file} is missing: {INDEX} names it")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        refuse_pointer(file)
        raise DataError(f"{file} is damaged: {error}") from error


def _check_names(file_of: dict[str, Path], opened: dict[Path, Any]) -> None:
    for file, handle in opened.items():
        missing = {name for name, where in file_of.items() if where == file} - set(handle.keys())
        if missing:
            raise DataError(f"{file} lacks the tensor {min(missing)} that {INDEX} says it holds")
