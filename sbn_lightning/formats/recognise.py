"""Find out from the content which kind of model is at a path. If there is none, the error says what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from sbn_lightning.checkpoints import lightning_file, search
from sbn_lightning.core.errors import DataError
from sbn_lightning.formats.files import beginning, read_json, refuse_pointer

ModelFormat = Literal["lightning", "packed", "hf", "hf-bitnet", "gguf"]

ACCEPTED = lightning_file.ACCEPTED
GGUF_MAGIC = b"GGUF"


class Found(NamedTuple):
    """A model that was recognised.

    Attributes:
        format: The format of the model.
        place: The file or the folder to read.
    """

    format: ModelFormat
    place: Path


def recognise(path: Path) -> Found:
    """Find out which model is at ``path``.

    Args:
        path: A file, the folder of a model, or the folder of a run.

    Raises:
        DataError: If there is no model. The message says what is there.
    """
    if path.is_file():
        return _recognise_file(path)
    if path.is_dir():
        return _recognise_folder(path)
    if path.is_symlink():
        raise DataError(f"{path} is a link to {path.readlink()}, which does not exist")
    if path.exists():
        raise DataError(f"{path} is neither a file nor a folder; give {ACCEPTED}")
    raise DataError(f"{path} does not exist; give {ACCEPTED}")


def _recognise_file(file: Path) -> Found:
    if file.name == "config.json" or file.name.endswith((".safetensors", ".safetensors.index.json")):
        refuse_pointer(file)
        return _recognise_folder(file.parent)
    refuse_pointer(file)
    return Found("gguf" if beginning(file).startswith(GGUF_MAGIC) else "lightning", file)


def _recognise_folder(folder: Path) -> Found:
    if (folder / ".metadata").is_file():
        raise DataError(
            f"{folder} is a sharded checkpoint; make one file of it: sbn consolidate --checkpoint {folder} --output "
            f"{folder.with_suffix('.whole.ckpt')}"
        )
    config = folder / "config.json"
    if config.is_file():
        refuse_pointer(config)
        values = read_json(config)
        if values.get("format") == "sbn-packed":
            return Found("packed", folder)
        quantization = values.get("quantization_config")
        is_bitnet = isinstance(quantization, dict) and quantization.get("quant_method") == "bitnet"
        return Found("hf-bitnet" if is_bitnet else "hf", folder)
    # The folder may be that of one run, of all runs of a recipe, or a folder of checkpoints.
    if (checkpoint := search.newest_below(folder)) is not None:
        return recognise(checkpoint)
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return _recognise_file(ggufs[0])
    raise DataError(f"{folder} holds no model: {_what_is_there(folder, ggufs)}")


def _what_is_there(folder: Path, ggufs: list[Path]) -> str:
    """Say why a folder is not a model, and give the way out."""
    if ggufs:
        return f"it has {len(ggufs)} GGUF files; give one of them, such as {ggufs[0]}"
    if weights := sorted(folder.glob("*.safetensors")):
        return f"it has weights ({weights[0].name}) and no config.json, which says what model they are of"
    if (folder / "meta.json").is_file():
        return "it is a folder of prepared tokens"
    if inner := sorted(folder.glob("*/config.json")):
        return f"give the folder in it, {inner[0].parent}"
    return "neither a checkpoint nor config.json is there"
