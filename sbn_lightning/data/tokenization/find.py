"""Find the input files: files, folders, globs and the standard library.

Folders are walked through links as well. A folder that several paths lead to is read once, under the first path in
alphabetical order, so a link to a folder above it does no harm. The output folder is never part of the input. Whatever
cannot be read is returned with the reason. Names that start with a dot are left out, as a shell's ``*`` does.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Iterator
from glob import glob
from pathlib import Path

from sbn_lightning.core.errors import ConfigError

# `site-packages` would make the corpus depend on what is installed. The test suite and IDLE stay in: they are two
# thirds of the text, ordinary Python, and there on most interpreters.
_STDLIB_SKIPS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}


def find_files(inputs: Iterable[str], pattern: str, output: Path) -> tuple[list[tuple[Path, str]], dict[str, str]]:
    """Expand files, folders, globs and ``stdlib``.

    Args:
        inputs: The inputs as the user gave them.
        pattern: The glob that the files of a folder must match.
        output: The output folder of ``prepare``; nothing in it is an input.

    Returns:
        The files as pairs of path and relative path, sorted by relative path; and what cannot be read, as a mapping
        from relative path to reason.

    Raises:
        ConfigError: An input does not exist, or a folder or glob holds no matching file.
    """
    found: dict[Path, str] = {}
    skipped: dict[str, str] = {}
    own = output.resolve()
    for index, text in enumerate(inputs):
        if text == "stdlib":
            hits = list(_walk(Path(sysconfig.get_path("stdlib")), "*.py", _STDLIB_SKIPS, own, skipped))
        elif Path(text).is_dir():
            hits = list(_walk(Path(text), pattern, set(), own, skipped))
        elif Path(text).is_file():
            hits = [(Path(text), Path(text).name)]
        else:
            hits = [(Path(p), Path(p).name) for p in sorted(glob(text, recursive=True)) if Path(p).is_file()]
            if not hits:
                raise ConfigError(
                    f"input {text!r} is no file, folder or glob with files in it; give text, JSON, JSONL, CSV, TSV or "
                    "Parquet files, a folder of them, 'stdlib', or 'hf:NAME' for a Hugging Face dataset"
                )
        outside = [(path, name) for path, name in hits if own not in path.resolve().parents]
        if hits and not outside:
            raise ConfigError(f"input {text!r} is in the output folder {output}; give another --input or --output")
        hits = outside
        if not hits:
            reasons = "".join(f"; {name} {reason}" for name, reason in list(skipped.items())[:1])
            raise ConfigError(
                f"no file in {text!r} matches --pattern {pattern!r}{reasons}; change --pattern or the folder"
            )
        taken = set(found.values())
        for path, name in hits:
            # Two inputs may hold different files with the same relative path. A file that is found twice is read once.
            found.setdefault(path.resolve(), f"{index}/{name}" if name in taken else name)
    return sorted(((path, name) for path, name in found.items()), key=lambda hit: hit[1]), skipped


def _walk(
    root: Path, pattern: str, skips: set[str], output: Path, skipped: dict[str, str]
) -> Iterator[tuple[Path, str]]:
    """Yield the files below ``root`` that match ``pattern``; note in ``skipped`` what cannot be read."""
    seen = {(output_stat.st_dev, output_stat.st_ino) for output_stat in [output.stat()]} if output.is_dir() else set()

    def note(error: OSError) -> None:
        skipped[_below(root, Path(error.filename))] = f"cannot be read: {error.strerror}"

    for folder, names, files in os.walk(root, followlinks=True, onerror=note):
        try:
            status = os.stat(folder)
        except OSError as error:
            note(error)
            names.clear()
            continue
        if (status.st_dev, status.st_ino) in seen:
            names.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        names[:] = sorted(name for name in names if name not in skips and not name.startswith("."))
        for file in files:
            path = Path(folder, file)
            if file.startswith(".") or not path.match(pattern):
                continue
            try:
                if path.is_file():
                    yield path, _below(root, path)
                else:
                    what = "is not a regular file" if path.exists() else "is a link to a file that does not exist"
                    skipped[_below(root, path)] = what
            except OSError as error:
                note(error)


def _below(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()
