"""Read the token ids of a text, from files or from a folder that ``prepare`` wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.text import read_text
from sbn_lightning.data import folders, shards
from sbn_lightning.data.tokenizer import Encoder, find_eos
from sbn_lightning.formats.loaded import LoadedModel

_BLOCK = 1024


class Text(NamedTuple):
    """A text to evaluate on.

    Attributes:
        name: The files or the folder of the text, for reports.
        tokens: The token ids of the text, integers ``[tokens]``.
        bytes: The length of the text in UTF-8, without the tokens that end documents; None if only a part was read.
    """

    name: str
    tokens: np.ndarray
    bytes: int | None


def text_of(paths: str | Sequence[str], loaded: LoadedModel, split: str, max_tokens: int) -> Text:
    """Read a prepared folder, or one or several files.

    Args:
        paths: The folder, or the files.
        loaded: The model, whose tokenizer reads the files.
        split: The split of a folder, ``"val"`` or ``"train"``.
        max_tokens: How many tokens to take at most, from the beginning.

    Raises:
        ConfigError: If the folder is not on this machine.
        DataError: If the text cannot be read, or the model has no tokenizer for the files.
    """
    files = [paths] if isinstance(paths, str) else paths
    if len(files) == 1 and Path(files[0]).is_dir():
        return text_of_folder(files[0], split, max_tokens)
    return text_of_files(files, loaded.need_tokenizer(), max_tokens)


def text_of_files(files: Sequence[str], tokenizer: Tokenizer, max_tokens: int | None = None) -> Text:
    """Read files and lay them end to end, with an end-of-document token between them, as in training.

    Args:
        files: The paths of the files.
        tokenizer: The tokenizer of the model; it is not changed.
        max_tokens: How many tokens to take at most, from the beginning.

    Raises:
        DataError: If a file cannot be read, or is not text in UTF-8.
    """
    encode = Encoder(Tokenizer.from_str(tokenizer.to_str()), is_byte=False)
    between = np.array([find_eos(tokenizer, None)[1]] if len(files) > 1 else [], dtype=encode.dtype)
    parts: list[np.ndarray] = []
    size = 0
    for file in files:
        text = read_text(file, "text")
        size += len(text.encode("utf-8"))
        parts += [between, *encode([text])]
    tokens = np.concatenate(parts[1:])
    cut = max_tokens is not None and len(tokens) > max_tokens
    return Text(", ".join(map(str, files)), tokens[:max_tokens], None if cut else size)


def text_of_folder(folder: str, split: str, max_tokens: int | None = None) -> Text:
    """Read a split of a prepared folder, its documents end to end.

    litdata reads the split in blocks that do not cross shards. Up to :data:`_BLOCK` tokens at the very end can be left
    out.

    Args:
        folder: The folder that `prepare` wrote, on this machine.
        split: The split, ``"val"`` or ``"train"``.
        max_tokens: How many tokens to take at most, from the beginning.

    Raises:
        ConfigError: If the folder is not on this machine.
        DataError: If the folder was not prepared, has no such split, or a shard is missing or cut short.
    """
    if folders.is_remote(folder):
        raise ConfigError(f"data {folder} is not on this machine; copy the folder here to evaluate on it")
    meta = folders.load_meta(folder, None)
    if "teacher" in meta:
        raise DataError(f"{folder} holds a teacher's logits between its tokens; give the folder of the text")
    if split not in meta["splits"]:
        raise DataError(f"{folder} has no split {split!r}, only {', '.join(meta['splits'])}")
    shards.verify(Path(folder), meta, checksum=False)
    from sbn_lightning.data.stream.loader import open_split

    counts = meta["splits"][split]
    index = json.loads(Path(folder, split, "index.json").read_text(encoding="utf-8"))
    # Blocks of this length fill every shard but the last, so that nothing is lost in between.
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
