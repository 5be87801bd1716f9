"""Generate text with a model: a key/value cache, sampling, streaming.

* :mod:`~sbn_lightning.inference.opening` loads a model and chooses its device, dtype and backend.
* :mod:`~sbn_lightning.inference.generator` has :class:`Generator`, for continuous use: requests join and leave a batch.
  A :class:`Request` (:mod:`~sbn_lightning.inference.request`) has limits of its own and gives its text as it comes.
* :mod:`~sbn_lightning.inference.engine` puts requests into the rows of a decoder.
* :mod:`~sbn_lightning.inference.decoder` reads prompts at once and continues them one token a step. On a GPU a step is
  a CUDA graph.
* :mod:`~sbn_lightning.inference.attention` has the attention of a decoder, and
  :mod:`~sbn_lightning.inference.buckets` reads a prompt as one CUDA graph. :mod:`~sbn_lightning.inference.prompt_pass`
  reads prompts with fused kernels where a model allows that.
* :mod:`~sbn_lightning.inference.prepared` sees quickly that no weight has changed.
* :mod:`~sbn_lightning.inference.persistent` hands a model to the persistent decode step of the kernels;
  :mod:`~sbn_lightning.inference.choice` measures whether that step is the faster one.
* :mod:`~sbn_lightning.inference.sampling` chooses tokens from logits, on the device.
* :mod:`~sbn_lightning.inference.loop` has :func:`generate` and :func:`stream`: token ids in, token ids out.
* :mod:`~sbn_lightning.inference.text` turns token ids into text while they come, and
  :mod:`~sbn_lightning.inference.stops` cuts a text at a stop string.
* :mod:`~sbn_lightning.inference.prompts` turns prompts into token ids.
* :mod:`~sbn_lightning.inference.chat` writes a prompt as a turn of a chat.
* :mod:`~sbn_lightning.inference.conversation` keeps the turns of a chat.
* :mod:`~sbn_lightning.inference.head` has a head of 8 bits, which is opt-in.

The commands are in :mod:`~sbn_lightning.cli.generate` and :mod:`~sbn_lightning.cli.chat`. Only ``gather``, ``head``
and ``prompt_pass`` use a kernel by name. The other modules leave the choice of kernels to the layers of the model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbn_lightning.inference.decoder import Decoder
    from sbn_lightning.inference.generator import Generator, QueueFullError
    from sbn_lightning.inference.loop import Speed, generate, stream
    from sbn_lightning.inference.request import Completion, Limits, Request
    from sbn_lightning.inference.sampling import Sampling
    from sbn_lightning.inference.text import TextStream

__all__ = [
    "Completion",
    "Decoder",
    "Generator",
    "Limits",
    "QueueFullError",
    "Request",
    "Sampling",
    "Speed",
    "TextStream",
    "generate",
    "stream",
]

# Imported at first use, because `sbn generate --help` must not wait for torch.
_MODULE_OF = {
    "Completion": "request",
    "Decoder": "decoder",
    "Generator": "generator",
    "Limits": "request",
    "QueueFullError": "generator",
    "Request": "request",
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
