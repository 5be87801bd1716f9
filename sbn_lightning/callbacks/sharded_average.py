"""The average of a sharded model: each rank averages its own rows.

FSDP2 allows no copy of a model. So the average is a module without layers, which has this rank's part of each parameter
and a copy of each buffer, by the same names. Averaging is elementwise, so parts average as wholes do. To be used, the
average changes places with the model's own values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class LocalValues:
    """A sharded model as ``AveragedModel`` takes it: the values that this rank holds.

    Args:
        module: The sharded model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def parameters(self) -> Iterator[Tensor]:
        """The parts of the parameters that this rank has. What FSDP2 has gathered is given back."""
        for part in self._module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # A forward without a backward leaves embedding and head whole.
        for parameter in self._module.parameters():
            value = parameter.detach()
            yield value.to_local() if isinstance(value, DTensor) else value

    def buffers(self) -> Iterator[Tensor]:
        """The buffers, which are whole on every rank."""
        yield from self._module.buffers()


def copy_of_values(module: nn.Module) -> nn.Module:
    """Copy the values that this rank holds of a sharded model into a module that has nothing else.

    The parameters and buffers of the result come in the order of those of ``module``.
    """
    values = LocalValues(module)
    copy = nn.Module()
    for i, value in enumerate(values.parameters()):
        copy.register_parameter(f"p{i}", nn.Parameter(value.clone(), requires_grad=False))
    for i, buffer in enumerate(values.buffers()):
        copy.register_buffer(f"b{i}", buffer.detach().clone())
    return copy


@torch.no_grad()
def swap_values(average: nn.Module, module: nn.Module) -> None:
    """Let a sharded model and its average change places, buffers included."""
    values = LocalValues(module)
    pairs = [
        *zip(average.parameters(), values.parameters(), strict=True),
        *zip(average.buffers(), values.buffers(), strict=True),
    ]
    for averaged, current in pairs:
        kept = averaged.detach().clone()
        averaged.data.copy_(current)
        current.data.copy_(kept)
