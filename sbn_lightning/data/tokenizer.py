"""The three tokenizers of ``prepare``, all in the Hugging Face ``tokenizer.json`` format.

* ``byte``: one token for each byte (ids 0 to 255) and one end-of-document token. It needs no training and knows every
  character. The file describes a byte-level BPE without merges, so every reader of ``tokenizer.json`` understands it.
* ``bpe``: a byte-level BPE trained on a sample of the training split. It falls back to bytes, so it loses nothing.
* the path of any other ``tokenizer.json``.

The byte tokenizer encodes without the library, because a byte is its own id. This is some hundred times faster and
gives the same ids; a test compares the two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from sbn_lightning.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOS_TOKEN = "<|endoftext|>"
# No word of ordinary text is as long, so the tokenizer of ordinary text does not depend on this number.
_LONGEST_WORD = 256
# The tokens tried, in this order, when a tokenizer does not say which token ends a document.
_KNOWN_EOS = (EOS_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]")


def bytes_to_unicode() -> list[str]:
    """Return the printable character that stands for each byte in byte-level vocabularies, indexed by byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    stand_in = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(stand_in)) for byte in range(256)]


def byte_tokenizer() -> Tokenizer:
    """Build the byte tokenizer: ids 0 to 255 are the bytes, 256 ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {char: byte for byte, char in enumerate(bytes_to_unicode())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS_TOKEN])
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE.

    The time grows linearly with the text. The library's own time grows with the square of a word's length. A text
    without spaces (DNA, base64, Chinese) is one word, so words are cut at :data:`_LONGEST_WORD` bytes for training.
    A terminal shows a progress bar. Ctrl-C stops at once, because the library trains in a thread of its own.

    Args:
        texts: The sample to learn the merges from.
        vocab_size: How many entries to make, the 256 bytes and the end-of-document token included. A small sample may
            give fewer.

    Raises:
        ConfigError: ``vocab_size`` leaves no room for the bytes and the end-of-document token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ConfigError(f"vocab_size {vocab_size} is below 257 (256 bytes + {EOS_TOKEN}); use tokenizer 'byte'")
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bounded = pre_tokenizers.Split(Regex(f".{{1,{_LONGEST_WORD}}}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bounded])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=bytes_to_unicode(),
        show_progress=sys.stderr.isatty(),
    )
    _run_interruptibly(lambda: tokenizer.train_from_iterator(texts, trainer))
    tokenizer.pre_tokenizer = words
    return tokenizer


def _run_interruptibly(work: Callable[[], None]) -> None:
    """Run a long call of a compiled library so that Ctrl-C is obeyed while the call goes on."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # It is raised again in the caller's thread.
            failures.append(error)

    # A daemon: Python does not wait for it at exit.
    thread = Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failures:
        raise failures[0]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: A ``tokenizer.json``, or a folder written by ``prepare`` that holds one.

    Returns:
        A ``tokenizers.Tokenizer``: ``.encode(text).ids`` and ``.decode(ids)``.

    Raises:
        DataError: There is no such file, or the file is no tokenizer.
    """
    from tokenizers import Tokenizer

    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"no tokenizer at {file}; give a tokenizer.json, or a folder written by `prepare`")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises bare Exception for every malformed file.
        raise DataError(f"{file} is not a Hugging Face tokenizer.json: {str(error).splitlines()[0]}") from error


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """Return how many rows an embedding table needs: the highest id + 1, because a vocabulary may have holes."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    return int(max(vocab.values())) + 1


def find_eos(tokenizer: Tokenizer, eos_token: str | None) -> tuple[str, int]:
    """Return the end-of-document token of a tokenizer, as text and id.

    Raises:
        ConfigError: ``eos_token`` is not in the vocabulary, or none was given and none is known.
    """
    for token in (eos_token,) if eos_token else _KNOWN_EOS:
        token_id = tokenizer.token_to_id(token)
        if token_id is not None:
            return token, int(token_id)
    special = sorted(t.content for t in tokenizer.get_added_tokens_decoder().values())[:8]
    has = f"its special tokens are {', '.join(special)}" if special else "it has no special tokens"
    if eos_token:
        raise ConfigError(f"eos_token {eos_token!r} is not in the vocabulary; {has}")
    raise ConfigError(
        f"the tokenizer has no token that is known to end a document ({', '.join(_KNOWN_EOS)}); {has} (`prepare` takes "
        "--eos_token)"
    )


class Encoder:
    """Turn texts into token ids, many texts a call, in the narrowest dtype that holds the vocabulary.

    Args:
        tokenizer: The tokenizer.
        is_byte: Whether it is the byte tokenizer, whose ids are the bytes themselves.
    """

    def __init__(self, tokenizer: Tokenizer, is_byte: bool) -> None:
        self._tokenizer: Any = tokenizer
        self._is_byte = is_byte
        self.dtype = token_dtype(vocab_size_of(tokenizer))
        # A document that happens to contain the text of a special token does not end there.
        tokenizer.encode_special_tokens = True
        # Truncation and padding in a file from elsewhere are meant for model inputs. Here they would drop text.
        tokenizer.no_truncation()
        tokenizer.no_padding()

    def __call__(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        """Yield the ids of each text, in order."""
        if self._is_byte:
            for text in texts:
                yield np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(self.dtype)
            return
        for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
            yield np.array(encoding.ids, dtype=self.dtype)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return ``uint16`` if the vocabulary fits, and ``int32`` otherwise. Shards can hold these two dtypes."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
