"""A corpus that needs no download: every Python file of the interpreter and its packages, each text once.

Files with the same text, exactly or up to white space, are one document. Otherwise a model would see its validation
text in training, because packages contain copies of each other. The split of a document and its place depend on the
digest of its text alone, so the corpus does not depend on where the files lie. ``prepare`` does the rest.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.core.files import atomic_stream
from sbn_lightning.core.text import why_not_text
from sbn_lightning.data import prepare
from sbn_lightning.data.tokenization.options import parse_bytes
from sbn_lightning.data.tokenization.sources import share

TEXTS, TOKENS, PROBE = "text", "tokens", "probe"


def reproduce_corpus(
    folders: str | list[str] | None = None,
    output: str = "data/reproduce",
    suffix: str | list[str] = ".py",
    vocab_size: int = 8192,
    tokenizer: str | None = None,
    val_fraction: float = 0.02,
    probe_fraction: float = 0.01,
    max_file_bytes: int | str = "1MB",
    max_bytes: int | str | None = None,
    num_workers: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Gather every Python file of this machine, each text once, as tokens for `reproduce`.

    Args:
        folders: The folders to search; not given, the interpreter's standard library and its site-packages.
        output: The folder to write: text/ (JSON lines), tokens/ (train and validation), probe/.
        suffix: The endings of the files to take.
        vocab_size: The vocabulary size of the byte-level BPE, which is trained on the training split.
        tokenizer: The path of a tokenizer.json to use; not given, the BPE is trained here.
        val_fraction: The share of documents held out for validation.
        probe_fraction: The share of documents held out for the probe.
        max_file_bytes: The size of the largest file to take. Most larger files are tables.
        max_bytes: About how much text to take, as a random choice of documents; like 300MB.
        num_workers: The number of processes; default one for each CPU, at most 16.
        overwrite: Whether to replace what an earlier call with other inputs or options wrote.

    Returns:
        The counts of files, and of tokens by split.

    Raises:
        ConfigError: An option cannot work, or a folder does not exist.
    """
    if not 0 < val_fraction < 1 or not 0 < probe_fraction < 1:
        raise ConfigError(f"val_fraction {val_fraction} and probe_fraction {probe_fraction} must lie between 0 and 1")
    roots = [folders] if isinstance(folders, str) else folders or interpreter_folders()
    suffixes = (suffix,) if isinstance(suffix, str) else tuple(suffix)
    for root in roots:
        if not Path(root).is_dir():
            raise ConfigError(f"folder {root} does not exist")
    out = Path(output)
    documents, counts = unique_documents(find_files(roots, suffixes), parse_bytes(max_file_bytes, "max_file_bytes"))
    if not documents:
        raise ConfigError(f"no {' or '.join(suffixes)} file in {', '.join(map(str, roots))}")
    if max_bytes is not None:
        documents = _some(documents, parse_bytes(max_bytes, "max_bytes"))
    for_probe = {digest for digest in documents if share(f"probe {digest}") < probe_fraction}
    for_probe = for_probe or {min(documents, key=lambda digest: share(f"probe {digest}"))}
    rest = documents.keys() - for_probe
    _write_lines(out / TEXTS / "documents.jsonl", {digest: documents[digest] for digest in sorted(rest)})
    _write_lines(out / TEXTS / "probe.jsonl", {digest: documents[digest] for digest in sorted(for_probe)})
    common: dict[str, Any] = {"num_workers": num_workers, "overwrite": overwrite}
    made = prepare(
        input=str(out / TEXTS / "documents.jsonl"),
        output=str(out / TOKENS),
        val_fraction=val_fraction,
        **({"vocab_size": vocab_size} if tokenizer is None else {"tokenizer": tokenizer}),
        bpe_sample_bytes="32MB",
        **common,
    )
    probe = prepare(
        input=str(out / TEXTS / "probe.jsonl"),
        output=str(out / PROBE),
        tokenizer=str(out / TOKENS / "tokenizer.json"),
        val_fraction=0,
        **common,
    )
    tokens = {name: split["tokens"] for name, split in made["splits"].items()}
    summary = counts | {"tokens": tokens | {"probe": probe["splits"]["train"]["tokens"]}}
    print(json.dumps(summary), file=sys.stderr)
    return summary


def interpreter_folders() -> list[str]:
    """Return the folders of the running interpreter's standard library and installed packages."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return [path for path in dict.fromkeys(map(os.path.realpath, paths)) if os.path.isdir(path)]


def find_files(roots: Sequence[str], suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files below ``roots``, each once, also where roots overlap. Hidden folders and caches are left out."""
    seen: set[str] = set()
    for root in roots:
        for folder, names, files in os.walk(os.path.realpath(root)):
            if folder in seen:
                names.clear()
                continue
            seen.add(folder)
            names[:] = sorted(name for name in names if not name.startswith(".") and name != "__pycache__")
            yield from (Path(folder, file) for file in sorted(files) if file.endswith(suffixes))


def unique_documents(files: Iterator[Path], max_bytes: int) -> tuple[dict[str, Path], dict[str, int]]:
    """Choose one file for each text.

    Args:
        files: The files to read.
        max_bytes: The size of the largest file to take.

    Returns:
        The files by the digest of their text without white space; and the counts of files that were read, that were
        left out (unreadable, not UTF-8, too large, no text), and that are duplicates.
    """
    counts = {"files": 0, "left_out": 0, "duplicates": 0, "same_but_for_white_space": 0}
    exact: set[str] = set()
    found: dict[str, tuple[str, Path]] = {}
    for path in files:
        counts["files"] += 1
        try:
            data = path.read_bytes()
            text = data.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            counts["left_out"] += 1
            continue
        if len(data) > max_bytes or not text.strip() or why_not_text(data):
            counts["left_out"] += 1
            continue
        digest = blake2b(data, digest_size=16).hexdigest()
        normalised = blake2b("".join(text.split()).encode(), digest_size=16).hexdigest()
        if digest in exact:
            counts["duplicates"] += 1
            continue
        exact.add(digest)
        counts["same_but_for_white_space"] += normalised in found
        # The smallest digest, so that the choice does not depend on the order of the files.
        found[normalised] = min(found.get(normalised, (digest, path)), (digest, path))
    return {normalised: path for normalised, (_, path) in found.items()}, counts


def _some(documents: dict[str, Path], max_bytes: int) -> dict[str, Path]:
    """Return the documents with the smallest digests, up to about ``max_bytes`` of text."""
    chosen: dict[str, Path] = {}
    for digest in sorted(documents):
        if max_bytes <= 0:
            break
        chosen[digest] = documents[digest]
        max_bytes -= documents[digest].stat().st_size
    return chosen


def _write_lines(target: Path, documents: dict[str, Path]) -> None:
    with atomic_stream(target) as stream:
        for path in documents.values():
            line = json.dumps({"text": path.read_bytes().decode("utf-8")}, ensure_ascii=False) + "\n"
            stream.write(line.encode("utf-8"))
