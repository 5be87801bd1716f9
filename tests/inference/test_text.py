import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sbn_lightning.data.tokenizer import byte_tokenizer, train_bpe
from sbn_lightning.inference import TextStream

BYTES = byte_tokenizer()


def pieces(tokenizer, ids):
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


def test_a_character_comes_when_its_last_byte_does():
    assert pieces(BYTES, "aé🙂z".encode()) == ["a", "", "é", "", "", "", "🙂", "z", ""]


def test_bytes_that_are_no_character_do_not_hold_up_the_rest():
    printed = pieces(BYTES, b"\xff\xfe\xf0\x9fab\xc3")
    assert "".join(printed) == BYTES.decode(list(b"\xff\xfe\xf0\x9fab\xc3"))
    assert printed[:4] == [""] * 4  # each byte could still belong to a longer character
    assert printed[-1] == "\ufffd"
    assert "a" in printed[4]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.one_of(st.integers(0, 256), st.sampled_from(list("é🙂".encode()))), max_size=40))
def test_pieces_of_any_bytes_add_up(ids):
    assert "".join(pieces(BYTES, ids)) == BYTES.decode(ids)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=60))
def test_pieces_of_any_text_add_up(text):
    tokenizer = train_bpe_once()
    assert "".join(pieces(tokenizer, tokenizer.encode(text).ids)) == text


_TRAINED = []


def train_bpe_once():
    if not _TRAINED:
        _TRAINED.append(train_bpe(["def f(x): return x  # naïve 🙂🙂", "for é in ёлка: pass"] * 20, 320))
    return _TRAINED[0]


@pytest.fixture
def with_spaces():
    """A tokenizer like that of Llama: a word carries the space before it, and the first space is dropped."""
    words = {"▁hello": 0, "▁world": 1, "!": 2, "▁": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def test_spaces_between_words_stay(with_spaces):
    assert pieces(with_spaces, [0, 1, 2, 1]) == ["hello", " world", "!", " world", ""]


@pytest.fixture
def with_byte_fallback():
    """A tokenizer like that of Llama 2: bytes stand for characters without a token, and are decoded together."""
    words = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257}
    tokenizer = Tokenizer(models.BPE(words, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def test_characters_from_single_bytes(with_byte_fallback):
    smile = list("🙂".encode())
    assert pieces(with_byte_fallback, [256, 257, *smile, *smile, 257]) == ["", "a", *["", "", "", "🙂"] * 2, "a", ""]


def test_special_tokens_are_left_out():
    assert pieces(BYTES, [*b"ab", 256, *b"c"]) == ["a", "b", "", "c", ""]
