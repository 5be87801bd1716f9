"""What ``prepare`` reads as text, what it leaves out by name, and how it walks folders."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.data import prepare
from sbn_lightning.data.tokenizer import train_bpe
from tests.data.helpers import contents, prepare_small
from tests.data.test_data_prepare import both, documents

BOM = b"\xef\xbb\xbf"
LINES = [f"paragraph {i} about tea" for i in range(40)]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in LINES)
# Root ignores permissions by a capability. Without the capability, permissions count for root too.
AS_USER = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]


def write(path: Path, data: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def read(tmp_path: Path, name: str, data: str | bytes, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """Prepare one file; return ``meta.json`` and the documents."""
    defaults = {"tokenizer": "byte", "val_fraction": 0.3, "num_workers": 1, "overwrite": True}
    meta = prepare(write(tmp_path / name, data), str(tmp_path / "out"), **{**defaults, **options})
    return meta, sorted(text for split in meta["splits"] for text in documents(tmp_path / "out", split))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for number, (name, data) in enumerate(
        {
            "a.jsonl": BOM + JSONL.encode() + BOM + b'{"text": "after"}\n',
            "a.json": BOM + json.dumps([*LINES, "after"]).encode(),
            "a.csv": BOM + "\n".join(["text", *LINES, "after"]).encode(),
        }.items()
    ):
        meta, texts = read(tmp_path / str(number), name, data)
        assert texts == sorted([*LINES, "after"])
        assert meta["replaced"] == 0
    folder = tmp_path / "texts"
    for name in ("a", "b"):
        write(folder / f"{name}.txt", BOM + name.encode())
    prepare_small(folder, tmp_path / "out", segment_bytes=1)
    assert both(tmp_path / "out") == ["a", "b"]


def test_halves_of_surrogate_pairs_are_replaced_and_counted(tmp_path: Path) -> None:
    for tokenizer in ({"tokenizer": "byte"}, {"tokenizer": "bpe", "vocab_size": 300}):
        meta, texts = read(
            tmp_path, "a.jsonl", JSONL + r'{"text": "cut \ud83d here, whole \ud83d\ude00"}' + "\n", **tokenizer
        )
        assert "cut \ufffd here, whole 😀" in texts
        assert meta["replaced"] == 1


def test_parquet_strings_that_are_not_utf8_are_replaced_and_counted(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = pa.array([text.encode() for text in LINES] + [b"bad \xff", None]).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    meta = prepare(str(tmp_path / "a.parquet"), str(tmp_path / "out"), "byte", val_fraction=0.3, num_workers=1)
    assert both(tmp_path / "out") == sorted([*LINES, "bad \ufffd"])
    assert meta["replaced"] == 1
    assert meta["skipped_records"] == {"count": 1, "named": [f"{tmp_path}/a.parquet row 41 (null under 'text')"]}


def test_records_that_python_cannot_parse_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = '{"id": ' + "9" * 5000 + ', "text": "huge number"}\n'
    deep = '{"m": ' + "[" * 99_999 + "]" * 99_999 + ', "text": "deep"}\n'
    meta, texts = read(tmp_path, "a.jsonl", huge + JSONL + deep)
    assert texts == sorted([*LINES, "huge number"])
    assert meta["skipped_records"]["named"] == [f"{tmp_path}/a.jsonl line 42 (nested too deeply to be read)"]
    assert "1 record left out: " in capsys.readouterr().err
    assert read(tmp_path, "b.json", f"[{huge}, " + ", ".join(map(json.dumps, LINES)) + "]")[1] == texts


@pytest.mark.parametrize("workers", [1, 2])
def test_records_without_text_are_counted_and_the_first_three_named(
    tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = ['{"text": null}', '{"other": 1}', '{"text": ["a"]}', '{"text": ""}', "[1]", "7", "null", '"a string"']
    meta, texts = read(tmp_path, "a.jsonl", JSONL + "\n".join(odd), num_workers=workers, segment_bytes=400)
    assert texts == sorted([*LINES, "a string"])
    name = f"{tmp_path}/a.jsonl line"
    expected = [
        f"{name} 41 (null under 'text')",
        f"{name} 42 (no 'text')",
        f"{name} 43 (a list under 'text', not text)",
    ]
    assert meta["skipped_records"] == {"count": 7, "named": expected}
    assert f"  7 records left out: {'; '.join(expected)}; and 4 more\n" in capsys.readouterr().err
    with pytest.raises(
        DataError, match=r"no text fell into train .* 1 records were left out, such as .* line 1 \(null"
    ):
        read(tmp_path, "b.jsonl", '{"text": null}\n')


TABLE = 'id,text\n1,"two\nlines, ""quoted"""\n2,plain\n3\n' + "".join(f"{i},row {i}\n" for i in range(30))


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.json", JSONL, LINES),
        ("a.json", json.dumps([{"text": text} for text in LINES]), LINES),
        ("a.json", json.dumps([{"text": text} for text in LINES], indent=2), LINES),
        ("a.JSON", " \n" + json.dumps(LINES), LINES),
        ("a.NDJSON", JSONL, LINES),
        ("a.csv", TABLE, ['two\nlines, "quoted"', "plain", *(f"row {i}" for i in range(30))]),
        ("a.CSV", TABLE.replace("\n", "\r\n").replace("two\r\n", "two\n"), None),
        ("a.tsv", "text\tid\n" + "".join(f"{text}\t1\n" for text in LINES), LINES),
    ],
)
def test_every_format_that_holds_records(tmp_path: Path, name: str, data: str, expected: list[str] | None) -> None:
    meta, texts = read(tmp_path, name, data)
    assert texts == sorted(expected or ['two\nlines, "quoted"', "plain", *(f"row {i}" for i in range(30))])
    if name.lower() == "a.csv":
        assert meta["skipped_records"] == {"count": 1, "named": [f"{tmp_path}/{name} row 3 (no 'text')"]}


def test_one_json_record_over_several_lines(tmp_path: Path) -> None:
    record = json.dumps({"text": "alone", "id": 1}, indent=2)
    assert read(tmp_path, "a.json", record, val_fraction=0)[1] == ["alone"]


# The names of tests contain these bytes, so no time may be in them: every process has to collect the same names.
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.json",
            '{"license": "cc0"}',
            r"a.json is one JSON value without text under 'text' \(it has: license\); pass",
        ),
        ("a.json", "[1, 2]", r"a.json has no text under 'text' \(it has: a int\)"),
        ("a.json", "{broken", r"a.json is not JSON \(Expecting property name .* at line 1 column 2\)"),
        (
            "a.json",
            json.dumps(LINES)[:-9] + "\n",
            r"a.json is not JSON at item 40 \(.* at line 1 column \d+\); fix",
        ),
        ("a.csv", "id;text\n1;a\n", r"a.csv has no text under 'text' \(it has: id;text\); pass --text_key"),
        ("a.txt", "word".encode("utf-16"), r"a.txt is UTF-16 text; convert it to UTF-8"),
        (
            "a.jsonl.gz",
            gzip.compress(JSONL.encode() * 9, mtime=0)[:-30],
            r"a.jsonl.gz cannot be unpacked \(.*\); it may be cut",
        ),
        ("a.parquet.gz", gzip.compress(b"x", mtime=0), r"a.parquet.gz is a packed Parquet file; unpack it"),
    ],
)
def test_a_named_file_that_cannot_be_used_is_one_line(
    tmp_path: Path, name: str, data: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, name, data)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "meta.json").exists()


def test_parquet_of_lists_is_refused_before_it_is_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [["a"], ["b"]]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet has list<.*> under 'text', not text; pass --text_key"):
        prepare(str(tmp_path / "a.parquet"), str(tmp_path / "out"), "byte")


def zstd(data: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(data, "zstd", asbytes=True)


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".BZ2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)]
)
def test_packed_files_give_the_same_documents(tmp_path: Path, suffix: str, pack: Any) -> None:
    text = "".join(f"line {i} é\n" for i in range(400))
    for number, (name, data, count) in enumerate(
        [("a.jsonl", JSONL, 40), ("a.json", json.dumps(LINES), 40), ("a.csv", TABLE, 32), ("a.txt", text, 2)]
    ):
        place = tmp_path / str(number)
        plain = read(place, name, data)[1]
        texts = read(place, name + suffix, pack(data.encode()), segment_bytes=100)[1]
        assert len(texts) == count
        if name == "a.txt":  # The validation text of a lone file begins at the start of a line.
            assert [documents(place / "out", split) for split in ("train", "val")] == [[texts[0]], [texts[1]]]
        assert texts == plain
        limited = read(place, name + suffix, pack(data.encode()), max_bytes=300, val_fraction=0)[0]["splits"]["train"]
        assert 0 < limited["bytes"] < 600


def test_packed_text_in_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "in" / f"{name}.txt.gz", gzip.compress(name.encode()))
    write(tmp_path / "in" / "empty.txt.gz", gzip.compress(b""))
    prepare_small(tmp_path / "in", tmp_path / "out")
    assert both(tmp_path / "out") == ["a", "b"]


def test_files_of_a_folder_that_are_not_text_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    for name, data in {
        "a.txt": "a",
        "b.txt": "b",
        "data.jsonl": JSONL,
        "dataset_info.json": '{"license": "cc0"}',
        "labels.csv": "id,label\n1,x\n",
        "picture": b"\x89PNG\0\0",
        "picture.gz": gzip.compress(b"\x89PNG\0\0"),
    }.items():
        write(folder / name, data)
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe")
    meta = prepare_small(folder, tmp_path / "out")
    assert both(tmp_path / "out") == sorted(["a", "b", *LINES])
    assert meta["skipped"] == {
        "dataset_info.json": "is one JSON value without text under 'text' (it has: license); pass --text_key",
        "gone.txt": "is a link to a file that does not exist",
        "labels.csv": "has no text under 'text' (it has: id, label); pass --text_key",
        "picture": "is not text: it has NUL bytes",
        "picture.gz": "is not text: it has NUL bytes",
        "pipe": "is not a regular file",
    }
    printed = capsys.readouterr().err
    assert "  6 files left out: dataset_info.json is one JSON value" in printed
    assert "; and 3 more\n" in printed
    prepare_small(folder, tmp_path / "out")
    assert "already prepared: " in (again := capsys.readouterr().err)
    assert "6 files left out: " in again


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a" / "1.txt", "one")
    write(tmp_path / "real" / "2.txt", "two")
    write(tmp_path / "real" / "deep" / "3.txt", "three")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "real")
    (tmp_path / "in" / "c").symlink_to(tmp_path / "real" / "deep")
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "real" / "deep" / "up").symlink_to("..")
    prepare_small(tmp_path / "in", tmp_path / "out")
    assert both(tmp_path / "out") == ["one", "three", "two"]


@pytest.mark.skipif(sys.platform != "linux", reason="setpriv is a Linux tool")
def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    for name in ("a/1", "a/2", "b/3", "c"):
        write(tmp_path / "in" / f"{name}.txt", name)
    (tmp_path / "in" / "b").chmod(0)
    (tmp_path / "in" / "c.txt").chmod(0)
    script = (
        "import sys; from sbn_lightning.data import prepare; prepare(sys.argv[1], sys.argv[2], 'byte', num_workers=1)"
    )
    done = subprocess.run(
        [*AS_USER, sys.executable, "-c", script, str(tmp_path / "in"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
    )
    (tmp_path / "in" / "b").chmod(0o755)
    assert done.returncode == 0, done.stderr
    reasons = "b cannot be read: Permission denied; c.txt cannot be read: Permission denied"
    assert f"2 files left out: {reasons}\n" in done.stderr
    assert both(tmp_path / "out") == ["a/1", "a/2"]


def test_an_output_inside_the_input_never_reads_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(6):
        write(tmp_path / f"{i}.txt", f"text {i}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "tok")
    for overwrite in (False, True, False):
        prepare(".", "tok", "byte", num_workers=1, overwrite=overwrite)
        assert both(tmp_path / "tok") == [f"text {i}" for i in range(6)]
    write(tmp_path / "6.txt", "text 6")
    prepare([".", "*.txt"], "tok", "byte", num_workers=1, overwrite=True)
    assert both(tmp_path / "tok") == [f"text {i}" for i in range(7)]
    for name in ("tok/meta.json", "tok/*.json"):
        with pytest.raises(ConfigError, match=r"tok.* is in the output folder tok; give another"):
            prepare([".", name], "tok", "byte")


class Died(BaseException):
    """An exception that stands for the end of the process."""


@pytest.mark.parametrize("when", range(8))
def test_overwrite_loses_nothing_wherever_it_dies(
    corpus: Path, tmp_path: Path, when: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prepare_small(corpus, out)
    before, original, moves = contents(out), Path.replace, []

    def replace(self: Path, target: Any) -> Path:
        if Path(target).parent == out or self.parent == out:
            moves.append(target)
            if len(moves) > when:
                raise Died
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(Died):
            prepare_small(corpus, out, val_fraction=0.5, overwrite=True)
    # The first command finds its data again, whether the crash came before or after the exchange.
    prepare_small(corpus, out)
    assert contents(out) == before
    prepare_small(corpus, out, val_fraction=0.5, overwrite=True)
    prepare_small(corpus, tmp_path / "straight", val_fraction=0.5)
    assert contents(out) == contents(tmp_path / "straight")
    assert not (out / ".work").exists()


def test_a_failed_overwrite_keeps_the_old_data(corpus: Path, tmp_path: Path, prepared: Path) -> None:
    out = tmp_path / "out"
    prepare_small(corpus, out)
    broken = write(tmp_path / "broken.jsonl", JSONL + "{\n")
    with pytest.raises(DataError, match=r"line 41 is not JSON \(Expecting property name .* at column 2\); fix"):
        prepare(broken, str(out), "byte", overwrite=True, num_workers=1)
    prepare_small(corpus, out)
    assert contents(out) == contents(prepared)


@pytest.mark.parametrize("alphabet", ["ACGT", "的一是不了人我在有他", "ABCDEFabcdef0123456789+/"])
def test_bpe_cuts_text_without_spaces_into_short_pieces(alphabet: str) -> None:
    """The time of a piece grows with the square of its length, so one long piece would take all the time.

    Text that repeats shows the length of the pieces: each merge doubles the longest token, up to a whole piece.
    """
    text = alphabet * 2000
    tokenizer = train_bpe([text], 1000)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    longest = max(map(len, tokenizer.get_vocab(with_added_tokens=False)))  # one character of a name is one byte
    assert longest <= 256
    assert (longest > 64) == alphabet.isalpha()  # digits and signs end a word by themselves


def test_ctrl_c_stops_bpe_training_at_once(tmp_path: Path) -> None:
    script = """
import random, threading, _thread, time, tokenizers
from sbn_lightning.data.tokenizer import train_bpe
texts = ["".join(random.choices("ACGT", k=4_000_000))] * 3
threading.Timer(1.0, _thread.interrupt_main).start()
start = time.monotonic()
try:
    train_bpe(texts, 8000)
except KeyboardInterrupt:
    print(time.monotonic() - start)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout, done.stderr  # the time until the signal was obeyed; uninterrupted training takes minutes
