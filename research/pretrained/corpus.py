"""The text of the study: made from packages, held out, packed to be carried, and read.

A corpus is a folder that :func:`make_corpus` wrote, with a prepared folder for each kind of text, or a folder of
:mod:`research.pretrained.carried`. :func:`read_corpus` reads both.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from research.pretrained import carried
from research.pretrained.packages import find_archives, licence_name, unpack
from sbn_lightning.data.tokenization.options import parse_bytes
from sbn_lightning.data.tokenizer import find_eos

# The suffixes of the two kinds of text. Docstrings and comments are English inside of the code.
KINDS = {"code": [".py"], "english": [".md", ".rst", ".txt"]}


def make_corpus(
    weights: str,
    output: str,
    kinds: Sequence[str],
    max_bytes: str | None,
    folders: list[str] | None,
    packages: str | None = None,
    package_bytes: str | None = None,
) -> None:
    """Write the model as a checkpoint with its tokenizer, and text as tokens of this tokenizer.

    Args:
        weights: The published model: a GGUF file, or a Hugging Face folder.
        output: The folder to write.
        kinds: The kinds of text to write, of :data:`KINDS`.
        max_bytes: About how much text of each kind to take; None for all.
        folders: The folders to search; None for those of the running interpreter, unless there are packages.
        packages: A folder with wheels and source distributions, whose text files are searched.
        package_bytes: About how much text of each kind to take from a package; None for all.
    """
    from research.reproduce.corpus import interpreter_folders, reproduce_corpus
    from sbn_lightning.cli.import_hf import import_hf

    place = Path(output)
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "model.ckpt").is_file():
        import_hf(weights, str(place / "model.ckpt"))
    found: Counter[str] = Counter()
    if packages is None:
        found = licences()
    for kind in kinds:
        roots = list(folders or [])
        if packages is not None:
            most = None if package_bytes is None else parse_bytes(package_bytes, "package_bytes")
            found = unpack(find_archives(Path(packages)), place / "packages" / kind, tuple(KINDS[kind]), most)
            roots.append(str(place / "packages" / kind))
        elif not roots:
            roots = [*interpreter_folders(), *(["/usr/share/doc"] if kind == "english" else [])]
        reproduce_corpus(
            [root for root in roots if os.path.isdir(root)],
            str(place / kind),
            suffix=KINDS[kind],
            tokenizer=str(place / "model.tokenizer.json"),
            val_fraction=0.05,
            max_bytes=max_bytes,
            num_workers=min(32, os.cpu_count() or 1),
        )
    lines = [f"{count} {name}" for name, count in found.most_common()]
    (place / "licences.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def licences() -> Counter[str]:
    """Return how many of the installed packages have which licence, as their metadata say."""
    return Counter(licence_name(package.metadata) for package in distributions())


def write_held_out(corpus: str, output: str, tokens: int) -> None:
    """Copy the beginning of the held-out texts of a corpus into a folder that can be carried elsewhere."""
    from sbn_lightning.evaluation.texts import text_of_folder

    Path(output).mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        found = text_of_folder(str(Path(corpus, kind, "tokens")), "val", tokens).tokens
        carried.write_tokens(Path(output, f"held_out_{kind}.u16.xz"), carried.as_tokens(found))


def pack_corpus(
    corpus: str, output: str, parts: int, max_bytes: str, tokens: Sequence[int] | None = None, preset: int = 6
) -> None:
    """Write the training text of a corpus beside held-out texts, without documents that repeat them.

    Args:
        corpus: The folder that :func:`make_corpus` wrote.
        output: The folder with the held-out texts.
        parts: The number of files.
        max_bytes: The largest size of a file.
        tokens: About how many tokens of each kind to take, in the order of :data:`KINDS`; None for all.
        preset: How hard to compress, from 0 to 9.
    """
    from sbn_lightning.evaluation.texts import text_of_folder

    tokenizer = Tokenizer.from_file(str(Path(corpus, "model.tokenizer.json")))
    train = {
        kind: carried.as_tokens(text_of_folder(str(Path(corpus, kind, "tokens")), "train").tokens) for kind in KINDS
    }
    eos = find_eos(tokenizer, None)[1]
    if tokens is not None:
        train = {kind: carried.beginning(train[kind], most, eos) for kind, most in zip(KINDS, tokens, strict=True)}
    carried.pack(train, Path(output), eos, parts, parse_bytes(max_bytes, "max_bytes"), preset=preset)


def read_corpus(corpus: str, device: torch.device, held_out: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the training text, and the held-out texts by kind, int32."""
    from sbn_lightning.evaluation.texts import text_of_folder

    def move(tokens: Any) -> Tensor:
        return torch.from_numpy(tokens.astype("int32")).to(device)

    if carried.is_carried(Path(corpus)):
        texts = carried.read_held_out(Path(corpus))
        train = torch.cat([move(tokens) for tokens in carried.read_train(Path(corpus))])
        return train, {kind: move(tokens[:held_out]) for kind, tokens in texts.items()}

    def read(kind: str, split: str, most: int | None = None) -> Tensor:
        return move(text_of_folder(str(Path(corpus, kind, "tokens")), split, most).tokens)

    train = torch.cat([read(kind, "train") for kind in KINDS])
    return train, {kind: read(kind, "val", held_out) for kind in KINDS}


def load_tokenizer(weights: str) -> Tokenizer:
    """Return the tokenizer from the file beside the checkpoint, or from the checkpoint."""
    from sbn_lightning.formats.load import read_text

    text = read_text(weights)
    assert text.tokenizer is not None
    return text.tokenizer


def held_out_documents(corpus: str, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Return the held-out documents of each kind as text, without the first one's and the last one's cut parts."""
    eos = find_eos(tokenizer, None)[1]
    documents = {}
    for kind, tokens in carried.read_held_out(Path(corpus)).items():
        parts = np.split(tokens, np.flatnonzero(tokens == eos) + 1)
        documents[kind] = [tokenizer.decode(part[part != eos].tolist(), skip_special_tokens=False) for part in parts]
    return documents
