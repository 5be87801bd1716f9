"""What processes share that do trials in one folder: lines of results, and who does which trial."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from research.reproduce.results import read_results
from sbn_lightning.core.errors import ConfigError

__all__ = ["append_row", "claim", "read_all_rows", "read_rows"]

read_rows = read_results


def read_all_rows(files: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Return the rows of several files, for a report.

    Args:
        files: The files, in the order of their rows.

    Raises:
        ConfigError: If a file is not there or has no rows. A page of empty tables would replace one with figures.
    """
    rows = []
    for file in files:
        found = read_rows(Path(file))
        if not found:
            raise ConfigError(f"{file} holds no results; `work` writes them")
        rows += found
    return rows


def append_row(file: Path, row: dict[str, Any]) -> None:
    """Add a line to a file that several processes write to.

    Args:
        file: The file. It is made if it is not there.
        row: The values of the line.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # One call of the operating system, so that lines of several processes do not mix.
    place = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(place, (json.dumps(row) + "\n").encode())
    finally:
        os.close(place)


@contextmanager
def claim(file: Path) -> Iterator[bool]:
    """Hold a trial for this process, and yield whether that worked. The operating system releases it with the process.

    Args:
        file: The file of the trial's lock.
    """
    from filelock import FileLock, Timeout

    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(str(file), timeout=0):
            yield True
    except Timeout:
        yield False
