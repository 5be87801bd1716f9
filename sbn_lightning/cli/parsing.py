"""Report a wrong option in one line, with the option that the user probably meant."""

from __future__ import annotations

import inspect
import re
from difflib import get_close_matches
from pydoc import locate
from typing import Any

from jsonargparse import ArgumentParser

from sbn_lightning.core.errors import ConfigError

# Finds the message of NMPattern. jsonargparse lists one error for each type of a union, and only this one helps.
_PATTERN_MESSAGE = re.compile(r"pattern[: ][^\n]*?(?:quote it, pattern: \"\S+\"|example \"6:8\"|N <= M <= \d+)")
_UNION = "Does not validate against any of the Union subtypes"
# Matches the errors that only say that the value does not have one of the other types of a union.
_OTHER_TYPE = re.compile(
    rf"{_UNION}|Expected an? (<class|path|collections)|Not a valid subclass|a class path \(|a dict with"
    r"|Import path \S+ does not correspond to a subclass"
)


class OneLineErrors(ArgumentParser):
    """A parser that raises a one-line :class:`ConfigError`; jsonargparse would print its usage and all alternatives.

    The names of options are never cut short: ``--trainer.max_step`` is a misspelt key, as it is in a recipe.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        found = _PATTERN_MESSAGE.search(message)
        line = re.sub(r"\s+", " ", found[0] if found else what_is_wrong(message)).strip()
        hint = self._suggestion(line) or _suggestion_for_class(message) or _class_of_strategy(line)
        raise ConfigError(line + hint) from ex

    def _suggestion(self, message: str) -> str:
        wrong = re.match(r"unrecognized arguments: --([\w.]+)", message) or re.search(
            r"accept option '(\w+[\w.]*)'", message
        )
        known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        return close_to(wrong[1], known) if wrong else ""


def what_is_wrong(message: str) -> str:
    """Shorten a message of jsonargparse about a union of types.

    jsonargparse tries each type of the union and lists one error for each. Errors that only say that the value has
    another type are dropped.

    Args:
        message: The message of jsonargparse.

    Returns:
        The errors that remain, after the key they are about. The whole message, if it is not about a union or no error
        remains.
    """
    if _UNION not in message:
        return message
    attempts: list[str] = []
    for line in map(str.strip, message.splitlines()):
        if line.startswith("- "):
            attempts.append(line[2:])
        elif attempts and not re.match(r"Subtypes:|Errors:|Subclass types|Given value", line):
            attempts[-1] += f" {line}"
    told = dict.fromkeys(attempt for attempt in attempts if not _OTHER_TYPE.match(attempt))
    key = re.match(r'\s*Parser key "[^"]+":', message)
    return f"{key[0] + ' ' if key else ''}{'; '.join(told)}" if told else message


def _suggestion_for_class(message: str) -> str:
    """Suggest a name for an option that the class at a ``class_path`` does not have; empty if there is none."""
    wrong = re.search(r"Option '(\w+)' is not accepted", message)
    kinds = [locate(path) for path in set(re.findall(r"class_path'?[=:] ?'([\w.]+)'", message))] if wrong else []
    known = [name for kind in kinds if isinstance(kind, type) for name in inspect.signature(kind).parameters]
    return close_to(wrong[1], known) if wrong else ""


def _class_of_strategy(message: str) -> str:
    """Name the class of a strategy whose short name was given options; empty for another message.

    A short name takes no options. Options on the command line also need the class before them.
    """
    short = re.search(r'"trainer\.strategy": Expected a dot import path string: (\w+)', message)
    if short is None:
        return ""
    from lightning.pytorch.strategies import StrategyRegistry  # Only a training command comes here.

    ours = [name for name in StrategyRegistry.available_strategies() if name.startswith("sbn_")]
    kinds = [StrategyRegistry[name]["strategy"] for name in ([short[1]] if short[1] in ours else ours)]
    paths = " or ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    return f"; a name takes no options: give a class first, {paths}"


def close_to(wrong: str, known: list[str]) -> str:
    """Suggest the one of ``known`` that ``wrong`` is most like; empty if there is none."""
    close = get_close_matches(wrong, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
