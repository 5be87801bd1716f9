"""The choice of a kernel that multiplies the tokens of all experts in one launch."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from sbn_lightning.core.errors import ConfigError

if TYPE_CHECKING:
    from sbn_kernels.gemm.registry import Grouped


def choose_grouped(activation_bits: int | None, device: torch.device) -> Grouped:
    """Return the first kernel of the registry that takes all experts at once and runs on a device.

    Args:
        activation_bits: The bits of a quantised token; None if tokens are not quantised.
        device: The device of the layer.

    Raises:
        ConfigError: If there is none. The message says why.
    """
    if activation_bits is None:
        reason = "activation_bits is null, and the kernels multiply integers"
    elif find_spec("triton") is None:
        reason = "Triton is not installed"
    else:
        import sbn_kernels.catalog  # noqa: F401 (registers the kernels)
        from sbn_kernels.gemm.registry import grouped
        from sbn_kernels.runtime.capability import UnsupportedError

        try:
            return grouped(device.index if device.type == "cuda" else None)
        except UnsupportedError as error:
            reason = str(error)
    raise ConfigError(f"backend='grouped' cannot run experts on {device}: {reason}; use 'auto' or 'reference'")
