"""``UnshardedAccumulation``: a name of version 0.1.0 that does nothing any more.

The callback kept weights and gradients whole on every rank between the micro-batches of an optimiser step. On two GPUs
that was slower than without it, and took 8 bytes more for each parameter. The strategy ``sbn_fsdp2`` gathers nothing
between optimiser steps, and keeps gradients sharded.
"""

from __future__ import annotations

import warnings

from lightning.pytorch import Callback


class UnshardedAccumulation(Callback):
    """Do nothing. Training gives the same losses with and without this callback.

    .. deprecated:: 0.2.0
        Use ``trainer.strategy: sbn_fsdp2``.
    """

    def __init__(self) -> None:
        warnings.warn(
            "UnshardedAccumulation does nothing any more, because it was slower than training without it: leave it "
            "out, and train with trainer.strategy: sbn_fsdp2, which gathers nothing between optimiser steps",
            DeprecationWarning,
            stacklevel=2,
        )
