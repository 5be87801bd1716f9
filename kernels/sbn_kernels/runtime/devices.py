"""The check that all tensors of a call are on one device.

A kernel is launched on one device and gets addresses. With an address of another GPU, the kernel reads that GPU's
memory slowly if the two GPUs can reach each other, and otherwise fails in a way that ends the process's use of the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_one_device(call: str, names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Checks that tensors are on the device of the first one.

    Args:
        call: The name of the op or function, for the message.
        names: The names of the tensors, in their order.
        tensors: The tensors. The first one is not None.

    Raises:
        ValueError: If a tensor is on another device than the first one.
    """
    first = tensors[0]
    assert first is not None
    device = first.device
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{call} needs all tensors on one device: {names[0]} is on {device}, and {name} on {tensor.device}"
            )
