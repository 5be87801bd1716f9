"""Models in and out: Lightning checkpoints, packed folders, Hugging Face, GGUF.

Nothing here needs Lightning. Names are imported on first use: the command line reads the signature of a tool without
waiting for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbn_lightning.checkpoint.export_command import export
    from sbn_lightning.checkpoint.import_command import import_hf
    from sbn_lightning.checkpoint.load import LoadedModel, load_model
    from sbn_lightning.checkpoint.packed_layer import PackedTernaryLinear, pack_layers

_MODULE_OF = {
    "LoadedModel": "load",
    "PackedTernaryLinear": "packed_layer",
    "export": "export_command",
    "import_hf": "import_command",
    "load_model": "load",
    "pack_layers": "packed_layer",
}

__all__ = ["LoadedModel", "PackedTernaryLinear", "export", "import_hf", "load_model", "pack_layers"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
