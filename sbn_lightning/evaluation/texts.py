"""The token ids of a text: from files, or from a folder that ``prepare`` wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.data import folders, shards
from sbn_lightning.data.tokenizer import Encoder, find_eos, load_tokenizer

_BLOCK = 1024


class Text(NamedTuple):
    """A text to evaluate on.

    Attributes:
        name: Where it is from.
        tokens: Its ids, integers ``[tokens]``.
        bytes: Its length in UTF-8, without what ends documents; None if only a part was read.
    """

    name: str
    tokens: np.ndarray
    bytes: int | None


def text_of_files(files: Sequence[str], tokenizer_path: Path, max_tokens: int | None = None) -> Text:
    """Files laid end to end, with an end-of-document token between them, as in training.

    Args:
        files: Their paths.
        tokenizer_path: A ``tokenizer.json``.
        max_tokens: Take no more than this.

    Raises:
        DataError: If a file cannot be read or is not UTF-8.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    encode = Encoder(tokenizer, is_byte=False)
    between = np.array([find_eos(tokenizer, None)[1]] if len(files) > 1 else [], dtype=encode.dtype)
    parts: list[np.ndarray] = []
    size = 0
    for file in files:
        try:
            text = Path(file).read_bytes().decode("utf-8")  # line ends as they are
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read text {file}: {error}") from error
        size += len(text.encode("utf-8"))
        parts += [between, *encode([text])]
    tokens = np.concatenate(parts[1:])
    cut = max_tokens is not None and len(tokens) > max_tokens
    return Text(", ".join(map(str, files)), tokens[:max_tokens], None if cut else size)


def text_of_folder(folder: str, split: str, max_tokens: int | None = None) -> Text:
    """A split of a prepared folder, its documents end to end.

    litdata reads it in blocks that do not cross shards: up to :data:`_BLOCK` tokens at the very end can be left out.

    Args:
        folder: A local one.
        split: ``"val"`` or ``"train"``.
        max_tokens: Read no more than this.

    Raises:
        ConfigError: If the folder is not local.
        DataError: If the folder is not one, has no such split, or a shard is missing or cut short.
    """
    if folders.is_remote(folder):
        raise ConfigError(f"data {folder} is not on this machine; copy the folder here to evaluate on it")
    meta = folders.load_meta(folder, None)
    if split not in meta["splits"]:
        raise DataError(f"{folder} has no split {split!r}, only {', '.join(meta['splits'])}")
    shards.verify(Path(folder), meta, checksum=False)
    from sbn_lightning.data.stream.loader import open_split

    counts = meta["splits"][split]
    index = json.loads(Path(folder, split, "index.json").read_text(encoding="utf-8"))
    # Blocks that fill every shard but the last, so that nothing is lost in between.
    sizes = [int(chunk["dim"]) for chunk in index["chunks"]]
    block = math.gcd(_BLOCK, *sizes[:-1]) if len(sizes) > 1 else min(_BLOCK, max(1, sizes[0]))
    wanted = counts["tokens"] if max_tokens is None else min(counts["tokens"], max_tokens)
    blocks: list[np.ndarray] = []
    for item in open_split(str(Path(folder, split)), block, shuffle=False, drop_last=False, seed=0):
        blocks.append(np.asarray(item))
        if len(blocks) * block >= wanted:
            break
    tokens = np.concatenate(blocks)[:wanted]
    whole = counts["tokens"] - len(tokens) < block
    return Text(
        f"{folder} ({split})", tokens, round(counts["bytes"] * len(tokens) / counts["tokens"]) if whole else None
    )
