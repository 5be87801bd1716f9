"""Text to tokens to litdata shards to batches.

Two halves that share nothing but a folder on disk:

* ``prepare`` reads text, writes a folder (``train/``, ``val/``, ``tokenizer.json``, ``meta.json``);
* ``TokenDataModule`` streams that folder, from a disk or from a bucket, into a ``Trainer``.

The second half is imported on first use, so that ``prepare`` starts without torch or Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# Not lazy: `prepare` is a function here and also the name of its submodule. Importing it now, once, settles that
# `sbn_lightning.data.tokenization.prepare` is the function whatever else is imported later.
from sbn_lightning.data.tokenization.prepare import prepare
from sbn_lightning.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from sbn_lightning.data.stream.datamodule import TokenDataModule
    from sbn_lightning.data.stream.loader import TokenLoader
    from sbn_lightning.data.stream.mixture import MixedTokenLoader

__all__ = ["MixedTokenLoader", "TokenDataModule", "TokenLoader", "load_tokenizer", "prepare"]

_LAZY = {"MixedTokenLoader": "stream.mixture", "TokenDataModule": "stream.datamodule", "TokenLoader": "stream.loader"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
