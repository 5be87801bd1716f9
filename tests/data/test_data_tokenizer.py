"""Text that a tokenizer encodes and decodes comes back unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.data import load_tokenizer
from sbn_lightning.data.tokenization.readers import read_part
from sbn_lightning.data.tokenization.sources import Part, cut
from sbn_lightning.data.tokenization.tally import Tally
from sbn_lightning.data.tokenizer import (
    Encoder,
    byte_tokenizer,
    bytes_to_unicode,
    token_dtype,
    train_bpe,
    vocab_size_of,
)

BYTES = byte_tokenizer()
TRAINING = ["def function(argument): return argument\n" * 20, "naïve θ"]
BPE = train_bpe(TRAINING, 280)


@given(st.text())
def test_bytes_are_exact(text: str) -> None:
    (ids,) = Encoder(BYTES, True)([text])
    assert ids.astype(np.uint8).tobytes() == text.encode("utf-8")
    assert BYTES.decode(ids.tolist(), skip_special_tokens=False) == text


@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"])), max_size=4))
def test_the_byte_shortcut_is_what_the_library_does(texts: list[str]) -> None:
    for fast, slow in zip(Encoder(BYTES, True)(texts), Encoder(BYTES, False)(texts), strict=True):
        assert fast.tolist() == slow.tolist()
        assert fast.dtype == slow.dtype == np.uint16


@given(st.text())
def test_bpe_is_lossless(text: str) -> None:
    (ids,) = Encoder(BPE, False)([text])
    assert BPE.decode(ids.tolist(), skip_special_tokens=False) == text


def test_bpe_is_the_same_every_time() -> None:
    assert train_bpe(TRAINING, 280).to_str() == BPE.to_str()
    assert len(set(bytes_to_unicode())) == 256
    assert vocab_size_of(BPE) == 280


def test_dtypes() -> None:
    assert token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.int32


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json is not a Hugging Face tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="below 257"):
        train_bpe([], 5)


LINES = st.lists(st.text(st.characters(blacklist_categories=["Cs"]), max_size=12), max_size=12).map("\n".join)


@settings(max_examples=60)
@given(text=LINES, segment=st.integers(1, 40))
def test_a_file_cut_anywhere_reads_whole(tmp_path_factory: pytest.TempPathFactory, text: str, segment: int) -> None:
    file = tmp_path_factory.getbasetemp() / "cut.txt"
    file.write_bytes(text.encode())
    size = file.stat().st_size
    whole = Part(str(file), "cut.txt", "text", 0, size, size, split="train")
    pieces = [p for part in cut(whole, segment, True) for p in read_part(part, {}, Tally())]
    assert "".join(piece for _, piece, _ in pieces) == text.removeprefix("\ufeff")
    assert [ends for _, _, ends in pieces].count(True) == (1 if text else 0)
    assert not pieces or pieces[-1][2]
