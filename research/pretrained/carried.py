"""A corpus as a few compressed files of token ids, to carry to a machine that has neither packages nor a tokenizer.

A folder holds ``held_out_code.u16.xz`` and ``held_out_english.u16.xz``, which every corpus of the study shares, and
``train_1.u16.xz``, ``train_2.u16.xz`` and so on. Each is a row of token ids, unsigned 16 bits, little-endian. Documents
end with the token that ends a text.

No training document may repeat held-out text. :func:`pack` leaves out each document of which more than a share of
positions begins a run of :data:`RUN` tokens that is in a held-out text as well. So copies that differ in a few lines
are left out, too.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbn_lightning.core.errors import DataError

Tokens = NDArray[np.uint16]
KINDS = ("code", "english")
RUN = 32
# A document with a larger share of held-out runs is left out. A licence at the head of a file may be in both.
MOST_SHARED = 0.1
# How many positions are hashed at a time.
BLOCK = 1 << 23


def as_tokens(ids: NDArray[Any]) -> Tokens:
    """Return token ids as unsigned 16 bits.

    Raises:
        DataError: If an id does not fit.
    """
    if len(ids) and (largest := int(ids.max())) > 0xFFFF:
        raise DataError(f"token id {largest} does not fit into 16 bits; take a tokenizer with at most 65,536 tokens")
    return ids.astype(np.uint16)


def write_tokens(path: Path, tokens: Tokens, preset: int = 6) -> None:
    """Write a row of token ids, compressed."""
    # Two bytes a token: the coder models even and odd bytes apart.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "lc": 2, "lp": 1, "pb": 1, "dict_size": 1 << 26}]
    with lzma.open(path, "wb", filters=filters) as stream:
        stream.write(np.ascontiguousarray(tokens, "<u2").tobytes())


def read_tokens(path: Path) -> Tokens:
    """Read a row of token ids."""
    with lzma.open(path) as stream:
        return np.frombuffer(stream.read(), "<u2")


def run_hashes(tokens: Tokens) -> NDArray[np.uint64]:
    """Return a hash of the :data:`RUN` tokens that begin at each position; the last positions have none."""
    hashes = tokens.astype(np.uint64) + np.uint64(1)
    factor = np.uint64(0x9E3779B97F4A7C15)
    length = 1
    with np.errstate(over="ignore"):
        while length < RUN:
            hashes = hashes[:-length] + hashes[length:] * factor
            factor *= factor
            length *= 2
    return hashes


def shared_starts(tokens: Tokens, held_out: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return for each position whether the run that begins there is in a held-out text.

    Args:
        tokens: The training text.
        held_out: The hashes of the held-out texts, sorted.
    """
    shared = np.zeros(len(tokens), bool)
    if not len(held_out):
        return shared
    for start in range(0, len(tokens), BLOCK):
        part = tokens[start : start + BLOCK + RUN - 1]
        if len(part) < RUN:
            break
        hashes = run_hashes(part)
        places = np.searchsorted(held_out, hashes).clip(max=len(held_out) - 1)
        shared[start : start + len(hashes)] = held_out[places] == hashes
    return shared


def without_shared(tokens: Tokens, held_out: NDArray[np.uint64], eos: int) -> tuple[Tokens, int, int]:
    """Leave out the documents that repeat held-out text.

    Args:
        tokens: The training text.
        held_out: The hashes of the held-out texts, sorted.
        eos: The token that ends a document.

    Returns:
        The text that is left, and how many documents and tokens were left out.
    """
    ends = np.flatnonzero(tokens == eos) + 1
    if not len(ends) or ends[-1] != len(tokens):
        ends = np.append(ends, len(tokens))
    starts = np.concatenate(([0], ends[:-1]))
    shared = np.add.reduceat(shared_starts(tokens, held_out).astype(np.int64), starts)
    stays = shared <= MOST_SHARED * (ends - starts)
    kept = tokens[np.repeat(stays, ends - starts)]
    return kept, int((~stays).sum()), len(tokens) - len(kept)


def beginning(tokens: Tokens, most: int, eos: int) -> Tokens:
    """Return the first whole documents of a text, up to and with the one that holds token ``most``."""
    ends = np.flatnonzero(tokens == eos) + 1
    return tokens if not len(ends) or most > ends[-1] else tokens[: ends[np.searchsorted(ends, most)]]


def pack(
    train: dict[str, Tokens], output: Path, eos: int, parts: int, most_bytes: int, seed: int = 0, preset: int = 6
) -> None:
    """Write the training text beside the held-out texts of a folder, documents of both kinds in a random order.

    Args:
        train: The training text of each kind.
        output: The folder, which has the held-out texts.
        eos: The token that ends a document.
        parts: The number of files.
        most_bytes: The largest size of a file. Documents that do not fit are left out.
        seed: The seed of the order.
        preset: How hard to compress, from 0 to 9. 2 is much faster than 6, and files are a little larger.
    """
    held_out = np.unique(np.concatenate([run_hashes(tokens) for tokens in read_held_out(output).values()]))
    documents: list[Tokens] = []
    for kind, tokens in train.items():
        kept, count, size = without_shared(tokens, held_out, eos)
        print(f"{kind}: {len(kept):,} tokens; {count} documents of {size:,} tokens repeat held-out text", flush=True)
        documents += np.split(kept, np.flatnonzero(kept == eos)[:-1] + 1)
    order = np.random.default_rng(seed).permutation(len(documents))
    share = len(order) // parts
    for part in range(parts):
        chosen = [documents[i] for i in order[part * share : (part + 1) * share]]
        path = output / f"train_{part + 1}.u16.xz"
        tokens = np.concatenate(chosen)
        write_tokens(path, tokens, preset)
        while path.stat().st_size > most_bytes:
            chosen = chosen[: int(len(chosen) * 0.99 * most_bytes / path.stat().st_size)]
            tokens = np.concatenate(chosen)
            write_tokens(path, tokens, preset)
        print(f"{path}: {len(tokens):,} tokens in {len(chosen):,} documents, {path.stat().st_size:,} bytes", flush=True)


def is_carried(folder: Path) -> bool:
    """Return whether a folder holds a corpus of this module."""
    return (folder / f"held_out_{KINDS[0]}.u16.xz").is_file()


def read_held_out(folder: Path) -> dict[str, Tokens]:
    """Return the held-out texts by kind."""
    return {kind: read_tokens(folder / f"held_out_{kind}.u16.xz") for kind in KINDS}


def read_train(folder: Path) -> Iterator[Tokens]:
    """Yield the parts of the training text, in their order."""
    yield from map(read_tokens, sorted(folder.glob("train_*.u16.xz")))
