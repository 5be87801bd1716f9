"""A small corpus, and a way to prepare it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from sbn_lightning.data import prepare


def write_corpus(folder: Path, files: int = 12, size: int = 700, seed: int = 0) -> Path:
    """Text files of pseudo-random words, with a few characters beyond ASCII."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("etaoinshrdlu", k=generator.randint(1, 9))) for _ in range(200)]
    words += ["naïve", "θ", "雪", "🙂"]
    for index in range(files):
        file = folder / f"part{index % 3}" / f"text{index:03d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        while sum(map(len, lines)) < size:
            lines.append(" ".join(generator.choices(words, k=generator.randint(3, 12))) + "\n")
        file.write_text("".join(lines), encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that ``prepare`` leaves behind, by relative path."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".prepare.lock"
    }


def prepare_small(corpus: Path, output: Path, **options: Any) -> dict[str, Any]:
    """``prepare`` with the byte tokenizer, small shards and segments, in this process."""
    defaults = {"tokenizer": "byte", "val_fraction": 0.2, "chunk_bytes": 9000, "segment_bytes": 5000, "num_workers": 1}
    return prepare(input=str(corpus), output=str(output), **{**defaults, **options})
