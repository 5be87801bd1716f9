"""Decide which text files are training data and which are validation data.

A hash decides. A text file goes to one side as a whole, by a hash of its relative path. A record goes to one side by a
hash of its file and its position. Text files then fill a side that would have no text otherwise: one of several files
moves there, and a single file is cut, so that its end becomes the validation text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sbn_lightning.data.tokenization.readers import read_part
from sbn_lightning.data.tokenization.sources import Part, cut, share, unpacked_size
from sbn_lightning.data.tokenization.tally import Tally


def assign_splits(parts: list[Part], options: dict[str, Any]) -> list[Part]:
    """Give every text file a side, so that each side has text if ``val_fraction`` is above zero.

    Args:
        parts: The parts of all inputs. Parts of records are returned as they are.
        options: The options of ``prepare``. Those that read records are used, and ``val_fraction``.

    Returns:
        The parts. A single text file may have become other parts than before.

    Raises:
        DataError: A file of records is damaged.
    """
    fraction = options["val_fraction"]
    files = sorted({part.name for part in parts if part.format == "text"}, key=share)
    val = {name for name in files if share(name) < fraction}
    if files and fraction > 0:
        lacking = {side for side, names in (("val", val), ("train", set(files) - val)) if not names}
        lacking -= _sides_of_records([part for part in parts if part.format != "text"], lacking, options)
        if lacking and len(files) == 1:
            return _cut_lone_file(parts, fraction)
        # Of several files one side has all, so at most the other side lacks text.
        if "val" in lacking:
            val = {files[0]}
        elif "train" in lacking:
            val = set(files[:-1])
    return [
        replace(part, split="val" if part.name in val else "train") if part.format == "text" else part for part in parts
    ]


def _sides_of_records(parts: Iterable[Part], wanted: Collection[str], options: dict[str, Any]) -> set[str]:
    """Return the sides that records with text fall into. Reading ends when all of the ``wanted`` sides are found."""
    found: set[str] = set()
    for part in parts:
        if found.issuperset(wanted):
            break
        for side, _, _ in read_part(part, options, Tally()):
            found.add(side)
            if found.issuperset(wanted):
                break
    return found


def _cut_lone_file(parts: list[Part], val_fraction: float) -> list[Part]:
    """Cut the only text file in two. The other parts keep their places."""
    own = [part for part in parts if part.format == "text"]
    packed = own[0].is_packed
    stop = unpacked_size(Path(own[0].path), own[0].stop) if packed else own[-1].stop
    border = stop - max(1, int(stop * val_fraction))
    step = stop if packed else max(part.size for part in own)
    head = replace(own[0], start=0, stop=border, split="train")
    tail = replace(own[0], start=border, stop=stop, split="val")
    at = parts.index(own[0])
    return [*parts[:at], *cut(head, step, closes=True), *cut(tail, step, closes=True), *parts[at + len(own) :]]
