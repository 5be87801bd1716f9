"""Ternary N:M models in Hugging Face transformers. Importing this package makes the method ``"sbn"`` known there.

* :mod:`~sbn_lightning.integrations.huggingface.quantizer`: ``from_pretrained`` and ``save_pretrained``;
* :mod:`~sbn_lightning.integrations.huggingface.trainer`: the schedule and the logs in ``transformers.Trainer``;
* :mod:`~sbn_lightning.integrations.huggingface.causal_lm`: any ``AutoModelForCausalLM`` as a LightningModule.

transformers has no entry point for quantisation methods, so a program imports this package before it loads a folder.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sbn_lightning.integrations.huggingface.quantizer import SBNConfig, SBNQuantizer
from sbn_lightning.integrations.huggingface.saving import save_packed

if TYPE_CHECKING:
    from sbn_lightning.integrations.huggingface.causal_lm import CausalLM
    from sbn_lightning.integrations.huggingface.trainer import SparsityCallback

_MODULE_OF = {"CausalLM": "causal_lm", "SparsityCallback": "trainer"}

__all__ = ["CausalLM", "SBNConfig", "SBNQuantizer", "SparsityCallback", "save_packed"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
