"""Read text files the same way in every command: unpack them, drop a byte order mark, tell text from other data.

``prepare``, ``evaluate --text`` and ``generate --prompts_file`` use these functions, so all three agree on what a
text file is. A file counts as text unless its first :data:`HEAD_BYTES` bytes show otherwise; see :func:`why_not_text`.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from sbn_lightning.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BOM = b"\xef\xbb\xbf"
HEAD_BYTES = 8192
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def split_suffix(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Split the end of a file's name into what it holds and how it is compressed, both in lower case.

    Args:
        path: The path of the file; ``A.JSONL.GZ`` gives ``(".jsonl", ".gz")``.

    Returns:
        The suffix without the compression, and the compression; each is empty where there is none.
    """
    name = PurePath(path)
    if name.suffix.lower() in COMPRESSED:
        return PurePath(name.stem).suffix.lower(), name.suffix.lower()
    return name.suffix.lower(), ""


def open_unpacked(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading; a compressed one is unpacked while it is read.

    Args:
        path: The path of the file. Its suffix says how it is compressed.

    Returns:
        A binary stream. The stream of a compressed file cannot seek; :func:`skip` works on both kinds.

    Raises:
        OSError: If the file cannot be opened.
        ConfigError: If the file is compressed with Zstandard and pyarrow is not installed.
    """
    compression = split_suffix(path)[1]
    if not compression:
        return open(path, "rb")
    raw: Any
    if compression == ".zst":
        try:
            import pyarrow
        except ImportError as error:
            raise ConfigError(
                f"{os.fspath(path)} is compressed with Zstandard, which needs pyarrow: pip install pyarrow, or unpack "
                "the file"
            ) from error
        # Not pyarrow's own file reader, whose errors have no errno.
        raw = pyarrow.CompressedInputStream(open(path, "rb"), "zstd")  # noqa: SIM115 (closed with the stream)
    else:
        unpack: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        raw = unpack[compression](path, "rb")
    return cast(BinaryIO, io.BufferedReader(_Unpacking(raw, os.fspath(path)), 1 << 20))


class _Unpacking(io.RawIOBase):
    """The unpacked content of a file. Every library's error becomes one that names the file."""

    def __init__(self, raw: Any, path: str) -> None:
        self._raw = raw
        self._path = path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        try:
            data = self._raw.read(len(view))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{self._path} cannot be unpacked ({reason}); it may be cut short: copy it again"
            ) from error
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._raw.close()
        super().close()


def skip(stream: BinaryIO, count: int) -> None:
    """Move a stream of :func:`open_unpacked`, which is at its start, ``count`` bytes forward."""
    if stream.seekable():
        stream.seek(count)
        return
    while count > 0 and (block := stream.read(min(count, 1 << 20))):
        count -= len(block)


def why_not_text(head: bytes) -> str | None:
    """Say why a file is not text that can be used here.

    A NUL byte in the first :data:`HEAD_BYTES` bytes marks a file that is not text, as git and grep judge it. A NUL
    byte after them is a character like any other.

    Args:
        head: The first bytes of the unpacked file.

    Returns:
        The reason, which continues a sentence that begins with the file's name; None for text.
    """
    if head.startswith(_UTF_16):
        return "is UTF-16 text; convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8"
    if b"\0" in head[:HEAD_BYTES]:
        return "is not text: it has NUL bytes"
    return None


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """Read a whole text file in UTF-8, without its byte order mark. Line ends stay as they are.

    Args:
        path: The path of the file; a compressed file is unpacked.
        what: What the file is, for messages, like ``"prompts_file"``.

    Raises:
        DataError: If the file cannot be read, or is not UTF-8 text.
    """
    try:
        with open_unpacked(Path(path)) as stream:
            data = stream.read().removeprefix(BOM)
        if reason := why_not_text(data[:HEAD_BYTES]):
            raise DataError(f"{what} {path} {reason}")
        return data.decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {what} {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{what} {path} is not UTF-8: {error.reason} at byte {error.start}") from error
