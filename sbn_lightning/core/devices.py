"""Find out whether a device can be used here, before anything is moved there."""

from __future__ import annotations

import torch

from sbn_lightning.core.errors import ConfigError


def usable_device(device: torch.device | str, what: str, way_out: str) -> torch.device:
    """Return a device that holds values here.

    Args:
        device: The device, or its name.
        what: What asks for the device, for the message, for example ``"use_kernels: device"``.
        way_out: What to do instead, the end of the message.

    Raises:
        ConfigError: If the device does not exist here, or holds no values, as ``"meta"`` does.
    """
    try:
        found = torch.device(device)
        if found.type == "cuda" and not torch.cuda.is_available():
            reason = "torch sees no GPU here"  # torch's own message is about the driver, and three lines long.
        else:
            torch.empty(1, device=found).item()  # The device "meta" exists and holds no values.
            return found
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # Further sentences list all backends of torch.
    raise ConfigError(f"{what} {str(device)!r} cannot be used here ({reason}); {way_out}")
