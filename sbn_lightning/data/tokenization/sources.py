"""Cut the input into pieces of about equal work, before any of it is tokenized.

Each input file becomes one or more *parts*: a range of bytes, rows or row groups of the file. Consecutive parts are
packed into *segments* of about equal size. One process tokenizes a segment at a time, and an interruption loses no
more than the segments in work. The plan depends only on the inputs and the options, and so does the result: neither
the number of processes nor an interruption changes the result.

A document belongs to the part in which it starts. Text files and JSON lines are read in blocks, so memory stays
bounded however large a file is. A JSON array is parsed from memory as a whole.

``splits`` decides what is training data and what is validation data.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.files import CHECKSUM_LIMIT, file_crc32
from sbn_lightning.core.text import open_unpacked, split_suffix
from sbn_lightning.data.tokenization.find import find_files
from sbn_lightning.data.tokenization.kinds import kind_of, parquet_file

_ENDLESS = 1 << 62


@dataclass(frozen=True)
class Part:
    """A contiguous piece of one input.

    Attributes:
        path: The file to open, or the name of a Hugging Face dataset.
        name: The relative path of the file, the same on every machine. Order, hashes and messages use it.
        format: ``text``, ``jsonl``, ``json``, ``csv``, ``tsv``, ``parquet`` or ``hf``.
        start: The first byte, row group (parquet) or row (hf).
        stop: The end of the range, exclusive.
        size: About how many bytes of input the range is.
        split: ``train`` or ``val``; None before ``splits`` has chosen, and where each record is assigned by its hash.
        last: Whether the range ends the document (text files only).
    """

    path: str
    name: str
    format: str
    start: int
    stop: int
    size: int
    split: str | None = None
    last: bool = True

    @property
    def is_packed(self) -> bool:
        """Whether the file is compressed. ``start`` and ``stop`` then count unpacked bytes."""
        return self.format != "hf" and bool(split_suffix(self.path)[1])

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain types, for ``plan.json``."""
        return asdict(self)


def share(key: str) -> float:
    """Return a number in [0, 1) that depends on ``key`` alone, on every machine and in every Python version."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def digest(text: str) -> str:
    """Return a short fingerprint of a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def plan_files(
    inputs: Iterable[str],
    pattern: str,
    output: Path,
    *,
    text_key: str,
    max_bytes: int | None,
    segment_bytes: int,
) -> tuple[list[Part], dict[str, str]]:
    """Turn the file inputs into parts, in order.

    Args:
        inputs: The files, folders, globs and ``stdlib`` to read.
        pattern: The glob that the files of a folder must match.
        output: The output folder; nothing in it is read.
        text_key: The key or column that holds the text of a record.
        max_bytes: About how many bytes to read in all; None for all there are.
        segment_bytes: The largest part, in bytes.

    Returns:
        The parts, and the files that are left out: relative path -> reason.

    Raises:
        ConfigError: An input does not exist, or a file that was named itself cannot be used.
        DataError: A file is damaged, or one that was named itself is not text.
    """
    files, skipped = find_files(inputs, pattern, output)
    named = {Path(text).resolve() for text in inputs if Path(text).is_file()}
    parts: list[Part] = []
    left = max_bytes
    for path, name in files:
        if left is not None and left <= 0:
            break
        try:
            kind = kind_of(path, text_key)
            if not kind.format:
                if path in named:
                    raise DataError(f"{path} {kind.reason}")
                skipped[name] = kind.reason
                continue
            new = list(_parts_of(path, name, kind.format, segment_bytes, left))
        except OSError as error:
            if path in named:
                raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
            skipped[name] = f"cannot be read: {error.strerror or error}"
            continue
        parts.extend(new)
        if left is not None:
            left -= sum(part.stop if part.is_packed else part.size for part in new)
    return parts, dict(sorted(skipped.items()))


def _parts_of(path: Path, name: str, format: str, segment_bytes: int, left: int | None) -> Iterator[Part]:
    """Cut a file into parts, as far as ``left`` bytes go."""
    if format == "parquet":
        yield from _parquet_parts(path, name, segment_bytes, _ENDLESS if left is None else left)
        return
    size = path.stat().st_size
    if split_suffix(path)[1]:
        # A packed file is one part, because its middle cannot be reached without unpacking everything before it.
        if content := unpacked_size(path, 1 if left is None else left):
            yield Part(str(path), name, format, 0, _ENDLESS if left is None else content, size)
        return
    stop = size if left is None else min(size, left)
    whole = Part(str(path), name, format, 0, stop, stop)
    if format in ("text", "jsonl"):
        yield from cut(whole, segment_bytes, closes=True)
    elif stop:
        # The file is one part, because only a reader that begins at the start knows where a row or an item begins.
        yield whole


def unpacked_size(path: Path, limit: int) -> int:
    """Count the bytes of a packed file's content, up to ``limit``."""
    count = 0
    with open_unpacked(path) as stream:
        while count < limit and (block := stream.read(min(1 << 20, limit - count))):
            count += len(block)
    return count


def cut(part: Part, segment_bytes: int, closes: bool) -> Iterator[Part]:
    """Cut a byte range into pieces of at most ``segment_bytes``; the last one closes the document if asked."""
    if part.stop <= part.start:
        return
    for start in range(part.start, part.stop, segment_bytes):
        stop = min(start + segment_bytes, part.stop)
        yield replace(part, start=start, stop=stop, size=stop - start, last=closes and stop == part.stop)


def _parquet_parts(path: Path, name: str, segment_bytes: int, budget: int) -> Iterator[Part]:
    metadata = parquet_file(path).metadata
    begin, size = 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= segment_bytes or size >= budget or group == metadata.num_row_groups - 1:
            yield Part(str(path), name, "parquet", begin, group + 1, size)
            budget -= size
            begin, size = group + 1, 0
            if budget <= 0:
                return


def group(parts: Iterable[Part], segment_bytes: int) -> list[list[Part]]:
    """Pack consecutive parts into segments of about ``segment_bytes``."""
    segments: list[list[Part]] = []
    room = 0
    for part in parts:
        if not segments or part.size > room:
            segments.append([])
            room = segment_bytes
        segments[-1].append(part)
        room -= part.size
    return segments


def describe_files(parts: Iterable[Part]) -> list[list[Any]]:
    """Return what the fingerprint covers of each file: its name, its size, and its checksum or its date."""
    files = {(part.name, part.path) for part in parts if part.format != "hf"}
    # If all files together are larger than this, checksums would take too long, and dates take their place.
    full = sum(os.path.getsize(path) for _, path in files) <= CHECKSUM_LIMIT
    described: list[list[Any]] = []
    for name, path in sorted(files):
        size = os.path.getsize(path)
        described.append([name, size, file_crc32(path) if full else os.stat(path).st_mtime_ns])
    return described
