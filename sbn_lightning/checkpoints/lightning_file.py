"""Read and write Lightning's checkpoint files without Lightning.

A checkpoint of ``fit`` holds the weights under ``state_dict`` with the prefix ``model.``, the configuration under
``hyper_parameters``, and the tokenizer and the other text files under ``text_files``. ``load_model``, ``init_from`` and
``SparseBitNet.load_from_checkpoint`` need only these three entries, and an imported checkpoint holds only them. An
imported checkpoint has no optimiser state, so ``--ckpt_path`` cannot continue from one.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor

from sbn_lightning.checkpoints.text_files import KEY, TextFiles
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.files import CHECKSUM_LIMIT, atomic_stream
from sbn_lightning.models.config import TransformerConfig

NO_TEXT = TextFiles()
PREFIX = "model."
ZIP = b"PK\x03\x04"
# A checkpoint of a transformers model holds its configuration under this key. Ours holds the fields themselves.
HUGGING_FACE = "hugging_face"
ACCEPTED = "a .ckpt, the folder of a run, a packed or a Hugging Face folder, or a .gguf file"


def is_one(path: Path) -> bool:
    """Return whether a file begins like a ZIP archive, as every checkpoint of torch does.

    The check comes before ``torch.load``, whose message about any other file is many lines long.

    Raises:
        DataError: If the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(len(ZIP)) == ZIP
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def is_last(path: Path) -> bool:
    """Return whether a file has a name that ``ModelCheckpoint`` gives to a run's last checkpoint."""
    return re.fullmatch(r"last(-v\d+)?", path.stem) is not None


def damaged_record(path: Path) -> str | None:
    """Return the name of the first record whose content does not match its checksum; None if there is none.

    A file of more than ``CHECKSUM_LIMIT`` bytes is not checked, and gives None.
    """
    with ZipFile(path) as file:
        return file.testzip() if path.stat().st_size <= CHECKSUM_LIMIT else None


class Saved(NamedTuple):
    """The model in a checkpoint of this project.

    Attributes:
        config: The configuration of the model.
        state: The state dict of the model. Its tensors are mapped from the file.
        text_files: The contents of the model's text files by name; see :mod:`sbn_lightning.checkpoints.text_files`.
    """

    config: TransformerConfig
    state: dict[str, Tensor]
    text_files: dict[str, str]


def load(path: Path) -> dict[str, Any]:
    """Read the contents of a checkpoint. Its tensors are mapped from the file.

    Raises:
        DataError: If the file is no checkpoint, or is damaged.
    """
    if not is_one(path):
        raise DataError(f"{path} is no checkpoint; give {ACCEPTED}")
    if not is_zipfile(path):  # The table of a ZIP archive is at its end, which a file cut short has lost.
        raise DataError(f"{path} is damaged: its end is missing")
    try:
        if record := damaged_record(path):
            raise DataError(f"{path} is damaged (in {record})")
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except DataError:
        raise
    except UnpicklingError as error:  # torch's own message would advise the user to trust the file.
        raise DataError(
            f"{path} was changed, or is not this project's: it holds other than tensors and plain values"
        ) from error
    except Exception as error:  # A damaged file can make torch raise anything.
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"{path} is damaged: {reason}") from error
    return saved if isinstance(saved, dict) else {}


def read(path: Path) -> Saved:
    """Read the model in a checkpoint of this project.

    Raises:
        DataError: If the file is damaged, or is not a checkpoint of this project.
    """
    saved = load(path)
    config = config_of(saved, path)
    if not isinstance(saved.get("state_dict"), dict):
        raise DataError(f"{path} is not a checkpoint of SparseBitNet: it holds no state_dict")
    state = {
        name.removeprefix(PREFIX): tensor for name, tensor in saved["state_dict"].items() if name.startswith(PREFIX)
    }
    return Saved(config, state, saved.get(KEY) or {})


def holds_hugging_face(path: Path) -> bool:
    """Return whether a file is a checkpoint of a model of transformers."""
    if not path.is_file() or not is_one(path):
        return False
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # A damaged file can make torch raise anything. `read` says what is wrong with the file.
        return False
    hyper_parameters = saved.get("hyper_parameters") if isinstance(saved, dict) else None
    values = hyper_parameters.get("config") if isinstance(hyper_parameters, dict) else None
    return isinstance(values, dict) and HUGGING_FACE in values


def config_of(saved: Any, path: Path) -> TransformerConfig:
    """Return the configuration of the model in a checkpoint that was loaded.

    Args:
        saved: The contents of the checkpoint.
        path: The path of the checkpoint, for messages.

    Raises:
        DataError: If the checkpoint is not one of this project, or its configuration is not valid here.
    """
    hyper_parameters = saved.get("hyper_parameters") if isinstance(saved, dict) else None
    values = hyper_parameters.get("config") if isinstance(hyper_parameters, dict) else None
    if not isinstance(values, dict):
        raise DataError(f"{path} is not a checkpoint of SparseBitNet: it holds no hyper_parameters with a config")
    if HUGGING_FACE in values:
        kind = values[HUGGING_FACE].get("model_type")
        raise DataError(
            f"{path} holds a {kind} of transformers: the commands of `sbn` read it, and in Python "
            "sbn_lightning.integrations.opening.open_any"
        )
    try:
        return TransformerConfig(**values)
    except (ConfigError, TypeError) as error:
        raise DataError(f"{path}: its configuration cannot be used here: {error}") from error


def write(config: TransformerConfig, state: dict[str, Tensor], path: Path, text: TextFiles = NO_TEXT) -> None:
    """Write a checkpoint with the entries of :func:`contents`.

    Args:
        config: The configuration of the model.
        state: The state dict of the model.
        path: The file to write.
        text: The text files of the model.

    Raises:
        OSError: If the file cannot be written.
    """
    with atomic_stream(path) as stream:
        torch.save(contents(config, state, text), stream)


def contents(config: TransformerConfig, state: dict[str, Tensor], text: TextFiles = NO_TEXT) -> dict[str, Any]:
    """Return a checkpoint that ``fit`` with ``init_from``, ``validate`` and ``load_model`` can read."""
    try:
        lightning = version("lightning")
    except PackageNotFoundError:
        lightning = "2.6.0"
    return {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": lightning,
        "state_dict": {PREFIX + name: tensor for name, tensor in state.items()},
        "hyper_parameters": {"config": config.to_dict()},
        **({KEY: dict(text.contents)} if text.contents else {}),
    }
