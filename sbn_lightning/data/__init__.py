"""Text becomes tokens, tokens become litdata shards, and shards become batches.

The package has two halves, which share nothing but a folder on a disk:

* ``prepare`` reads text and writes a folder (``train/``, ``val/``, ``tokenizer.json``, ``meta.json``).
* ``TokenDataModule`` streams that folder, from a disk or from a bucket, into a ``Trainer``.

The second half is imported on first use, so ``prepare`` starts without torch and Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# Not lazy: these two import neither torch nor Lightning.
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
