"""Token ids to text, piece by piece.

A character can be spread over tokens, and what a token decodes to can depend on the one before it (a tokenizer may
drop the space in front of the first word). So a piece is what the text grew by when a few tokens are decoded together,
and an unfinished character at the end is held back. The pieces together are the text that decoding
everything at once gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What bytes that are no character decode to: one for all bytes of an unfinished one, or, where a vocabulary has single
# bytes for what it does not know, one for each of the byte tokens in a row, characters among them included.
_REPLACEMENT = "\ufffd"


class TextStream:
    """Turns a stream of token ids into a stream of text.

    Args:
        tokenizer: What made the ids. Special tokens are left out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # decoded from here: tokens printed already, as context, and those that come after
        self._printed = 0  # characters of that which were returned
        self._ids_printed = 0

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is certain now, which may be none."""
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
        """What was held back; no more tokens come."""
        piece = self._decode(self._start, len(self._ids))[self._printed :]
        self._printed += len(piece)
        return piece

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end])
