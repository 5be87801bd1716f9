"""``prepare``: what it reads and writes, how it fails, and that no failure leaves half a result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.data import load_tokenizer, prepare
from sbn_lightning.data.tokenization.find import find_files
from sbn_lightning.data.tokenization.options import parse_bytes
from sbn_lightning.data.tokenization.sources import share
from tests.data.helpers import contents, prepare_small, write_corpus


def tokens(folder: Path, split: str) -> np.ndarray:
    """All tokens of a split. litdata itself reads them back, one token at a time."""
    from sbn_lightning.data.stream.loader import open_split

    dataset = open_split(str(folder / split), 1, shuffle=False, drop_last=False, seed=0)
    return np.concatenate([np.asarray(dataset[i]) for i in range(len(dataset))])


def documents(folder: Path, split: str) -> list[str]:
    meta = json.loads((folder / "meta.json").read_text())
    ids = tokens(folder, split)
    ends = np.flatnonzero(ids == meta["eos_id"])
    assert ids[-1] == meta["eos_id"]
    assert len(ends) == meta["splits"][split]["documents"]
    assert len(ids) == meta["splits"][split]["tokens"]
    tokenizer = load_tokenizer(folder)
    texts = [tokenizer.decode(part[part != meta["eos_id"]].tolist()) for part in np.split(ids, ends + 1)[:-1]]
    assert sum(len(text.encode()) for text in texts) == meta["splits"][split]["bytes"]
    return texts


def both(folder: Path) -> list[str]:
    return sorted(documents(folder, "train") + documents(folder, "val"))


@pytest.mark.parametrize("options", [{}, {"tokenizer": "bpe", "vocab_size": 300}])
def test_text_files_come_back_whole_and_each_on_one_side(corpus: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    meta = prepare_small(corpus, tmp_path / "out", **options)
    texts = {file.relative_to(corpus).as_posix(): file.read_text("utf-8") for file in corpus.rglob("*.txt")}
    assert both(tmp_path / "out") == sorted(texts.values())
    assert documents(tmp_path / "out", "val") == [texts[name] for name in sorted(texts) if share(name) < 0.2]
    assert meta["vocab_size"] == options.get("vocab_size", 257)
    assert meta["dtype"] == "uint16"
    assert len([n for n in meta["files"] if n.startswith("train/chunk")]) > 1


RECORDS = [f"document {i}\n" + "words and words " * (i % 7) for i in range(60)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf", "hf_dict", "hf_json"])
def test_records_come_back_whole(tmp_path: Path, kind: str) -> None:
    source, options = tmp_path / f"in.{kind}", {"text_key": "body"}
    if kind == "jsonl":
        lines = [json.dumps({"body": text, "n": 1}, ensure_ascii=False) for text in RECORDS]
        source.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"n": list(range(60)), "body": RECORDS})
        pq.write_table(table, source, row_group_size=7)
    else:
        import datasets

        dataset = datasets.Dataset.from_dict({"body": RECORDS})
        if kind == "hf":
            dataset.save_to_disk(str(source))
        elif kind == "hf_dict":
            datasets.DatasetDict({"other": dataset}).save_to_disk(str(source))
            options["split"] = "other"
        else:
            source.mkdir()
            dataset.to_json(str(source / "data.jsonl"))
    name = f"hf:{source}" if kind.startswith("hf") else str(source)
    for segment_bytes in (400, 10**6):
        out = tmp_path / f"out{segment_bytes}"
        prepare(name, str(out), "byte", val_fraction=0.3, segment_bytes=segment_bytes, num_workers=1, **options)
        assert both(out) == sorted(RECORDS)
        assert documents(out, "val")
    assert contents(tmp_path / "out400" / "train") == contents(out / "train")


@pytest.mark.parametrize("newline", ["\n", "\r\n", ""])
def test_a_lone_text_file_validates_on_its_tail(tmp_path: Path, newline: str) -> None:
    source = tmp_path / "in.txt"
    source.write_bytes(newline.join(f"line {i} é" for i in range(2000)).encode())
    if not newline:
        with pytest.raises(DataError, match="no text fell into val"):
            prepare(str(source), str(tmp_path / "out"), "byte", segment_bytes=300, num_workers=1)
        prepare(str(source), str(tmp_path / "all"), "byte", val_fraction=0, segment_bytes=300, num_workers=1)
        assert documents(tmp_path / "all", "train") == [source.read_bytes().decode()]
        return
    prepare(str(source), str(tmp_path / "out"), "byte", val_fraction=0.1, segment_bytes=300, num_workers=1)
    (train,), (val,) = (documents(tmp_path / "out", s) for s in ("train", "val"))
    assert (train + val).encode() == source.read_bytes()
    assert 0.05 < len(val) / len(train) < 0.15


def test_large_vocabularies_and_foreign_tokenizers(corpus: Path, tmp_path: Path) -> None:
    tokenizer = json.loads(load_tokenizer_of_bytes().to_str())
    tokenizer["added_tokens"][0]["content"] = "<stop>"
    tokenizer["added_tokens"][0]["id"] = 70000
    vocab = {k: v for k, v in tokenizer["model"]["vocab"].items() if k != "<|endoftext|>"}
    tokenizer["model"]["vocab"] = {**vocab, "<stop>": 70000}
    file = tmp_path / "foreign.json"
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"special tokens are <stop> .*--eos_token"):
        prepare_small(corpus, tmp_path / "out", tokenizer=str(file))
    meta = prepare_small(corpus, tmp_path / "out", tokenizer=str(file), eos_token="<stop>")
    assert (meta["vocab_size"], meta["eos_id"], meta["dtype"]) == (70001, 70000, "int32")
    assert both(tmp_path / "out") == sorted(f.read_text("utf-8") for f in corpus.rglob("*.txt"))


def load_tokenizer_of_bytes() -> Any:
    from sbn_lightning.data.tokenizer import byte_tokenizer

    return byte_tokenizer()


def test_the_number_of_processes_leaves_no_trace(corpus: Path, tmp_path: Path) -> None:
    options = {"tokenizer": "bpe", "vocab_size": 280, "bpe_sample_bytes": 3000}
    for workers in (1, 3):
        prepare_small(corpus, tmp_path / f"out{workers}", num_workers=workers, **options)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")


SCRIPT = """
import sys
from sbn_lightning.data import prepare
if __name__ == "__main__":
    prepare(sys.argv[1], sys.argv[2], "bpe", vocab_size=280, val_fraction=0.2, chunk_bytes=9000, segment_bytes=2000,
            num_workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize(("workers", "kill"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGINT)])
def test_killed_and_run_again_gives_the_same(tmp_path: Path, workers: int, kill: int) -> None:
    # Some hundred segments, because on a busy machine the signal may come many segments late.
    corpus = write_corpus(tmp_path / "large", size=20_000)
    command = [sys.executable, "-c", SCRIPT, str(corpus)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    out, work = tmp_path / "out", tmp_path / "out" / ".work"
    process = subprocess.Popen(
        [*command, str(out), str(workers)],
        env=environment,
        stderr=subprocess.DEVNULL,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # shells ignore SIGINT in background jobs
    )
    while process.poll() is None and not list(work.glob("0*.json")):
        time.sleep(0.001)
    process.send_signal(kill)
    assert process.wait() != 0, "it was over before it could be killed"
    assert not (out / "meta.json").exists()
    done = {file: file.stat().st_mtime_ns for file in work.glob("0*.json")}
    assert done
    watched: list[dict[Path, int]] = []
    original = Path.replace

    def spy(self: Path, target: Any) -> Path:
        if Path(target) == out / "meta.json":
            watched.append({file: file.stat().st_mtime_ns for file in done})
        return original(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", spy)
        options = {"vocab_size": 280, "val_fraction": 0.2, "chunk_bytes": 9000, "segment_bytes": 2000}
        prepare(str(corpus), str(out), "bpe", num_workers=1, **options)
        prepare(str(corpus), str(tmp_path / "straight"), "bpe", num_workers=1, **options)
    assert watched[0] == done, "segments that were done were done again"
    assert contents(out) == contents(tmp_path / "straight")
    assert not work.exists()


@pytest.mark.parametrize("when", ["tokenizer.json", "plan.json", "index.json", "train", "val", "meta.json"])
def test_dying_at_any_rename_leaves_nothing_that_looks_finished(
    corpus: Path, tmp_path: Path, prepared: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        pass

    original = Path.replace

    def replace(self: Path, target: Any) -> Path:
        if Path(target).name == when:
            raise Died
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(Died):
            prepare_small(corpus, tmp_path / "out")
    assert not (tmp_path / "out" / "meta.json").exists()
    prepare_small(corpus, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(prepared)


def test_finished_work_is_recognised_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, out = write_corpus(tmp_path / "in", files=5), tmp_path / "out"
    prepare_small(corpus, out)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.bin")}
    corpus = corpus.rename(tmp_path / "elsewhere")
    prepare_small(corpus, out, num_workers=2)
    assert "already prepared" in capsys.readouterr().err
    assert before == {file: file.stat().st_mtime_ns for file in out.rglob("*.bin")}
    with pytest.raises(ConfigError, match=r"--overwrite"):
        prepare_small(corpus, out, val_fraction=0.4)
    next(corpus.rglob("*.txt")).write_text("changed")
    with pytest.raises(ConfigError, match=r"--overwrite"):
        prepare_small(corpus, out)
    prepare_small(corpus, out, overwrite=True)
    assert "changed" in both(out)


def test_unfinished_work_of_other_options_is_not_taken_up(
    corpus: Path, tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "out" / ".work"
    work.mkdir(parents=True)
    (work / "journal.json").write_text('{"fingerprint": "1-other"}')
    (work / "000000.json").write_text("{}")
    prepare_small(corpus, tmp_path / "out")
    assert "discarding unfinished work" in capsys.readouterr().err
    assert contents(tmp_path / "out") == contents(prepared)


def test_bad_bytes_are_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"good \xff bad \xc3")
    (tmp_path / "in" / "b.txt").write_text("fine \ufffd", encoding="utf-8")
    meta = prepare_small(tmp_path / "in", tmp_path / "out")
    assert meta["replaced"] == 2
    assert both(tmp_path / "out") == ["fine \ufffd", "good \ufffd bad \ufffd"]


def test_special_tokens_in_the_text_are_text(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.txt").write_text(f"one <|endoftext|> two {name}")
    for kind in ("byte", "bpe"):
        meta = prepare_small(tmp_path / "in", tmp_path / kind, tokenizer=kind)
        assert [meta["splits"][s]["documents"] for s in ("train", "val")] == [1, 1]
        assert both(tmp_path / kind) == ["one <|endoftext|> two a", "one <|endoftext|> two b"]


def test_max_bytes_and_the_standard_library(tmp_path: Path) -> None:
    meta = prepare("stdlib", str(tmp_path / "out"), "byte", max_bytes="40KB", num_workers=1)
    assert 40_000 <= sum(split["bytes"] for split in meta["splits"].values()) < 40_200
    names = [name for _, name in find_files(["stdlib"], "*", tmp_path)[0]]
    assert "ast.py" in names
    assert names == sorted(names)
    assert not [name for name in names if "site-packages" in name]


def test_a_full_disk_is_one_line_and_can_be_continued(
    corpus: Path, tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "000001.train.bin")

    with monkeypatch.context() as patch:
        patch.setattr("sbn_lightning.data.shards.write_shards", full)
        with pytest.raises(DataError, match=r"No space left on device: 000001.train.bin; mend that, then run"):
            prepare_small(corpus, tmp_path / "out")
    prepare_small(corpus, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(prepared)


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_records_name_file_and_line(tmp_path: Path, workers: int) -> None:
    good = '{"text": "a"}\n'
    out = str(tmp_path / "out")
    options: dict[str, Any] = {"tokenizer": "byte", "segment_bytes": 30, "num_workers": workers}
    broken = write(tmp_path / "broken.jsonl", good * 9 + '{"text": \n' + good)
    with pytest.raises(DataError, match=r"broken.jsonl line 10 is not JSON \(Expecting value at column \d+\); fix"):
        prepare(broken, out, **options)
    control = write(tmp_path / "control.jsonl", '{"text": "a\x01"}\n')
    with pytest.raises(DataError, match=r"line 1 is not JSON \(Invalid control character at column 12\); fix"):
        prepare(control, out, **options)
    lacking = write(tmp_path / "lacking.jsonl", '{"txt": "a", "id": 1}\n' * 5)
    with pytest.raises(DataError, match=r"lacking.jsonl has no text under 'text' \(it has: id, txt\); pass --text_key"):
        prepare(lacking, out, **options)
    with pytest.raises(DataError, match=r"list.jsonl has no text under 'text' \(it has: a list\)"):
        prepare(write(tmp_path / "list.jsonl", "[1]\n"), out, **options)


def test_errors_of_inputs_and_options(tmp_path: Path, corpus: Path) -> None:
    out = str(tmp_path / "out")
    empty, folder = write(tmp_path / "empty.txt", ""), tmp_path / "folder"
    folder.mkdir()
    few = write(tmp_path / "few.jsonl", '{"text": "a"}\n')
    (tmp_path / "mine" / "train").mkdir(parents=True)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"input": str(tmp_path / "nothing.txt")}, r"nothing.txt.* is no file, folder or glob"),
        ({"input": []}, r"input is empty"),
        ({"input": str(folder)}, r"no file in .*folder.* matches --pattern '\*'"),
        ({"input": str(corpus), "pattern": "*.md"}, r"matches --pattern '\*.md'"),
        ({"input": empty}, r"holds no text"),
        ({"input": few}, r"no text fell into (train|val) \(1 in all.*--val_fraction"),
        ({"input": write(tmp_path / "x.bin", b"\0\1")}, r"x.bin is not text: it has NUL bytes"),
        ({"input": write(tmp_path / "x.parquet", b"no")}, r"x.parquet is not a readable Parquet file"),
        ({"input": f"hf:{folder}"}, r"cannot load hf:"),
        ({"input": few, "tokenizer": "word"}, r"tokenizer 'word' is not 'byte', 'bpe' or the path"),
        ({"input": few, "tokenizer": few}, r"few.jsonl is not a Hugging Face tokenizer.json"),
        ({"input": few, "tokenizer": "bpe", "vocab_size": 100}, r"vocab_size 100 is below 257"),
        ({"input": few, "vocab_size": 1000}, r"vocab_size is for tokenizer 'bpe' only"),
        ({"input": few, "val_fraction": 1.0}, r"val_fraction 1.0 is not in"),
        ({"input": few, "num_workers": 0}, r"num_workers 0 is below 1"),
        ({"input": few, "chunk_bytes": "64 miles"}, r"chunk_bytes '64 miles' is not a size"),
        ({"input": few, "output": few}, r"output .*few.jsonl is a file"),
        ({"input": few, "output": str(tmp_path)}, r"holds files that `prepare` did not write"),
        ({"input": few, "output": str(tmp_path / "mine")}, r"did not write \(train, "),
    ]
    for options, message in cases:
        with pytest.raises((ConfigError, DataError), match=message) as caught:
            prepare(**{"output": out, "tokenizer": "byte", **options})
        assert "\n" not in str(caught.value)
    import datasets

    datasets.DatasetDict({"a": datasets.Dataset.from_dict({"t": ["x"]})}).save_to_disk(str(folder))
    with pytest.raises(ConfigError, match=r"no split 'train'; pass --split with one of \['a'\]"):
        prepare(f"hf:{folder}", out, "byte")
    with pytest.raises(ConfigError, match=r"no column 'text'; pass --text_key \['t'\]"):
        prepare(f"hf:{folder}", out, "byte", split="a")


@pytest.mark.parametrize(
    ("text", "size"), [("64MB", 64_000_000), ("2GiB", 2 << 30), (12, 12), ("1.5k", 1500), ("7 B", 7)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text, "x") == size


def test_the_signature_is_a_command_line(corpus: Path, tmp_path: Path) -> None:
    from jsonargparse import auto_cli

    first, second = sorted(corpus.rglob("*.txt"))[:2]
    arguments = ["--input", f"[{first}, {second}]", "--output", str(tmp_path / "out"), "--tokenizer", "byte"]
    meta = auto_cli(prepare, args=[*arguments, "--max_bytes", "2KB", "--chunk_bytes=4096"])
    assert meta["options"]["chunk_bytes"] == 4096
    assert len(meta["splits"]) == 2
