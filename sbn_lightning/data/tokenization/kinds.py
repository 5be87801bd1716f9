"""Look at a file, and decide how to read it or why to leave it out.

The suffix says what a file should be. Its first records show whether it holds text under the wanted key. A file that
is not text (a picture, a ``meta.json`` beside the data) is left out with the reason. A file that is damaged stops
``prepare``, because data would be missing.

=================================  ================================================================
suffix                             read as
=================================  ================================================================
``.jsonl``, ``.ndjson``            one JSON record a line
``.json``                          JSON lines, a JSON array of records, or one JSON record
``.csv``, ``.tsv``, ``.tab``       a table whose first line names the columns
``.parquet``, ``.pq``              a table
any other                          text, the whole file one document
=================================  ================================================================

Each but Parquet may be compressed: ``.gz``, ``.bz2``, ``.xz``, ``.zst``. A record is an object with the text under
``text_key``, or a string.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.text import BOM, HEAD_BYTES, open_unpacked, split_suffix, why_not_text

_FORMAT_OF = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
# How many bytes and records of a file are looked at. A file with texts very likely has a text among them.
_SAMPLE_BYTES = 1 << 20
_SAMPLE_RECORDS = 100
_HUGE_FIELD = 1 << 30
_TEXT_TYPES = ("string", "large_string", "string_view", "null")


class Kind(NamedTuple):
    """How a file is read.

    Attributes:
        format: ``text``, ``jsonl``, ``json``, ``csv``, ``tsv`` or ``parquet``; empty if the file is left out.
        reason: Why the file is left out; the words continue a sentence that begins with the file's name.
    """

    format: str
    reason: str = ""


def kind_of(path: Path, text_key: str) -> Kind:
    """Look at a file.

    Args:
        path: The path of the file.
        text_key: The key or column that should hold the text.

    Raises:
        OSError: The file cannot be read.
        DataError: The file is damaged.
    """
    suffix, compression = split_suffix(path)
    format = _FORMAT_OF.get(suffix, "text")
    if format == "parquet":
        if compression:
            return Kind("", "is a packed Parquet file; unpack it")
        return _kind_of_parquet(path, text_key)
    with open_unpacked(path) as stream:
        head = stream.read(HEAD_BYTES if format == "text" else _SAMPLE_BYTES)
    if reason := why_not_text(head):
        return Kind("", reason)
    head = head.removeprefix(BOM)
    if format == "text" or not head.strip():
        return Kind(format)
    if format == "jsonl":
        return _kind_of_records(Kind(format), text_key, _sample_lines(head))
    if format == "json":
        return _kind_of_json(path, head, text_key)
    try:
        header = next(table_rows(io.StringIO(head.decode("utf-8", "replace"), newline=""), format))
    except csv.Error as error:
        return Kind("", f"is not a {format.upper()} table ({error})")
    return _lacking(Kind(format), text_key, header)


def _kind_of_parquet(path: Path, text_key: str) -> Kind:
    schema = parquet_file(path).schema_arrow
    if text_key in schema.names:
        type = str(schema.field(text_key).type)
        if type not in _TEXT_TYPES and not type.startswith("dictionary<values=string"):
            return Kind("", f"has {type} under {text_key!r}, not text; pass --text_key")
    return _lacking(Kind("parquet"), text_key, schema.names)


def _kind_of_json(path: Path, head: bytes, text_key: str) -> Kind:
    text = head.decode("utf-8", "replace").lstrip()
    if text.startswith("["):
        return _kind_of_records(Kind("json"), text_key, _until_error(array_items(text)))
    with open_unpacked(path) as stream:
        first = stream.readline().removeprefix(BOM)
        # A line that is an object, and more lines after it: JSON lines under the name .json.
        is_lines = _is_json(first) and bool(stream.readline())
    if is_lines:
        return _kind_of_records(Kind("jsonl"), text_key, _sample_lines(head))
    with open_unpacked(path) as stream:
        whole = stream.read().removeprefix(BOM)
    try:
        record = parse_json(whole.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        return Kind("", f"is not JSON ({describe_json_error(error)})")
    return _kind_of_records(Kind("json"), text_key, iter([record]), "is one JSON value without")


def _kind_of_records(kind: Kind, text_key: str, records: Iterator[Any], lack: str = "has no") -> Kind:
    """Return ``kind`` if a record has the key or there are no records; otherwise the reason to leave the file out."""
    sample = list(islice(records, _SAMPLE_RECORDS))
    if not sample or any(isinstance(r, str) or (isinstance(r, dict) and text_key in r) for r in sample):
        return kind
    first = sample[0]
    return _lacking(kind, text_key, sorted(first) if isinstance(first, dict) else [f"a {type(first).__name__}"], lack)


def _lacking(kind: Kind, text_key: str, has: list[str], lack: str = "has no") -> Kind:
    if text_key in has:
        return kind
    return Kind("", f"{lack} text under {text_key!r} (it has: {', '.join(has[:8])}); pass --text_key")


def _sample_lines(head: bytes) -> Iterator[Any]:
    lines = head.split(b"\n")
    # The last line may be cut. Lines that do not parse are reported when they are read, with their number.
    for line in lines if len(head) < _SAMPLE_BYTES - len(BOM) else lines[:-1]:
        if line.strip():
            try:
                yield parse_json(line.removeprefix(BOM).decode("utf-8", "replace"))
            except (ValueError, RecursionError):
                yield ""


def _until_error(items: Iterator[tuple[Any, int]]) -> Iterator[Any]:
    try:
        yield from (item for item, _ in items)
    except (ValueError, RecursionError):
        return


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line.decode("utf-8", "replace"))
    except ValueError:
        return False
    except RecursionError:
        return True
    return True


def parse_json(text: str) -> Any:
    """Parse JSON. A number with too many digits for Python's ``int`` becomes a ``float``.

    Raises:
        ValueError: The text is not JSON.
        RecursionError: The text is nested too deeply for Python's parser.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python refuses integers of more than 4300 digits.
        return json.loads(text, parse_int=float)


def array_items(text: str) -> Iterator[tuple[Any, int]]:
    """Yield the items of a JSON array one by one, each with the position in ``text`` where the item ends.

    Raises:
        ValueError: The text is not an array of JSON values.
        RecursionError: An item is nested too deeply for Python's parser.
    """
    decoder, lenient = json.JSONDecoder(), json.JSONDecoder(parse_int=float)
    position = _after_space(text, text.index("[") + 1)
    while not text.startswith("]", position):
        try:
            item, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            raise
        except ValueError:
            item, position = lenient.raw_decode(text, position)
        yield item, position
        position = _after_space(text, position)
        if text.startswith(",", position):
            position = _after_space(text, position + 1)
        elif not text.startswith("]", position):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)


def _after_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\n", "\r", "\t"):
        position += 1
    return position


def describe_json_error(error: Exception, *, one_line: bool = False) -> str:
    """Return the reason why Python's parser gave up and the place, in a few words.

    Args:
        error: The exception of the parser.
        one_line: Whether the parser got a single line, whose number the message has elsewhere.
    """
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    # Some of Python's reasons end in "at", such as "Invalid control character at", and expect the place.
    line = "" if one_line else f"line {error.lineno} "
    return f"{error.msg.removesuffix(' at')} at {line}column {error.colno}"


def table_rows(lines: TextIO, format: str) -> Any:
    """Return a ``csv.reader`` that yields the rows of a table, the header first.

    Args:
        lines: The open table. It must be opened with ``newline=""``: a quoted field may go over several lines.
        format: ``csv`` or ``tsv``.
    """
    csv.field_size_limit(_HUGE_FIELD)  # The default of 131072 characters is less than a long document.
    return csv.reader(lines, "excel-tab" if format == "tsv" else "excel")


def parquet_file(path: Path) -> Any:
    """Open a Parquet file.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: The file is not Parquet, or is damaged.
        OSError: The file cannot be opened.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError(f"{path} is a Parquet file, which needs pyarrow: pip install pyarrow") from error
    path.open("rb").close()  # A file that may not be read is told from one that is damaged.
    try:
        return pq.ParquetFile(path)
    except Exception as error:  # pyarrow has a dozen error types for a file that is not Parquet.
        raise DataError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
