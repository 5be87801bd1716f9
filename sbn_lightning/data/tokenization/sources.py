"""Where text comes from: files, folders, the standard library, Hugging Face datasets; cut into equal work.

Everything is planned before anything is read: inputs become *parts* (a range of bytes, rows or row groups of one
file) and parts become *segments* of about equal size. A segment is what one process tokenizes, and what survives
an interruption. Since the plan depends only on the inputs and the options, so does the result: the number of
processes and the moments of interruption leave no trace in it.

A document belongs to the part in which it starts. Files are read in blocks, so that memory stays bounded however
large a text file is (JSONL lines and table rows are held one at a time).

Train and validation: a text file goes to one side as a whole, by a hash of its relative path; records of JSONL,
Parquet and Hugging Face datasets go by a hash of (file, position). Only a lone text file is cut: its tail validates.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from glob import glob
from pathlib import Path
from typing import Any

from sbn_lightning.core.errors import ConfigError, DataError

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
# `site-packages` would make the corpus depend on what is installed. The test suite and IDLE are kept: they are
# two thirds of the text, ordinary Python, and there on most interpreters.
_STDLIB_SKIPS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}
_FULL_CHECKSUM_LIMIT = 2 << 30


@dataclass(frozen=True)
class Part:
    """A contiguous piece of one input.

    Attributes:
        path: File to open, or the name of a Hugging Face dataset.
        name: Relative path: what order, hashes and messages go by, the same on every machine.
        format: ``text``, ``jsonl``, ``parquet`` or ``hf``.
        start: First byte (text, jsonl), row group (parquet) or row (hf).
        stop: End of the range, exclusive.
        size: About how many bytes that is.
        split: ``train``, ``val``, or None where each record is assigned by its hash.
        last: The range ends the document (text files only).
    """

    path: str
    name: str
    format: str
    start: int
    stop: int
    size: int
    split: str | None = None
    last: bool = True

    def to_json(self) -> dict[str, Any]:
        """As plain types, for the journal."""
        return asdict(self)


def share(key: str) -> float:
    """A number in [0, 1) that depends on ``key`` alone, on every machine and in every Python version."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def digest(text: str) -> str:
    """A short fingerprint of a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def find_files(inputs: Iterable[str], pattern: str) -> list[tuple[Path, str]]:
    """Expand files, folders, globs and ``stdlib`` into (path, relative path), sorted by relative path.

    Raises:
        ConfigError: An input does not exist, or a folder or glob holds no matching file.
    """
    found: dict[Path, str] = {}
    for index, text in enumerate(inputs):
        if text == "stdlib":
            root = Path(sysconfig.get_path("stdlib"))
            hits = list(_walk(root, "*.py", _STDLIB_SKIPS))
        elif Path(text).is_dir():
            hits = list(_walk(Path(text), pattern, set()))
        elif Path(text).is_file():
            hits = [(Path(text), Path(text).name)]
        else:
            hits = [(Path(p), Path(p).name) for p in sorted(glob(text, recursive=True)) if Path(p).is_file()]
            if not hits:
                raise ConfigError(
                    f"input {text!r} is no file, folder or glob with files in it; give text, JSONL or Parquet "
                    "files, a folder of them, 'stdlib', or 'hf:NAME' for a Hugging Face dataset"
                )
        if not hits:
            raise ConfigError(f"no file in {text!r} matches --pattern {pattern!r}; change --pattern or the folder")
        taken = set(found.values())
        for path, name in hits:
            # Two inputs may hold the same relative path; the same file twice is the same file once.
            found.setdefault(path.resolve(), f"{index}/{name}" if name in taken else name)
    return sorted(((path, name) for path, name in found.items()), key=lambda hit: hit[1])


def _walk(root: Path, pattern: str, skips: set[str]) -> Iterator[tuple[Path, str]]:
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n not in skips and not n.startswith("."))
        for file in files:
            path = Path(folder, file)
            if not file.startswith(".") and path.match(pattern) and path.is_file():
                yield path, path.relative_to(root).as_posix()


def plan_files(
    inputs: Iterable[str], pattern: str, val_fraction: float, max_bytes: int | None, segment_bytes: int
) -> tuple[list[Part], list[str]]:
    """Turn file inputs into parts, in order, and list what was skipped as unreadable or binary."""
    parts: list[Part] = []
    skipped: list[str] = []
    budget = max_bytes if max_bytes is not None else 1 << 62
    named = {str(Path(text).resolve()) for text in inputs if Path(text).is_file()}
    for path, name in find_files(inputs, pattern):
        if budget <= 0:
            break
        kind = FORMATS.get(path.suffix.lower(), "text")
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                head = stream.read(8192)
        except OSError as error:
            if str(path) in named:
                raise ConfigError(f"cannot read {path}: {error.strerror}") from error
            skipped.append(name)
            continue
        if kind != "parquet" and b"\0" in head:
            if str(path) in named:
                raise ConfigError(f"{path} looks binary (it has NUL bytes); give UTF-8 text, JSONL or Parquet")
            skipped.append(name)
            continue
        if kind == "parquet":
            new = list(_parquet_parts(path, name, segment_bytes, budget))
        else:
            stop = min(size, budget)
            whole = Part(str(path), name, kind, 0, stop, stop)
            new = list(cut(whole, segment_bytes, closes=True))
        parts.extend(new)
        budget -= sum(part.size for part in new)
    return assign_splits(parts, val_fraction), skipped


def cut(part: Part, segment_bytes: int, closes: bool) -> Iterator[Part]:
    """Cut a byte range into pieces of at most ``segment_bytes``; the last one closes the document if asked."""
    if part.stop <= part.start:
        return
    for start in range(part.start, part.stop, segment_bytes):
        stop = min(start + segment_bytes, part.stop)
        yield replace(part, start=start, stop=stop, size=stop - start, last=closes and stop == part.stop)


def _parquet_parts(path: Path, name: str, segment_bytes: int, budget: int) -> Iterator[Part]:
    import pyarrow.parquet as pq

    try:
        metadata = pq.ParquetFile(path).metadata
    except Exception as error:  # pyarrow has a dozen error types for "not a Parquet file"
        raise DataError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
    begin, size = 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= segment_bytes or size >= budget or group == metadata.num_row_groups - 1:
            yield Part(str(path), name, "parquet", begin, group + 1, size)
            budget -= size
            begin, size = group + 1, 0
            if budget <= 0:
                return


def assign_splits(parts: list[Part], val_fraction: float) -> list[Part]:
    """Give every text file a side. A handful of files always has one on each side; a lone one is cut in two."""
    files = sorted({part.name for part in parts if part.format == "text"})
    if not files or len(files) != len({part.name for part in parts}):
        # Records bring their own split: no text file has to be forced into validation.
        val = {name for name in files if share(name) < val_fraction}
    elif len(files) == 1 and val_fraction > 0:
        return _cut_lone_file(parts, val_fraction)
    else:
        val = {name for name in files if share(name) < val_fraction}
        if val_fraction > 0 and not val:
            val = {min(files, key=share)}
        elif len(val) == len(files) and val_fraction < 1:
            val = set(sorted(files, key=share)[:-1])
    return [
        replace(part, split="val" if part.name in val else "train") if part.format == "text" else part for part in parts
    ]


def _cut_lone_file(parts: list[Part], val_fraction: float) -> list[Part]:
    stop = parts[-1].stop
    border = stop - max(1, int(stop * val_fraction))
    step = max(part.size for part in parts)
    head = replace(parts[0], start=0, stop=border, split="train")
    tail = replace(parts[0], start=border, stop=stop, split="val")
    return [*cut(head, step, closes=True), *cut(tail, step, closes=True)]


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
    """What the fingerprint knows of each input file: name, size, and a checksum (dates above 2 GiB in all)."""
    files = {(part.name, part.path) for part in parts if part.format != "hf"}
    full = sum(os.path.getsize(path) for _, path in files) <= _FULL_CHECKSUM_LIMIT
    described: list[list[Any]] = []
    for name, path in sorted(files):
        size = os.path.getsize(path)
        described.append([name, size, file_crc32(path) if full else os.stat(path).st_mtime_ns])
    return described


def file_crc32(path: str | os.PathLike[str]) -> int:
    """CRC-32 of a file, read in blocks."""
    crc = 0
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


class ReplacementCounter:
    """Decode UTF-8 with U+FFFD for every bad sequence, and count those."""

    def __init__(self) -> None:
        self.count = 0
        codecs.register_error("sbn_count_replacements", self._handle)

    def _handle(self, error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        self.count += 1
        return "\ufffd", error.end

    def decode(self, data: bytes) -> str:
        """Decode a complete piece."""
        return data.decode("utf-8", "sbn_count_replacements")

    def incremental(self) -> codecs.IncrementalDecoder:
        """A decoder for a stream of blocks."""
        return codecs.getincrementaldecoder("utf-8")("sbn_count_replacements")
