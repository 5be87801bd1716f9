"""Hugging Face datasets, by name or from a local folder, as input of ``prepare``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data.tokenization.sources import Part, share

if TYPE_CHECKING:
    from datasets import Dataset


@lru_cache(maxsize=2)
def load_hf(name: str, subset: str | None, split: str) -> Dataset:
    """Open a dataset by its name on the hub, or from a local folder (saved with ``save_to_disk`` or loadable).

    Raises:
        ConfigError: The dataset cannot be opened, or has no such split.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("input 'hf:...' needs the package 'datasets': pip install datasets") from error

    folder = Path(name)
    try:
        if folder.is_dir() and ((folder / "state.json").exists() or (folder / "dataset_dict.json").exists()):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # The library's own errors, the hub's, the network's, the file system's.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"cannot load hf:{name} (subset {subset}, split {split}): {reason}") from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise ConfigError(f"hf:{name} has no split {split!r}; pass --split with one of {sorted(loaded)}")
        loaded = loaded[split]
    return loaded


def plan_hf(name: str, options: dict[str, Any], max_bytes: int | None, segment_bytes: int) -> list[Part]:
    """Cut a dataset into ranges of rows.

    Args:
        name: The name of the dataset, or its folder.
        options: The options of ``prepare``: ``subset``, ``split`` and ``text_key``.
        max_bytes: About how many bytes to read; None for all there are.
        segment_bytes: The largest part, in bytes.

    Raises:
        ConfigError: The dataset cannot be loaded, or has no such column.
    """
    dataset = load_hf(name, options["subset"], options["split"])
    if options["text_key"] not in dataset.column_names:
        raise ConfigError(f"hf:{name} has no column {options['text_key']!r}; pass --text_key {dataset.column_names}")
    rows = len(dataset)
    if rows == 0:
        return []
    row_bytes = max(1.0, float(dataset.data.nbytes) / max(1, dataset.data.num_rows))
    if max_bytes is not None:
        rows = min(rows, max(1, int(max_bytes / row_bytes)))
    step = max(1, int(segment_bytes / row_bytes))
    ranges = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    return [Part(name, f"hf:{name}", "hf", a, b, max(1, int((b - a) * row_bytes))) for a, b in ranges]


def describe_hf(name: str, options: dict[str, Any]) -> list[Any]:
    """Return what the fingerprint covers of a dataset: its name, its length and hashes of three rows."""
    dataset = load_hf(name, options["subset"], options["split"])
    ends = [dataset[i][options["text_key"]] for i in (0, len(dataset) // 2, len(dataset) - 1)] if len(dataset) else []
    return [name, len(dataset), [share(str(text)) for text in ends]]


def read_hf(part: Part, options: dict[str, Any], rows_at_once: int) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value under ``text_key`` of each row of ``part``."""
    dataset = load_hf(part.path, options["subset"], options["split"])
    for start in range(part.start, part.stop, rows_at_once):
        values = dataset[start : min(start + rows_at_once, part.stop)][options["text_key"]]
        yield from enumerate(values, start)
