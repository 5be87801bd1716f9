"""``send_from_first_rank``: all ranks begin with the weights of the first one, before the weights are sharded."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


@torch.no_grad()
def send_from_first_rank(module: nn.Module, mesh: DeviceMesh) -> None:
    """Give all ranks of a mesh the parameters and buffers of its first rank.

    The tensors travel one after the other, because a GPU may not hold the whole model. A tensor that is equal already
    stays untouched, so a mask that was loaded with its weight stays valid. Tensors on the device ``meta`` are left out.

    Args:
        module: The model, with whole weights on a host or on the devices of the mesh.
        mesh: The ranks.
    """
    if mesh.size() == 1:
        return
    device = torch.device(mesh.device_type)
    if device.type != "cpu":
        device = torch.device(device.type, torch.get_device_module(device).current_device())
    for value in (*module.parameters(), *module.buffers()):
        if value.is_meta or isinstance(value, DTensor):
            continue
        own = value.detach().to(device).contiguous()
        whole = own.clone()
        for dimension in range(mesh.ndim):
            group = mesh.get_group(dimension)
            dist.broadcast(whole, dist.get_global_rank(group, 0), group=group)
        if not torch.equal(whole, own):
            value.copy_(whole)
