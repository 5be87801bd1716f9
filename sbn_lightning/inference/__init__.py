"""Text out of a model: a key/value cache, sampling, streaming.

* :mod:`~sbn_lightning.inference.decoder`: prompts in once, then one token a step, as a CUDA graph on a GPU;
* :mod:`~sbn_lightning.inference.sampling`: logits to tokens, on the device;
* :mod:`~sbn_lightning.inference.loop`: :func:`generate` and :func:`stream`, token ids in and out;
* :mod:`~sbn_lightning.cli.generate`: ``sbn generate``, text in and out.

None of it knows kernels: it calls the model, whose layers know what they compute with.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbn_lightning.inference.decoder import Decoder
    from sbn_lightning.inference.loop import Speed, generate, stream
    from sbn_lightning.inference.sampling import Sampling
    from sbn_lightning.inference.text import TextStream

__all__ = ["Decoder", "Sampling", "Speed", "TextStream", "generate", "stream"]

# On first use: `sbn generate --help` must not wait for torch.
_MODULE_OF = {
    "Decoder": "decoder",
    "Sampling": "sampling",
    "Speed": "loop",
    "TextStream": "text",
    "generate": "loop",
    "stream": "loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
