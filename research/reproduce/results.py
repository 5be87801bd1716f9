"""``results.jsonl``: one line for each finished run. A run is done when its line is in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sbn_lightning.core.errors import DataError
from sbn_lightning.core.files import sync, write_text

FILE = "results.jsonl"


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return all lines, or none if there is no file. A last line that a crash cut short does not count.

    Raises:
        DataError: If another line is damaged.
    """
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    results = []
    for number, line in enumerate(lines, 1):
        try:
            results.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"{path}, line {number} is damaged: {error}; delete the line, the same command brings it back"
            ) from error
    return results


def append_result(path: Path, result: dict[str, Any]) -> None:
    """Add a line. After a crash the whole line is there, or nothing of it counts."""
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):  # A crash cut the last line short.
            write_text(path, text[: text.rfind("\n") + 1])
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(result, allow_nan=False) + "\n")
    sync(path)
