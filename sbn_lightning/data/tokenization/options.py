"""Read and check the options of ``prepare``."""

from __future__ import annotations

import os
from pathlib import Path

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data.tokenizer import EOS_TOKEN

LOCK = ".prepare.lock"
# One of these is in each folder that `prepare` has begun or finished.
_MARKS = {"meta.json", "meta.json.tmp", ".work"}
_OURS = {"train", "val", "tokenizer.json", LOCK} | _MARKS
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def default_workers() -> int:
    """Return the number of CPUs that this process may use, at most 16."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, usable)


def parse_bytes(value: int | str, name: str) -> int:
    """Read a size like 1000, '64MB' or '2GiB'.

    The only function for this in a package that this project needs is a private one of litdata.

    Args:
        value: The size in bytes, or a text with a unit.
        name: The name of the option, for the message.

    Raises:
        ConfigError: The value is no size, or not above zero.
    """
    text = str(value).strip().lower().removesuffix("b").strip()
    digits = text.rstrip("kmgti")
    try:
        size = int(float(digits) * _UNITS[text[len(digits) :]])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{name} {value!r} is not a size; give bytes, or something like 64MB or 2GiB")
    return size


def check_options(tokenizer: str, vocab_size: int | None, val_fraction: float, num_workers: int | None) -> None:
    """Refuse values that cannot work.

    Raises:
        ConfigError: A value cannot work; the message names the value and the way out.
    """
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"val_fraction {val_fraction} is not in [0, 1); 0.05 holds out one document in twenty")
    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"num_workers {num_workers} is below 1; leave it out for one a CPU")
    if tokenizer not in ("byte", "bpe") and not Path(tokenizer).is_file():
        raise ConfigError(f"tokenizer {tokenizer!r} is not 'byte', 'bpe' or the path of a tokenizer.json")
    if tokenizer != "bpe" and vocab_size is not None:
        raise ConfigError(f"vocab_size is for tokenizer 'bpe' only, {tokenizer!r} has its own; leave it out")
    if vocab_size is not None and vocab_size < 257:
        raise ConfigError(f"vocab_size {vocab_size} is below 257 (256 bytes + {EOS_TOKEN}); use tokenizer 'byte'")


def check_output(out: Path) -> None:
    """Refuse an output folder that holds anything but prepared data.

    Folders with the names of the splits count as prepared data only beside the files that ``prepare`` writes with them.

    Raises:
        ConfigError: The folder holds another file, or the path is no folder.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"output {out} is a file; give a folder")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    strange = sorted(names - (_OURS if names & _MARKS else {LOCK}))
    if strange:
        raise ConfigError(f"output {out} holds files that `prepare` did not write ({strange[0]}, ...); give another")
