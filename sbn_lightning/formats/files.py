"""Read the small files that describe a model, and recognise files that are not what their names say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sbn_lightning.core.errors import DataError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def beginning(file: Path, size: int = 64) -> bytes:
    """The first bytes of a file.

    Raises:
        DataError: If the file cannot be read.
    """
    try:
        with file.open("rb") as opened:
            return opened.read(size)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error


def refuse_pointer(file: Path) -> None:
    """Check that a file holds its content and is not the pointer that git-LFS leaves in its place.

    Raises:
        DataError: If the file is a pointer, or cannot be read.
    """
    if beginning(file).startswith(_LFS_POINTER):
        raise DataError(f"{file} is a git-LFS pointer and not the file itself: run `git lfs pull` in its folder")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: If the file is missing, or does not hold an object.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        refuse_pointer(file)
        raise DataError(f"{file} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{file} is damaged: it is not an object")
    return values
