"""Read the ``meta.json`` and the tokenizer of a prepared folder, on this machine or in a bucket."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.data import shards
from sbn_lightning.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def is_remote(path: str) -> bool:
    """Return whether litdata fetches the shards of this path one by one (s3://, gs://, ...; ``local:`` for a disk)."""
    return "://" in path or path.startswith("local:")


def join(source: str, name: str) -> str:
    """Return the path of a file or folder below a prepared folder."""
    return f"{source.rstrip('/')}/{name}" if is_remote(source) else os.path.join(source, name)


def load_meta(source: str, meta_path: str | None) -> dict[str, Any]:
    """Read the ``meta.json`` of a prepared folder.

    Args:
        source: The folder or its URL.
        meta_path: The path of another ``meta.json`` to read instead, or None.

    Raises:
        DataError: The file is not there, is no ``meta.json``, or cannot be fetched.
    """
    if meta_path is not None:
        try:
            return shards.parse_meta(Path(meta_path).read_text(encoding="utf-8"), meta_path)
        except OSError as error:
            raise DataError(f"cannot read data.meta_path {meta_path}: {error.strerror}") from error
    if is_remote(source):
        with tempfile.TemporaryDirectory() as folder:
            text = _fetch(source, "meta.json", folder).read_text(encoding="utf-8")
        return shards.parse_meta(text, f"{source}/meta.json")
    meta = shards.read_meta(Path(source))
    if meta is None:
        raise DataError(_missing(source))
    return meta


def load_tokenizer_of(source: str) -> Tokenizer:
    """Load the tokenizer that a folder was prepared with.

    Raises:
        DataError: The tokenizer is not there, or cannot be fetched.
    """
    if not is_remote(source):
        return load_tokenizer(source)
    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(_fetch(source, "tokenizer.json", folder))


def check_same_tokenizer(metas: dict[str, dict[str, Any]]) -> None:
    """Refuse to mix folders whose token ids mean different things.

    Args:
        metas: The ``meta.json`` of each folder.

    Raises:
        ConfigError: Two folders have different tokenizers; the message names them.
    """
    first, *others = metas
    for other in others:
        for key in ("vocab_size", "eos_id"):
            if metas[other][key] != metas[first][key]:
                raise ConfigError(
                    f"data.paths: {other} has {key} {metas[other][key]}, {first} has {metas[first][key]}; "
                    f"prepare both with the same --tokenizer (say {first}/tokenizer.json)"
                )
        if metas[other]["files"]["tokenizer.json"] != metas[first]["files"]["tokenizer.json"]:
            raise ConfigError(
                f"data.paths: {other} and {first} have different tokenizers; prepare both with the same "
                f"--tokenizer (say {first}/tokenizer.json)"
            )


def count_blocks(split: Path, sequence_length: int, block_size: int | None = None) -> int:
    """Return how many blocks of ``sequence_length + 1`` tokens a local split holds.

    Args:
        split: The folder of the split.
        sequence_length: The number of inputs in a block.
        block_size: The number of integers in a block, if a block holds more than its tokens.

    Raises:
        DataError: Not even the longest shard holds a block.
    """
    index = json.loads((split / "index.json").read_text(encoding="utf-8"))
    blocks = shards.count_blocks(index, block_size or sequence_length + 1)
    if blocks == 0:
        longest = max(int(chunk["dim"]) for chunk in index["chunks"])
        raise DataError(
            f"{split}: its longest shard has {longest} tokens, a block needs {sequence_length + 1}; lower "
            "data.sequence_length, or prepare more text or larger --chunk_bytes"
        )
    return blocks


def _missing(source: str) -> str:
    if Path(source, ".work").is_dir():
        return f"{source} is not finished: `prepare` was interrupted; run the same `prepare` command again"
    what = "has no meta.json" if Path(source).is_dir() else "does not exist"
    return f"data.path {source} {what}; write it with: python cli.py prepare --input FILES --output {source}"


def _fetch(source: str, name: str, folder: str) -> Path:
    """Get a small file next to remote shards, with the same credentials that litdata uses for the shards."""
    from litdata.streaming.downloader import get_downloader

    local = Path(folder, name)
    try:
        get_downloader(source, folder, [], {}, {}).download_file(join(source, name), str(local))
    except Exception as error:  # Each provider has its own errors.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot get {join(source, name)}: {reason}; check the URL and credentials") from error
    if not local.is_file():
        raise DataError(f"{join(source, name)} does not exist; upload the whole folder that `prepare` wrote")
    return local
