"""Read the documents of a part of the input.

:func:`read_part` yields ``(split, text, ends)``: a piece of a document, the side it goes to, and whether the document
ends with the piece. A long document comes in several pieces, cut after a newline where there is one.

Records come from one generator for each format. Each yields ``(position, record, where)``: the number that the split
is drawn from, the record, and a function that names its place for a message. A record without text is counted and
left out (:class:`~sbn_lightning.data.tokenization.tally.Tally`). A line that is not JSON stops the work, because the
file is damaged.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from sbn_lightning.core.errors import DataError
from sbn_lightning.core.text import BOM, open_unpacked, skip
from sbn_lightning.data.tokenization.hub import read_hf
from sbn_lightning.data.tokenization.kinds import (
    array_items,
    describe_json_error,
    parquet_file,
    parse_json,
    table_rows,
)
from sbn_lightning.data.tokenization.sources import Part, share
from sbn_lightning.data.tokenization.tally import ERRORS, Tally

Piece = tuple[str, str, bool]
Record = tuple[int, Any, Callable[[], str]]
PIECE = 1 << 20
_ROWS = 256
_JSON_NAMES = {dict: "an object", list: "a list", bool: "a truth value", int: "a number", float: "a number"}


class _TooDeep:
    """The stand-in for a record that is nested too deeply for Python's parser."""


def read_part(part: Part, options: dict[str, Any], tally: Tally) -> Iterator[Piece]:
    """Yield the pieces of every document that starts in ``part``.

    Args:
        part: The part to read.
        options: The options of ``prepare``: ``text_key``, ``val_fraction``, and for Hugging Face datasets ``subset``
            and ``split``.
        tally: The tally that counts what is replaced and what is left out.

    Raises:
        DataError: The file is damaged; the message names the file and the line.
    """
    if part.format == "text":
        yield from _read_text(part, tally)
        return
    key = options["text_key"]
    for position, record, where in _records(part, options, tally):
        text, reason = _text_of(record, key)
        if reason:
            tally.skip(where, reason)
            continue
        split = "val" if share(f"{part.name}:{position}") < options["val_fraction"] else "train"
        pieces = list(_pieces(tally.mend(text)))
        for index, piece in enumerate(pieces):
            yield split, piece, index == len(pieces) - 1


def sample_texts(parts: list[Part], options: dict[str, Any]) -> Iterator[str]:
    """Yield text of the training split to learn a tokenizer from, at most ``bpe_sample_bytes`` characters.

    Parts come in the order of a hash, so that the sample is spread over the corpus and the same everywhere.
    """
    parts = sorted(parts, key=lambda part: (share(f"sample:{part.name}:{part.start}"), part.name, part.start))
    left = options["bpe_sample_bytes"]
    limit = max(PIECE, left // len(parts))
    tally = Tally()
    for part in parts:
        if part.split == "val":
            continue
        taken = 0
        for split, text, _ in read_part(part, options, tally):
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
    """Go to the first line that starts at or after ``start``. Reading in blocks allows lines longer than memory."""
    if start == 0:
        return 0
    skip(stream, start - 1)
    position = start - 1
    while block := stream.readline(PIECE):
        position += len(block)
        if block.endswith(b"\n"):
            break
    return position


def _read_text(part: Part, tally: Tally) -> Iterator[Piece]:
    assert part.split is not None
    decoder = tally.decoder()
    held = ""
    with open_unpacked(part.path) as stream:
        start = position = _seek_line(stream, part.start)
        # The next part starts after the first newline at or past `stop - 1`. This part reads up to there, and no more.
        closing = position < part.stop
        while closing and (block := stream.read(PIECE)):
            if position + len(block) >= part.stop:
                newline = block.find(b"\n", max(0, part.stop - 1 - position))
                if newline >= 0:
                    block, closing = block[: newline + 1], False
            if start == position == 0:
                held += decoder.decode(block.removeprefix(BOM))
            else:
                held += decoder.decode(block)
            position += len(block)
            border = held.rfind("\n") + 1 or (len(held) if len(held) > PIECE else 0)
            if border:
                yield part.split, held[:border], False
                held = held[border:]
    held += decoder.decode(b"", True)
    if held or part.last:
        yield part.split, held, part.last


def _records(part: Part, options: dict[str, Any], tally: Tally) -> Iterator[Record]:
    key = options["text_key"]
    if part.format == "hf":
        for row, value in read_hf(part, options, _ROWS):
            yield row, {key: value}, partial(_place, part.name, "row", row)
    elif part.format == "parquet":
        yield from _read_parquet(part, key, tally)
    elif part.format == "jsonl":
        yield from _read_jsonl(part, tally)
    elif part.format == "json":
        yield from _read_json(part, tally)
    else:
        yield from _read_table(part, key)


def _text_of(record: Any, key: str) -> tuple[str, str]:
    """Return the text of a record and an empty reason, or an empty text and the reason why there is none."""
    if isinstance(record, dict):
        if key not in record:
            return "", f"no {key!r}"
        record = record[key]
    elif not isinstance(record, str) and record is not _TooDeep:
        return "", f"{_JSON_NAMES.get(type(record), 'null')}, not an object"
    if isinstance(record, str):
        return (record, "") if record else ("", "empty text")
    if record is _TooDeep:
        return "", "nested too deeply to be read"
    if record is None:
        return "", f"null under {key!r}"
    return "", f"{_JSON_NAMES.get(type(record), type(record).__name__)} under {key!r}, not text"


def _read_jsonl(part: Part, tally: Tally) -> Iterator[Record]:
    with open_unpacked(part.path) as stream:
        position = _seek_line(stream, part.start)
        while position < part.stop and (line := stream.readline()):
            start, position = position, position + len(line)
            line = line.removeprefix(BOM)  # Files that were laid end to end have a byte order mark in the middle.
            if not line.strip():
                continue

            def where(at: int = start) -> str:
                return f"{part.path} line {_line_number(part.path, at)}"

            try:
                # Without its end, the line is line 1 for the parser, and columns count from the start of the line.
                record = parse_json(tally.decode(line).rstrip("\r\n"))
            except ValueError as error:
                reason = describe_json_error(error, one_line=True)
                raise DataError(f"{where()} is not JSON ({reason}); fix the line or leave the file out") from error
            except RecursionError:
                record = _TooDeep
            yield start, record, where


def _place(file: str, what: str, number: int) -> str:
    return f"{file} {what} {number}"


def _line_number(path: str, position: int) -> int:
    number, left = 1, position
    with open_unpacked(path) as stream:
        while left > 0 and (block := stream.read(min(PIECE, left))):
            number += block.count(b"\n")
            left -= len(block)
    return number


def _read_json(part: Part, tally: Tally) -> Iterator[Record]:
    with open_unpacked(part.path) as stream:
        text = tally.decode(stream.read().removeprefix(BOM)).strip()
    items = array_items(text) if text.startswith("[") else iter([(parse_json(text), 0)])
    for number in count(1):
        try:
            item, end = next(items)
        except StopIteration:
            return
        except ValueError as error:
            what = f"{part.path} is not JSON at item {number} ({describe_json_error(error)})"
            raise DataError(f"{what}; fix the file or leave it out") from error
        except RecursionError as error:
            raise DataError(f"{part.path} is nested too deeply at item {number}; leave the file out") from error
        yield number - 1, item, partial(_place, part.path, "item", number)
        if end >= part.stop:
            return


def _read_table(part: Part, key: str) -> Iterator[Record]:
    with open_unpacked(part.path) as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors=ERRORS, newline="")
        rows = table_rows(lines, part.format)
        try:
            header: list[str] = next(rows, [])
            column = header.index(key) if key in header else len(header)
            read = 0
            for number, row in enumerate(rows, 1):
                if row:
                    record = {key: row[column]} if column < len(row) else {}
                    yield number, record, partial(_place, part.path, "row", number)
                    read += sum(map(len, row))
                if read >= part.stop:
                    return
        except csv.Error as error:
            raise DataError(f"{part.path} row {rows.line_num} cannot be read: {error}; leave the file out") from error


def _read_parquet(part: Part, key: str, tally: Tally) -> Iterator[Record]:
    file = parquet_file(Path(part.path))
    row = sum(file.metadata.row_group(g).num_rows for g in range(part.start))
    groups = list(range(part.start, part.stop))
    for batch in file.iter_batches(batch_size=_ROWS, row_groups=groups, columns=[key]):
        for value in _values(batch.column(0), tally):
            yield row, {key: value}, partial(_place, part.path, "row", row)
            row += 1


def _values(column: Any, tally: Tally) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # Parquet does not check that its strings are UTF-8.
        values = column.cast("large_binary").to_pylist()
        return [None if value is None else tally.decode(value) for value in values]
