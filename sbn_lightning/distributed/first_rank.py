"""``send_from_first_rank``: all ranks begin with the weights of the first one, whole or before they are sharded."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def send_from_first_rank(
    module: nn.Module, groups: Iterable[dist.ProcessGroup], device_type: str, ignored: Collection[str] = ()
) -> None:
    """Give all ranks the parameters and buffers of the first one.

    The tensors travel one after the other, because a GPU may not hold the whole model. A tensor that is equal already
    stays untouched, so a mask that was loaded with its weight stays valid. Tensors on the device ``meta`` are left out.

    Args:
        module: The model, with whole weights on a host or on the devices of the ranks.
        groups: The ranks: one group of all, or one group for each dimension of a mesh.
        device_type: The kind of device between which tensors travel.
        ignored: The names of parameters and buffers that are left out.
    """
    groups = [group for group in groups if group.size() > 1]
    if not groups:
        return
    device = torch.device(device_type)
    if device.type != "cpu":
        device = torch.device(device.type, torch.get_device_module(device).current_device())
    for name, value in chain(module.named_parameters(), module.named_buffers()):
        if name in ignored or value.is_meta or not value.numel() or isinstance(value, DTensor):
            continue
        # Bytes travel, because NCCL and gloo do not know every dtype.
        own = value.detach().to(device).reshape(-1).view(torch.uint8)
        whole = own.clone()
        for group in groups:
            dist.broadcast(whole, dist.get_global_rank(group, 0), group=group)
        if not torch.equal(whole, own):
            value.copy_(whole.view(value.dtype).view(value.shape))
