"""Errors of the command line in one line, with the option that was probably meant."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any

from jsonargparse import ArgumentParser

from sbn_lightning.errors import ConfigError

# Endings of NMPattern's own messages: among the attempts that a union of types lists, theirs says what is wrong.
_PATTERN_MESSAGE = re.compile(r"pattern[: ][^\n]*?(?:quote it, pattern: \"\S+\"|example \"6:8\"|N <= M <= \d+)")


class OneLineErrors(ArgumentParser):
    """Raises a one-line :class:`ConfigError` where jsonargparse would print its usage and every alternative."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        found = _PATTERN_MESSAGE.search(message)
        line = re.sub(r"\s+", " ", found[0] if found else message).strip()
        raise ConfigError(line + self._suggestion(line)) from ex

    def _suggestion(self, message: str) -> str:
        wrong = re.match(r"unrecognized arguments: --([\w.]+)", message) or re.search(
            r"accept option '(\w+[\w.]*)'", message
        )
        if wrong is None:
            return ""
        known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        close = get_close_matches(wrong[1], known, n=1)
        return f"; did you mean {close[0]}?" if close else ""
