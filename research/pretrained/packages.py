"""The text files inside wheels and source distributions, so that a corpus needs packages but no installation.

Nothing of a package is run. Only members with the wanted endings are read, and only up to a number of bytes for each
package, so that no package is most of the corpus.
"""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

from sbn_lightning.data.tokenization.sources import share

ZIPPED, TARRED = (".whl", ".zip"), (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# The files of a package that say its licence.
METADATA = ("METADATA", "PKG-INFO")
# Text files that a tool wrote, with nothing to read in them.
LISTS = ("top_level.txt", "entry_points.txt", "SOURCES.txt", "dependency_links.txt", "requires.txt", "CMakeLists.txt")
# The largest member to read. Larger text files are mostly tables.
MOST_MEMBER_BYTES = 1_000_000


def unpack(archives: Sequence[Path], output: Path, suffixes: tuple[str, ...], most_bytes: int | None) -> Counter[str]:
    """Write the text files of packages below a folder, each package in a folder of its own.

    Args:
        archives: Wheels and source distributions.
        output: The folder to write to. A package whose folder is there is not read again.
        suffixes: The endings of the files to take.
        most_bytes: About how much text of a package to take, as a choice that depends on the names alone; None for all.

    Returns:
        How many packages have which licence.
    """
    licences: Counter[str] = Counter()
    for archive in sorted(archives):
        folder = output / archive.name
        with _members(archive) as members:
            licences[_licence(members)] += 1
            if folder.is_dir():
                continue
            left = float("inf") if most_bytes is None else most_bytes
            # A call that is interrupted leaves no folder that looks whole.
            part = output / f".{archive.name}"
            shutil.rmtree(part, ignore_errors=True)
            chosen = [name for name in members if name.endswith(suffixes) and PurePosixPath(name).name not in LISTS]
            for number, name in enumerate(sorted(chosen, key=share)):
                if left <= 0:
                    break
                data = members[name]
                left -= len(data)
                part.mkdir(parents=True, exist_ok=True)
                # The folders inside the archive are left out: their names could lead to other places.
                (part / f"{number:06}{PurePosixPath(name).suffix}").write_bytes(data)
            if part.is_dir():
                part.replace(folder)
    return licences


class _Members:
    """The regular files of an archive that are not too large, by name; read when asked for."""

    def __init__(self, archive: zipfile.ZipFile | tarfile.TarFile) -> None:
        self.archive = archive
        if isinstance(archive, zipfile.ZipFile):
            self.names = [one.filename for one in archive.infolist() if one.file_size <= MOST_MEMBER_BYTES]
        else:
            self.names = [one.name for one in archive.getmembers() if one.isfile() and one.size <= MOST_MEMBER_BYTES]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> bytes:
        if isinstance(self.archive, zipfile.ZipFile):
            return self.archive.read(name)
        stream = self.archive.extractfile(name)
        assert stream is not None
        return stream.read()


@contextmanager
def _members(archive: Path) -> Iterator[_Members]:
    if archive.name.endswith(ZIPPED):
        with zipfile.ZipFile(archive) as opened:
            yield _Members(opened)
    else:
        with tarfile.open(archive) as opened_tar:
            yield _Members(opened_tar)


def find_archives(folder: Path) -> list[Path]:
    """Return the wheels and source distributions in a folder."""
    return sorted(path for path in folder.iterdir() if path.name.endswith((*ZIPPED, *TARRED)))


def _licence(members: _Members) -> str:
    found = [name for name in members if PurePosixPath(name).name in METADATA]
    if not found:
        return "unknown"
    shortest = min(found, key=len)  # A package may carry the metadata of others.
    return licence_name(HeaderParser().parsestr(members[shortest].decode("utf-8", "replace")))


def licence_name(about: object) -> str:
    """Return the licence that the metadata of a package name.

    Args:
        about: The metadata: an :class:`email.message.Message`, or what :mod:`importlib.metadata` returns.
    """
    get, get_all = about.get, about.get_all  # type: ignore[attr-defined]
    classifiers = [text.rpartition(" :: ")[2] for text in get_all("Classifier", []) if "License" in text]
    name = get("License-Expression") or (classifiers[0] if classifiers else get("License")) or "unknown"
    return " ".join(name.split())[:60]
