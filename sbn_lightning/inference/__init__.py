"""Generate text with a model: a key/value cache, sampling, streaming.

* :mod:`~sbn_lightning.inference.opening` loads a model and chooses its device, dtype and backend.
* :mod:`~sbn_lightning.inference.decoder` reads prompts at once and continues them one token a step. On a GPU a step is
  a CUDA graph.
* :mod:`~sbn_lightning.inference.gather` hands a model to the persistent decode step of the kernels, which is opt-in.
* :mod:`~sbn_lightning.inference.sampling` chooses tokens from logits, on the device.
* :mod:`~sbn_lightning.inference.loop` has :func:`generate` and :func:`stream`: token ids in, token ids out.
* :mod:`~sbn_lightning.inference.text` turns token ids into text while they come.
* :mod:`~sbn_lightning.inference.prompts` turns prompts into token ids.
* :mod:`~sbn_lightning.inference.chat` writes a prompt as a turn of a chat.

The command ``sbn generate`` is in :mod:`~sbn_lightning.cli.generate`. Only ``gather`` uses a kernel by name. The other
modules leave the choice of kernels to the layers of the model.
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

# Imported at first use, because `sbn generate --help` must not wait for torch.
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
