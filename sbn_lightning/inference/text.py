"""Turn a stream of token ids into a stream of text.

A character can be spread over tokens, and what a token decodes to can depend on the token before it: a tokenizer may
drop the space in front of the first word. So a piece is what the text grew by when a few tokens are decoded together,
and an unfinished character at the end is held back. The pieces together are the text that decoding everything at once
gives. There is one exception: a tokenizer with byte fallback spoils a whole run of bytes if one of them is wrong, and
the stream has returned the characters before that byte already.

The ``DecodeStream`` of the ``tokenizers`` library would be shorter. It never returns the unfinished character at which
a text may stop, and with byte fallback it raises an error at a wrong byte (tokenizers 0.23).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Bytes that are no character decode to this sign: one sign for all bytes of an unfinished character. A tokenizer with
# byte fallback gives one sign for each byte token in a row, even if some of them are a character.
_REPLACEMENT = "\ufffd"


class TextStream:
    """Turn a stream of token ids into a stream of text.

    Args:
        tokenizer: The tokenizer that made the ids. Special tokens are left out of the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Start without any token."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # The first token that is decoded. Some tokens that were returned already are the context of the next ones.
        self._start = 0
        self._printed = 0  # How many characters of the text from self._start on were returned.
        self._ids_printed = 0  # How many tokens have had their whole text returned.

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now, which may be none."""
        self._ids.append(token)
        text = self._decode(self._start, len(self._ids))
        end = max(len(text.rstrip(_REPLACEMENT)), self._printed)
        piece = text[self._printed : end]
        self._printed = end
        if not text.endswith(_REPLACEMENT):
            self._start, self._ids_printed = self._ids_printed, len(self._ids)
            self._printed = len(self._decode(self._start, self._ids_printed))
        return piece

    def finish(self) -> str:
        """Return what was held back; no more tokens come."""
        piece = self._decode(self._start, len(self._ids))[self._printed :]
        self._printed += len(piece)
        return piece

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end])
