"""Count what a process replaces and leaves out while it reads text."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import Any

NAMED = 3
# The name of the decoders' error handler. Only the newest tally of a process counts replacements, because a process
# fills one tally at a time.
ERRORS = "sbn_count_replacements"
_SURROGATE = re.compile("[\ud800-\udfff]")


class Tally:
    """Decode text, and count what is not valid in it.

    Attributes:
        replaced: How many pieces became U+FFFD: byte sequences that are not UTF-8, and halves of surrogate pairs, which
            a JSON file can hold as an escape.
        skipped: How many records were left out.
        named: The first :data:`NAMED` records that were left out, each with its place and the reason.
    """

    def __init__(self) -> None:
        self.replaced = 0
        self.skipped = 0
        self.named: list[str] = []
        codecs.register_error(ERRORS, self._replace)

    def _replace(self, error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        self.replaced += 1
        return "\ufffd", error.end

    def decode(self, data: bytes) -> str:
        """Decode a whole piece of UTF-8."""
        return data.decode("utf-8", ERRORS)

    def decoder(self) -> codecs.IncrementalDecoder:
        """Return a decoder for a stream of UTF-8 that comes in blocks."""
        return codecs.getincrementaldecoder("utf-8")(ERRORS)

    def mend(self, text: str) -> str:
        """Replace halves of surrogate pairs in a text that a parser made. UTF-8 cannot encode such a half."""
        if text.isascii() or not _SURROGATE.search(text):
            return text
        text, count = _SURROGATE.subn("\ufffd", text)
        self.replaced += count
        return text

    def skip(self, where: Callable[[], str], reason: str) -> None:
        """Count a record that is left out.

        Args:
            where: A function that returns the place of the record. It is called only for records that get named,
                because finding a line's number means reading the file up to the line.
            reason: Why the record is left out.
        """
        self.skipped += 1
        if len(self.named) < NAMED:
            self.named.append(f"{where()} ({reason})")

    def to_json(self) -> dict[str, Any]:
        """Return the counts as plain types."""
        return {"replaced": self.replaced, "skipped": self.skipped, "named": self.named}
