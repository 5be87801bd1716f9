"""What a network answers for transformers, which would ask the GPU before it makes attention masks.

transformers asks two questions in each forward:

* Whether a row holds several sequences, each with positions from 0. It looks at the positions, so the host waits for
  the GPU. A row of :class:`~sbn_lightning.integrations.huggingface.network.Network` is one sequence.
* Whether the stream is being recorded as a CUDA graph. If so, some versions make the mask of causal attention, which
  they leave out otherwise. Kernels of attention without a mask are faster, and compiled blocks would be compiled again
  for the mask, which cannot be recorded.

The functions that ask are replaced once. They answer as before, except in a thread that is inside of
:func:`plain_rows`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch


class _Thread(threading.local):
    """What differs between threads.

    Attributes:
        plain: Whether each row is one sequence.
    """

    plain = False


_thread = _Thread()


@contextmanager
def plain_rows() -> Iterator[None]:
    """Answer for transformers in this thread: a row is one sequence, and a recording attends as other forwards do."""
    from transformers import masking_utils

    for name, answer in (("find_packed_sequence_indices", _has_none), ("is_tracing", _is_tracing)):
        ask = getattr(masking_utils, name, None)
        if ask is not None and not hasattr(ask, "asked_here"):
            setattr(masking_utils, name, _ask_here(ask, answer))
    before, _thread.plain = _thread.plain, True
    try:
        yield
    finally:
        _thread.plain = before


def _ask_here(ask: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of transformers that asks ``answer`` instead, in a thread inside of :func:`plain_rows`."""

    @wraps(ask)
    def asked(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or not _thread.plain:
            return ask(*args, **options)
        return answer(ask, *args, **options)

    asked.asked_here = True  # type: ignore[attr-defined]
    return asked


def _has_none(ask: Callable[..., Any], *args: Any, **options: Any) -> None:
    """No row has a second sequence."""


def _is_tracing(ask: Callable[..., bool], *args: Any, **options: Any) -> bool:
    """Whether somebody traces the forward. A recording of the stream does not count."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return False
    return ask(*args, **options)
