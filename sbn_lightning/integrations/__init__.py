"""The places where users already are: plain PyTorch, Hugging Face, torchao and vLLM.

* :mod:`~sbn_lightning.integrations.pytorch`: convert, run the kernels and revert any model, without Lightning;
* :mod:`~sbn_lightning.integrations.folder`: save and load a converted model of anybody's;
* :mod:`~sbn_lightning.integrations.huggingface`: ``from_pretrained``, ``Trainer``, and any ``AutoModelForCausalLM``;
* :mod:`~sbn_lightning.integrations.torchao`: ``quantize_(model, TernarySparseConfig("2:4"))``;
* :mod:`~sbn_lightning.integrations.vllm`: the plugin that serves our Hugging Face folder.

Every file imports its host when the host is used, and not before.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbn_lightning.integrations.folder import load_sparse, save_sparse
    from sbn_lightning.integrations.pytorch import convert, revert, use_kernels

_MODULE_OF = {
    "convert": "pytorch",
    "load_sparse": "folder",
    "revert": "pytorch",
    "save_sparse": "folder",
    "use_kernels": "pytorch",
}

__all__ = ["convert", "load_sparse", "revert", "save_sparse", "use_kernels"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
