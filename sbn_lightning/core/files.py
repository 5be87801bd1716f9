"""Write a file or a folder so that it is there as a whole or not at all.

Every file that this project writes and later reads goes through this module. The content is written under a
temporary name beside its place, synced to the disk, and renamed. A rename within one file system happens at once, so
the name holds the old content or the new content at every moment, also when the process is killed or the power fails.

* :func:`atomic_file` yields a path, for code that opens the file itself.
* :func:`atomic_stream` yields a binary stream, for ``torch.save`` and for long texts.
* :func:`write_text` writes a short text.
* :func:`atomic_folder` yields an empty folder.

The temporary name contains the number of the process. Two processes that write the same place therefore do not
disturb each other, and the last one wins. A process that is killed while it writes leaves its temporary file;
:func:`remove_leftovers` deletes such files.

All of them raise ``OSError`` when the disk is full or the place is not writable. The caller knows what the file is,
and words the message.

:func:`expanded` is about names of files: every command reads ``~`` and ``$VARIABLE`` in a path in the same way.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM_LIMIT = 2 << 30  # In bytes. Checking the checksum of a larger file would take too long.


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path; the file there becomes ``target`` when the block ends without an error.

    Folders above ``target`` are made where they are missing. A ``target`` that is a link is replaced, and what the
    link points to stays as it is.

    Args:
        target: The path of the file to write.

    Yields:
        The path to write to. No file is there yet.

    Raises:
        OSError: If the file cannot be written. What was at ``target`` is unchanged.
    """
    target = Path(target)
    aside = _temporary(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        sync(aside)
        aside.replace(target)
        sync(target.parent)
    finally:
        with suppress(OSError):
            aside.unlink()


@contextmanager
def atomic_stream(target: str | Path) -> Iterator[BinaryIO]:
    """Yield a binary stream whose content becomes ``target`` when the block ends without an error.

    Args:
        target: The path of the file to write.

    Yields:
        A stream with ``write`` and ``flush``. It cannot seek.

    Raises:
        OSError: If the file cannot be written. It replaces an error that the block raised for this reason, because
            ``torch.save`` reports a full disk as a ``RuntimeError`` without the reason.
    """
    with atomic_file(target) as aside, aside.open("wb") as file:
        stream = _Stream(file)
        try:
            yield cast(BinaryIO, stream)
        except Exception as error:
            if stream.error is None or stream.error is error:
                raise
            raise stream.error from error


def write_text(target: str | Path, text: str) -> None:
    """Write a text file in UTF-8.

    Args:
        target: The path of the file to write.
        text: The whole content.

    Raises:
        OSError: If the file cannot be written. What was at ``target`` is unchanged.
    """
    with atomic_stream(target) as stream:
        stream.write(text.encode("utf-8"))


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target`` when the block ends without an error.

    A folder that is at ``target`` already is replaced as a whole, and deleted only after the new one is in its place.
    A ``target`` that is a link stays a link, and the folder it points to is replaced.

    Args:
        target: The path of the folder to write.

    Yields:
        The folder to write into.

    Raises:
        OSError: If the folder cannot be written. What was at ``target`` is unchanged.
    """
    place = Path(target).resolve()  # "." has no name to derive a temporary one from
    aside = _temporary(place)
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in aside.rglob("*"):
            sync(path)
        sync(aside)
        _replace_folder(place, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace_folder(place: Path, new: Path) -> None:
    old = place.with_name(f"{place.name}.{os.getpid()}.old")
    if place.exists():
        place.replace(old)
    try:
        new.replace(place)
    except BaseException:  # KeyboardInterrupt too: the old folder must get its name back.
        if old.exists():
            old.replace(place)
        raise
    sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(target: str | Path) -> None:
    """Delete the temporary files that killed processes left beside ``target``.

    Call this function only where no other process can be writing ``target`` at the same time.

    Args:
        target: The path that the killed processes were writing.
    """
    target = Path(target)
    for leftover in target.parent.glob(f"{glob.escape(target.name)}.*tmp"):
        leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a loss of power.

    Args:
        path: The file or folder.

    Raises:
        OSError: If it cannot be opened, or the disk reports an error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_crc32(path: str | os.PathLike[str]) -> int:
    """Return the CRC-32 of a file, read in blocks."""
    crc = 0
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def sha256(file: Path) -> str:
    """Return the SHA-256 checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file. The same tensors give the same bytes.

    Args:
        tensors: The tensors by name, of any dtype and shape.
        file: The path of the file to write. It is written in place: use it inside :func:`atomic_folder`.

    Raises:
        OSError: If the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        # Exactly one metadata entry: the library writes several in a random order.
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    except SafetensorError as error:  # The library raises this class also for a full disk.
        raise OSError(str(error)) from error
    file.chmod(0o644)  # The library makes files that only their owner can read.


def _temporary(target: Path) -> Path:
    return target.with_name(f"{target.name}.{os.getpid()}.tmp")


class _Stream:
    """A binary file that remembers why a write failed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def expanded(path: str) -> str:
    """A path with ``~`` and ``$VARIABLE`` replaced by what they stand for. URLs are left alone."""
    return path if "://" in path else os.path.expanduser(os.path.expandvars(path))
