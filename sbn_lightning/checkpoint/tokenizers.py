"""Where the tokenizer of a model is.

A packed or Hugging Face folder holds its own. A checkpoint of ``fit`` does not: Lightning keeps the run's configuration
next to it, and the prepared folder that the run read holds a ``tokenizer.json``. An imported checkpoint has one of the
same name beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbn_lightning.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"


def beside(checkpoint: Path) -> Path:
    """The tokenizer that belongs to one checkpoint file: ``qwen.ckpt`` -> ``qwen.tokenizer.json``."""
    return checkpoint.with_suffix(f".{TOKENIZER}")


def find_tokenizer(model: Path, given: str | Path | None) -> tuple[Path | None, Tokenizer | None]:
    """Finds and loads a tokenizer.

    Args:
        model: The checkpoint file, or the folder of the model.
        given: A ``tokenizer.json``, or a folder with one, that the user named.

    Returns:
        Its file and the tokenizer; twice None if nothing was given and none is found.

    Raises:
        DataError: If what was given is not a tokenizer, or one that was found is damaged.
    """
    if given is not None:
        file = Path(given)
        file = file / TOKENIZER if file.is_dir() else file
        return file, _load(file)
    candidates = [model / TOKENIZER] if model.is_dir() else [beside(model), model.parent / TOKENIZER]
    for folder in () if model.is_dir() else (model.parent, model.parent.parent):
        candidates += _data_of_run(folder / "config.yaml")
    for candidate in candidates:
        if candidate.is_file():
            return candidate, _load(candidate)
    return None, None


def _load(file: Path) -> Tokenizer:
    from sbn_lightning.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(file)
    # What a file may ask for to make batches of one length would cut prompts, or fill them up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _data_of_run(file: Path) -> list[Path]:
    """Tokenizers of the prepared folders that a run's ``config.yaml`` names, as seen from here."""
    if not file.is_file():
        return []
    import yaml

    try:
        values: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is damaged: {str(error).splitlines()[0]}") from error
    data = values.get("data") if isinstance(values, dict) else None
    if not isinstance(data, dict):
        return []
    folders = [*(data.get("paths") or {}), data.get("path")]
    return [Path(folder) / TOKENIZER for folder in folders if isinstance(folder, str) and "://" not in folder]
