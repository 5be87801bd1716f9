"""The prepared folder on a disk: litdata shards, ``meta.json``, and the check that both are whole.

::

    DIR/meta.json            written last: a folder without it is not finished
    DIR/tokenizer.json
    DIR/train/index.json     litdata's index
    DIR/train/chunk-0-0.bin  litdata's chunks, read with ``TokensLoader``
    DIR/val/...

litdata's own ``optimize`` is not used, for three reasons. Which document lands in which chunk depends on the number
of workers. The index holds the time of day. A folder whose writer was killed looks like a finished one. Here the tokens
are laid end to end first, and litdata's chunk writer cuts them afterwards, at the same places every time. The index's
``updated_at`` is a checksum of the content instead of a date. litdata caches remote shards under this key, so litdata
fetches shards again when they have changed, and only then.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sbn_lightning.core.errors import DataError
from sbn_lightning.core.files import file_crc32, write_text

FORMAT = "sbn_lightning.tokens"
FORMAT_VERSION = 1
# How many tokens the chunk writer gets at a time. Its chunks are whole multiples of this number.
_ITEM_TOKENS = 1 << 16


def write_shards(
    folder: Path, segments: Iterable[Path], dtype: np.dtype[Any], chunk_bytes: int, item: int | None = None
) -> None:
    """Cut token files into litdata chunks.

    Args:
        folder: The folder to write the chunks and ``index.json`` to; it must not exist.
        segments: The files of token ids, in order.
        dtype: The dtype of the token ids.
        chunk_bytes: The size of a chunk, in bytes.
        item: A number of tokens of which every chunk holds a whole multiple; None leaves the choice to this function.
    """
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir(parents=True)
    if item is None:
        item = max(1, min(_ITEM_TOKENS, chunk_bytes // dtype.itemsize // 8))
    chunk_bytes = max(chunk_bytes, item * dtype.itemsize)
    writer = BinaryWriter(str(folder), chunk_bytes=chunk_bytes, item_loader=TokensLoader())
    for index, tokens in enumerate(_blocks(segments, dtype, item)):
        writer.add_item(index, tokens)
    writer.done()
    # The writer names its files after the rank in the environment. Names here do not depend on it.
    (own_index,) = folder.glob("*.index.json")
    index_json = json.loads(own_index.read_text(encoding="utf-8"))
    own_index.unlink()
    content = 0
    for number, chunk in enumerate(index_json["chunks"]):
        name = f"chunk-0-{number}.bin"
        (folder / chunk["filename"]).replace(folder / name)
        chunk["filename"] = name
        content = zlib.crc32(f"{chunk['dim']} {file_crc32(folder / name)}".encode(), content)
    index_json["updated_at"] = f"{content:08x}"
    write_text(folder / "index.json", json.dumps(index_json, sort_keys=True))


def _blocks(segments: Iterable[Path], dtype: np.dtype[Any], size: int) -> Iterator[np.ndarray]:
    held = np.empty(0, dtype=dtype)
    for segment in segments:
        with segment.open("rb") as stream:
            while len(new := np.fromfile(stream, dtype=dtype, count=size - len(held))):
                held = np.concatenate([held, new])
                if len(held) == size:
                    yield held
                    held = np.empty(0, dtype=dtype)
    if len(held):
        yield held


def checksums(root: Path, names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Return the size in bytes and the CRC-32 of each named file under ``root``."""
    return {n: {"bytes": (root / n).stat().st_size, "crc32": file_crc32(root / n)} for n in sorted(names)}


def parse_meta(text: str, where: str) -> dict[str, Any]:
    """Read the text of a ``meta.json``.

    Raises:
        DataError: The text is no ``meta.json``, or has a format version that this code does not know.
    """
    try:
        meta = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error}); run `prepare` again with --overwrite") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DataError(f"{where} was not written by `prepare`; give a folder that was")
    if meta["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"{where} has format version {meta['format_version']}, this code reads {FORMAT_VERSION}; "
            "run `prepare` again with --overwrite"
        )
    return meta


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Return the ``meta.json`` of a finished folder, or None if there is none."""
    file = folder / "meta.json"
    return parse_meta(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else None


def verify(folder: Path, meta: dict[str, Any], checksum: bool) -> None:
    """Check that the files of a prepared folder are the ones ``meta.json`` describes.

    Args:
        folder: The prepared folder.
        meta: The contents of its ``meta.json``.
        checksum: Whether to read every byte (about 1 GiB/s). Otherwise only sizes are compared.

    Raises:
        DataError: A file is missing, truncated or damaged.
    """
    way_out = f"copy it again, or run `prepare` with --output {folder} --overwrite"
    for name, expected in meta["files"].items():
        file = folder / name
        if not file.is_file():
            raise DataError(f"shard {file} is missing; {way_out}")
        size = os.path.getsize(file)
        if size != expected["bytes"]:
            raise DataError(f"shard {file} has {size} bytes instead of {expected['bytes']} (cut short?); {way_out}")
        if checksum and file_crc32(file) != expected["crc32"]:
            raise DataError(f"shard {file} is damaged: its checksum is not the one in meta.json; {way_out}")


def total_bytes(meta: dict[str, Any]) -> int:
    """Return the size of all files of a prepared folder, in bytes."""
    return sum(int(entry["bytes"]) for entry in meta["files"].values())


def count_blocks(index_json: dict[str, Any], block_size: int) -> int:
    """Return how many blocks of ``block_size`` tokens a split holds. Blocks do not cross chunks."""
    return sum(int(chunk["dim"]) // block_size for chunk in index_json["chunks"])
