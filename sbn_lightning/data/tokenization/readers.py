"""From a part of an input to its documents: one generator a format.

Each yields ``(split, text, ends)``: a piece of a document, the side it goes to, and whether the document ends with
it. Long documents come in several pieces, cut after a newline where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.data.tokenization.sources import Part, ReplacementCounter, share

if TYPE_CHECKING:
    from datasets import Dataset

Piece = tuple[str, str, bool]
PIECE = 1 << 20
_ROWS = 256


def read_part(part: Part, options: dict[str, Any], counter: ReplacementCounter) -> Iterator[Piece]:
    """Yield the pieces of every document that starts in ``part``.

    Args:
        part: What to read.
        options: ``text_key``, ``val_fraction``, and for Hugging Face datasets ``subset`` and ``split``.
        counter: Counts byte sequences that are not UTF-8.

    Raises:
        DataError: A record does not parse or has no text; names file and line.
    """
    if part.format == "text":
        yield from _read_text(part, counter)
        return
    rows = {"jsonl": _read_jsonl, "parquet": _read_parquet, "hf": _read_hf}[part.format]
    for position, text in rows(part, options, counter):
        if not text:
            continue
        split = "val" if share(f"{part.name}:{position}") < options["val_fraction"] else "train"
        pieces = list(_pieces(text))
        for index, piece in enumerate(pieces):
            yield split, piece, index == len(pieces) - 1


def sample_texts(parts: list[Part], options: dict[str, Any]) -> Iterator[str]:
    """Text of the training split to learn a tokenizer from, at most ``bpe_sample_bytes`` characters.

    Parts come in the order of a hash, so that the sample is spread over the corpus and the same everywhere.
    """
    parts = sorted(parts, key=lambda part: (share(f"sample:{part.name}:{part.start}"), part.name, part.start))
    left = options["bpe_sample_bytes"]
    limit = max(PIECE, left // len(parts))
    counter = ReplacementCounter()
    for part in parts:
        if part.split == "val":
            continue
        taken = 0
        for split, text, _ in read_part(part, options, counter):
            if split != "train" or not text:
                continue
            text = text[: min(left, limit - taken)]
            yield text
            taken += len(text)
            left -= len(text)
            if left <= 0 or taken >= limit:
                break
        if left <= 0:
            return


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE:
        stop = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield text[start:stop]
        start = stop
    yield text[start:]


def _seek_line(stream: BinaryIO, start: int) -> int:
    """Go to the first line that starts at or after ``start``, in blocks: a line may be longer than memory."""
    if start == 0:
        return 0
    stream.seek(start - 1)
    position = start - 1
    while block := stream.read(PIECE):
        newline = block.find(b"\n")
        if newline >= 0:
            stream.seek(position + newline + 1)
            return position + newline + 1
        position += len(block)
    return position


def _read_text(part: Part, counter: ReplacementCounter) -> Iterator[Piece]:
    assert part.split is not None
    decoder = counter.incremental()
    held = ""
    with open(part.path, "rb") as stream:
        position = _seek_line(stream, part.start)
        # The next part starts after the first newline at or past `stop - 1`: read up to there and no further.
        closing = position < part.stop
        while closing and (block := stream.read(PIECE)):
            if position + len(block) >= part.stop:
                newline = block.find(b"\n", max(0, part.stop - 1 - position))
                if newline >= 0:
                    block, closing = block[: newline + 1], False
            position += len(block)
            held += decoder.decode(block)
            border = held.rfind("\n") + 1 or (len(held) if len(held) > PIECE else 0)
            if border:
                yield part.split, held[:border], False
                held = held[border:]
    held += decoder.decode(b"", True)
    if held or part.last:
        yield part.split, held, part.last


def _read_jsonl(part: Part, options: dict[str, Any], counter: ReplacementCounter) -> Iterator[tuple[int, str]]:
    key = options["text_key"]
    with open(part.path, "rb") as stream:
        position = _seek_line(stream, part.start)
        while position < part.stop and (line := stream.readline()):
            start, position = position, position + len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(counter.decode(line))
            except json.JSONDecodeError as error:
                where = f"{part.path} line {_line_number(part.path, start)}"
                raise DataError(f"{where} is not JSON ({error.msg}); fix the line or leave the file out") from error
            yield start, _text_of(record, key, lambda at=start: f"{part.path} line {_line_number(part.path, at)}")


def _line_number(path: str, position: int) -> int:
    count, left = 1, position
    with open(path, "rb") as stream:
        while left > 0 and (block := stream.read(min(PIECE, left))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _text_of(record: Any, key: str, where: Any) -> str:
    text = record.get(key) if isinstance(record, dict) else None
    if isinstance(text, str):
        return text
    has = sorted(record)[:8] if isinstance(record, dict) else type(record).__name__
    raise DataError(f"{where()} has no text under {key!r} (it has: {has}); pass --text_key")


def _read_parquet(part: Part, options: dict[str, Any], counter: ReplacementCounter) -> Iterator[tuple[int, str]]:
    import pyarrow.parquet as pq

    key = options["text_key"]
    file = pq.ParquetFile(part.path)
    if key not in file.schema_arrow.names:
        raise DataError(f"{part.path} has no column {key!r} (it has: {file.schema_arrow.names[:8]}); pass --text_key")
    row = sum(file.metadata.row_group(g).num_rows for g in range(part.start))
    groups = list(range(part.start, part.stop))
    for batch in file.iter_batches(batch_size=_ROWS, row_groups=groups, columns=[key]):
        for text in batch.column(0).to_pylist():
            yield row, _text_of({key: text}, key, lambda at=row: f"{part.path} row {at}")
            row += 1


@lru_cache(maxsize=2)
def load_hf(name: str, subset: str | None, split: str) -> Dataset:
    """Open a Hugging Face dataset by name, or from a local folder (saved with ``save_to_disk`` or loadable).

    Raises:
        ConfigError: It cannot be opened, or has no such split.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("input 'hf:...' needs the package 'datasets': pip install datasets") from error

    folder = Path(name)
    try:
        if folder.is_dir() and ((folder / "state.json").exists() or (folder / "dataset_dict.json").exists()):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library's own errors, the hub's, the network's, the file system's
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"cannot load hf:{name} (subset {subset}, split {split}): {reason}") from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise ConfigError(f"hf:{name} has no split {split!r}; pass --split with one of {sorted(loaded)}")
        loaded = loaded[split]
    return loaded


def plan_hf(name: str, options: dict[str, Any], max_bytes: int | None, segment_bytes: int) -> list[Part]:
    """Cut a Hugging Face dataset into ranges of rows.

    Raises:
        ConfigError: It cannot be loaded, or has no such column.
    """
    dataset = load_hf(name, options["subset"], options["split"])
    if options["text_key"] not in dataset.column_names:
        raise ConfigError(f"hf:{name} has no column {options['text_key']!r}; pass --text_key {dataset.column_names}")
    rows = len(dataset)
    if rows == 0:
        return []
    row_bytes = max(1.0, float(dataset.data.nbytes) / max(1, dataset.data.num_rows))
    if max_bytes is not None:
        rows = min(rows, max(1, int(max_bytes / row_bytes)))
    step = max(1, int(segment_bytes / row_bytes))
    ranges = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    return [Part(name, f"hf:{name}", "hf", a, b, max(1, int((b - a) * row_bytes))) for a, b in ranges]


def describe_hf(name: str, options: dict[str, Any]) -> list[Any]:
    """What the fingerprint knows of a Hugging Face dataset."""
    dataset = load_hf(name, options["subset"], options["split"])
    ends = [dataset[i][options["text_key"]] for i in (0, len(dataset) // 2, len(dataset) - 1)] if len(dataset) else []
    return [name, len(dataset), [share(str(text)) for text in ends]]


def _read_hf(part: Part, options: dict[str, Any], counter: ReplacementCounter) -> Iterator[tuple[int, str]]:
    key = options["text_key"]
    dataset = load_hf(part.path, options["subset"], options["split"])
    for start in range(part.start, part.stop, _ROWS):
        texts = dataset[start : min(start + _ROWS, part.stop)][key]
        for row, text in enumerate(texts, start):
            yield row, _text_of({key: text}, key, lambda at=row: f"{part.name} row {at}")
