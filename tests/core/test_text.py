"""Every part of the project reads text files by the same rules."""

from __future__ import annotations

import bz2
import gzip
import lzma
import sys
from pathlib import Path

import pytest

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.text import open_unpacked, read_text, skip, split_suffix, why_not_text

TEXT = "first line\r\nsecond é 🙂\n" * 5000


def packed(folder: Path, suffix: str, data: bytes) -> Path:
    import pyarrow

    pack = {
        "": bytes,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
    }[suffix.lower()]
    file = folder / f"a.txt{suffix}"
    file.write_bytes(pack(data))
    return file


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst", ".GZ"])
def test_packed_files_read_like_plain_ones(tmp_path: Path, suffix: str) -> None:
    data = TEXT.encode()
    file = packed(tmp_path, suffix, data)
    assert read_text(file, "text") == TEXT
    with open_unpacked(file) as stream:
        skip(stream, 12)
        assert stream.readline() == "second é 🙂\n".encode()
    file.write_bytes(file.read_bytes() * 2)  # Several compressed files in one, as `cat a.gz b.gz` makes.
    assert read_text(file, "text") == TEXT * 2


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_packed_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    file = packed(tmp_path, suffix, TEXT.encode())
    file.write_bytes(b"plain text" if damage == "foreign" else file.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"a.txt{suffix} cannot be unpacked \(.+\); it may be cut short") as caught:
        read_text(file, "text")
    assert "\n" not in str(caught.value)


def test_zstandard_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = packed(tmp_path, ".zst", b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"a.txt.zst is compressed with Zstandard.*pip install pyarrow"):
        open_unpacked(file)


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfword \xef\xbb\xbf")
    assert read_text(file, "text") == "word \ufeff"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\0b", "prompts FILE is not text: it has NUL bytes"),
        ("word".encode("utf-16"), "prompts FILE is UTF-16 text; convert it to UTF-8"),
        (b"abc\xff", "prompts FILE is not UTF-8: invalid start byte at byte 3"),
        (None, "cannot read prompts FILE: No such file"),
    ],
)
def test_what_is_not_text_is_refused_by_name(tmp_path: Path, data: bytes | None, message: str) -> None:
    file = tmp_path / "a.txt"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_text(file, "prompts")
    assert str(caught.value).startswith(message.replace("FILE", str(file)))


def test_a_nul_far_into_a_file_is_a_character() -> None:
    assert why_not_text(b"a" * 8191 + b"\0") is not None
    assert why_not_text(b"a" * 8192 + b"\0") is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.jsonl", (".jsonl", "")), ("A.JSONL.GZ", (".jsonl", ".gz")), ("b.gz", ("", ".gz")), ("c", ("", ""))],
)
def test_suffixes(name: str, expected: tuple[str, str]) -> None:
    assert split_suffix(name) == expected
