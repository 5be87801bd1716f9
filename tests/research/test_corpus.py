"""The corpus holds each text once, and does not depend on where the files are."""

import json
import shutil

import pytest

from research.reproduce.corpus import interpreter_folders, reproduce_corpus
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data.shards import read_meta

SOURCES = {f"module_{i}.py": f"def function_{i}(x):\n    return [x, {i}]\n" * 20 for i in range(40)}
OPTIONS = {"vocab_size": 300, "val_fraction": 0.2, "probe_fraction": 0.2, "num_workers": 1}


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources/package"
    folder.mkdir(parents=True)
    for name, text in SOURCES.items():
        (folder / name).write_text(text)
    return tmp_path / "sources"


def documents(output):
    """The texts for training, for validation and for the probe."""
    files = [output / "text" / name for name in ("documents.jsonl", "probe.jsonl")]
    return [[json.loads(line)["text"] for line in file.read_text().splitlines()] for file in files]


def test_each_text_once_in_one_split(sources, tmp_path):
    shutil.copytree(sources / "package", sources / "vendored/package")
    (sources / "spaced.py").write_text(SOURCES["module_0.py"].replace("    ", "\t"))
    (sources / "empty.py").write_text(" \n")
    (sources / "latin.py").write_bytes(b"# \xe9\n")
    (sources / "table.py").write_text("x = 1\n" * 1000)
    (sources / "notes.txt").write_text("not code")
    (sources / "__pycache__").mkdir()
    (sources / "__pycache__/cached.py").write_text("cached = 1")
    made = reproduce_corpus(str(sources), str(tmp_path / "out"), max_file_bytes=5000, **OPTIONS)
    assert {key: made[key] for key in ("files", "left_out", "duplicates", "same_but_for_white_space")} == {
        "files": 84,
        "left_out": 3,
        "duplicates": 40,
        "same_but_for_white_space": 1,
    }
    rest, probe = documents(tmp_path / "out")
    assert {"".join(text.split()) for text in rest + probe} == {"".join(text.split()) for text in SOURCES.values()}
    assert len(rest + probe) == 40
    tokens = read_meta(tmp_path / "out/tokens")["splits"]
    assert tokens["train"]["documents"] + tokens["val"]["documents"] == len(rest)
    assert min(tokens["val"]["documents"], tokens["train"]["documents"], len(probe)) > 0
    probe_tokens = read_meta(tmp_path / "out/probe")["splits"]
    assert list(probe_tokens) == ["train"]
    assert probe_tokens["train"]["documents"] == len(probe)


def test_it_depends_on_the_texts_alone(sources, tmp_path):
    spaced = SOURCES["module_0.py"].replace("    ", "\t")
    (sources / "a.py").write_text(spaced)
    first = reproduce_corpus(str(sources), str(tmp_path / "a"), **OPTIONS)
    elsewhere = tmp_path / "elsewhere"
    for index, (name, text) in enumerate(reversed(SOURCES.items())):
        (elsewhere / str(index % 3)).mkdir(parents=True, exist_ok=True)
        (elsewhere / str(index % 3) / f"other_{name}").write_text(text)
    (elsewhere / "2/z.py").write_text(spaced)
    roots = [str(elsewhere / str(i)) for i in range(3)]
    assert reproduce_corpus([*roots, str(elsewhere)], str(tmp_path / "b"), **OPTIONS)["tokens"] == first["tokens"]
    for name in ("text/documents.jsonl", "text/probe.jsonl", "tokens/tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_part_of_it(sources, tmp_path):
    whole = reproduce_corpus(str(sources), str(tmp_path / "whole"), **OPTIONS)
    part = reproduce_corpus(str(sources), str(tmp_path / "part"), max_bytes="12kB", **OPTIONS)
    (rest, probe), (all_rest, all_probe) = documents(tmp_path / "part"), documents(tmp_path / "whole")
    texts = rest + probe
    assert set(texts) < set(all_rest + all_probe)
    assert 12_000 <= sum(map(len, texts)) < 13_000
    assert sum(part["tokens"].values()) < sum(whole["tokens"].values())


def test_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"no \.py file in"):
        reproduce_corpus(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        reproduce_corpus("nowhere", str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="must lie between 0 and 1"):
        reproduce_corpus(str(tmp_path), str(tmp_path / "out"), probe_fraction=0)


def test_the_interpreter_has_sources():
    folders = interpreter_folders()
    assert len(set(folders)) == len(folders) >= 2
