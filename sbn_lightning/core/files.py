"""Files and folders that are whole or not there: written aside, synced, renamed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sbn_lightning.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

# Names of what `export` writes into a folder: nothing else is ever replaced.
EXPORTED = re.compile(
    r"(generation_|tokenizer_)?config\.json|tokenizer\.json|special_tokens_map\.json|chat_template\.jinja|"
    r"model\.safetensors|model-(TQ2|TQ1|Q4)_0\.gguf"
)


@contextmanager
def folder_aside(target: Path, overwrite: bool) -> Iterator[Path]:
    """A fresh folder to write in, which becomes ``target`` when the block ends without an error.

    Raises:
        ConfigError: If ``target`` is there already and may not be replaced.
        DataError: If it cannot be written.
    """
    check_output(target, overwrite)
    if target.is_file():
        raise ConfigError(f"{target} is a file, where a folder would be written; give another --output")
    place = target.resolve()  # a link stays one; and "." has no name to derive another from
    aside = place.with_name(f"{place.name}.tmp-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        yield aside
        for file in aside.iterdir():
            sync(file)
        sync(aside)
        _put(aside, place)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}; nothing there was changed") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def file_aside(target: Path, overwrite: bool) -> Iterator[Path]:
    """The path of a file to write, which becomes ``target`` when the block ends without an error.

    Raises:
        ConfigError: If ``target`` is there already and may not be replaced.
        DataError: If it cannot be written.
    """
    check_output(target, overwrite)
    aside = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        sync(aside)
        aside.replace(target)
        sync(target.parent)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}; nothing there was changed") from error
    finally:
        with suppress(OSError):  # of a folder that cannot be
            aside.unlink()


def check_output(target: Path, overwrite: bool) -> None:
    """Checks that an output is free, or may be replaced: a file, or a folder with nothing in it but an export.

    Raises:
        ConfigError: If not.
    """
    held = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    if foreign := [name for name in held if not EXPORTED.fullmatch(name)]:
        raise ConfigError(f"{target} holds {foreign[0]}, which is no export's; give another --output")
    if (held or target.is_file()) and not overwrite:
        raise ConfigError(f"{target} is there already; give another --output, or --overwrite=true to replace it")


def _put(aside: Path, target: Path) -> None:
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    if target.exists():
        target.replace(old)
    try:
        aside.replace(target)
    except BaseException:  # Ctrl-C too
        if old.exists():
            old.replace(target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, last through a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a safetensors file; the same tensors give the same bytes.

    Raises:
        OSError: If it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        # One entry: the library writes several in a random order.
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    except SafetensorError as error:  # its own class also for a full disk
        raise OSError(str(error)) from error
    file.chmod(0o644)  # the library makes files that only their owner can read
