"""Cut a text at the first of some stop strings while the text comes in pieces.

A stop string may begin in one piece and end in another. So the end of the text that could still become a stop string is
held back until more text decides. No part of a stop string that is found is ever returned.
"""

from __future__ import annotations

from collections.abc import Sequence

from sbn_lightning.core.errors import ConfigError


class StopStrings:
    """Cut a text at the first stop string.

    The stop string that ends first counts. Of several that end at the same character the longest counts. So the result
    does not depend on how the text is split into pieces.

    Args:
        stops: The stop strings; there may be none.

    Raises:
        ConfigError: If a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Start without any text."""
        if any(not stop for stop in stops):
            raise ConfigError("a stop string is empty: every text would end before it begins")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Add a piece of text; return the text that is certain now, which may be none.

        After a stop string was found, :attr:`found` is true and no more text comes.
        """
        if self.found:
            return ""
        text = self._held + piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        held = next((n for n in range(self._longest_start(len(text)), 0, -1) if self._may_begin(text[-n:])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back; no more text comes."""
        held, self._held = self._held, ""
        return held

    def _longest_start(self, length: int) -> int:
        return min(length, max(map(len, self._stops), default=1) - 1)

    def _may_begin(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)
