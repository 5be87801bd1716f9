"""Write the lines that ``prepare`` prints when it is done: counts, and the names of what was left out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sbn_lightning.data.tokenization.tally import NAMED


def summary(meta: dict[str, Any]) -> str:
    """Return the lines that describe a prepared folder.

    Args:
        meta: The contents of its ``meta.json``.
    """
    counts = [f"{c['tokens']:,} {s} tokens in {c['documents']:,} documents" for s, c in meta["splits"].items()]
    lines = [f"{', '.join(counts)}; vocabulary {meta['vocab_size']}"]
    if replaced := meta["replaced"]:
        lines.append(
            f"{replaced:,} {_plural(replaced, 'piece was', 'pieces were')} not valid Unicode and became U+FFFD"
        )
    # Version 0.1.0 wrote the names of files without reasons.
    files = meta["skipped"] if isinstance(meta["skipped"], dict) else dict.fromkeys(meta["skipped"], "was left out")
    if files:
        named = (f"{name} {reason}" for name, reason in files.items())
        lines.append(_list(len(files), "file", named))
    if records := meta.get("skipped_records"):
        lines.append(_list(records["count"], "record", records["named"]))
    return "\n  ".join(lines)


def skipped_records(tallies: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Add up what the segments left out.

    Args:
        tallies: The :meth:`~sbn_lightning.data.tokenization.tally.Tally.to_json` of each segment, in order.

    Returns:
        The number of records and the names of the first ones; None if no record was left out.
    """
    count, named = 0, []
    for tally in tallies:
        count += tally["skipped"]
        named += tally["named"]
    return {"count": count, "named": named[:NAMED]} if count else None


def _list(count: int, what: str, named: Iterable[str]) -> str:
    shown = [name for _, name in zip(range(NAMED), named, strict=False)]
    more = f"; and {count - len(shown):,} more" if count > len(shown) else ""
    return f"{count:,} {_plural(count, what, what + 's')} left out: {'; '.join(shown)}{more}"


def _plural(count: int, one: str, many: str) -> str:
    return one if count == 1 else many
