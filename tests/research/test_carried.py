"""A corpus from packages: their text files, what repeats held-out text, and the files of token ids that are carried."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from research.pretrained import carried
from research.pretrained.corpus import read_corpus
from research.pretrained.packages import find_archives, unpack
from sbn_lightning.core.errors import DataError

EOS = 0


@pytest.fixture
def packages(tmp_path):
    folder = tmp_path / "packages"
    folder.mkdir()
    with zipfile.ZipFile(folder / "a-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a/one.py", "print(1)\n")
        wheel.writestr("a/two.py", "print(2)\n" * 9)
        wheel.writestr("a-1.dist-info/METADATA", "Name: a\nLicense-Expression: MIT\n\ntext")
        wheel.writestr("a-1.dist-info/top_level.txt", "a\n")
        wheel.writestr("../../outside.py", "print(3)\n")
    with tarfile.open(folder / "b-2.tar.gz", "w:gz") as source:
        for name, text in (
            ("b-2/PKG-INFO", "Name: b\nClassifier: License :: OSI Approved :: BSD License\n"),
            ("b-2/README.rst", "words\n"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            source.addfile(member, io.BytesIO(text.encode()))
    (folder / "notes.pdf").write_bytes(b"no package")
    return folder


def test_text_files_of_packages(packages, tmp_path):
    archives = find_archives(packages)
    assert [path.name for path in archives] == ["a-1-py3-none-any.whl", "b-2.tar.gz"]
    assert unpack(archives, tmp_path / "py", (".py",), None) == {"MIT": 1, "BSD License": 1}
    written = sorted(path.relative_to(tmp_path / "py") for path in (tmp_path / "py").rglob("*") if path.is_file())
    assert [str(path) for path in written] == [f"a-1-py3-none-any.whl/{i:06}.py" for i in range(3)]
    unpack(archives, tmp_path / "few", (".py",), 1)
    assert len(list((tmp_path / "few").rglob("*.py"))) == 1  # the first file passes the limit
    unpack(archives, tmp_path / "text", (".rst", ".txt"), None)
    assert [path.read_text() for path in (tmp_path / "text").rglob("*.*") if path.is_file()] == ["words\n"]


def test_token_ids_that_do_not_fit_are_refused():
    assert carried.as_tokens(np.array([0, 65535])).dtype == np.uint16
    with pytest.raises(DataError, match="65536 does not fit"):
        carried.as_tokens(np.array([1, 65536]))


def documents(*lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [np.append(generator.integers(1, 5000, length), EOS).astype(np.uint16) for length in lengths]


def test_documents_that_repeat_held_out_text_are_left_out(monkeypatch):
    monkeypatch.setattr(carried, "BLOCK", 64)  # runs lie across the borders of blocks
    first, second, third = documents(200, 300, 100)
    held = documents(500, seed=1)[0]
    nearly = held.copy()
    nearly[::90] += 1  # one token in 90 is another one
    licensed = np.concatenate((held[:40], second))  # 9 of 341 positions begin a run of the held-out text
    hashes = np.unique(carried.run_hashes(held))
    text = np.concatenate([first, held[100:400], [EOS], nearly, licensed, third]).astype(np.uint16)
    kept, count, tokens = carried.without_shared(text, hashes, EOS)
    assert kept.tolist() == np.concatenate([first, licensed, third]).tolist()
    assert (count, tokens) == (2, 301 + 501)


def test_a_packed_corpus_is_read_again(tmp_path):
    held = {kind: documents(400, seed=seed)[0] for kind, seed in zip(carried.KINDS, (1, 2), strict=True)}
    for kind, tokens in held.items():
        carried.write_tokens(tmp_path / f"held_out_{kind}.u16.xz", tokens)
    train = {kind: np.concatenate([*documents(60, 70, 80, seed=seed), held[kind]]) for kind, seed in
             zip(carried.KINDS, (3, 4), strict=True)}  # fmt: skip
    carried.pack(train, tmp_path, EOS, parts=2, most_bytes=10**6)
    text, held_out = read_corpus(str(tmp_path), torch.device("cpu"), 50)
    assert {kind: part.tolist() for kind, part in held_out.items()} == {k: v[:50].tolist() for k, v in held.items()}
    wanted = sorted(document.tolist() for seed in (3, 4) for document in documents(60, 70, 80, seed=seed))
    found = np.split(text.numpy(), np.flatnonzero(text.numpy() == EOS)[:-1] + 1)
    assert sorted(document.tolist() for document in found) == wanted
    assert len(list(tmp_path.glob("train_*.u16.xz"))) == 2
    carried.pack(train, tmp_path, EOS, parts=2, most_bytes=420)  # three documents of about 430 bytes do not fit
    assert len(read_corpus(str(tmp_path), torch.device("cpu"), 50)[0]) < len(text)


def test_the_beginning_of_a_text_ends_with_a_document():
    text = np.concatenate(documents(4, 3, 5))  # documents end after 5, 9 and 15 tokens
    assert len(carried.beginning(text, 6, EOS)) == 9
    assert len(carried.beginning(text, 9, EOS)) == 9
    assert len(carried.beginning(text, 10, EOS)) == 15
    assert carried.beginning(text, 99, EOS) is text
