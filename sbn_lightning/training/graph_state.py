"""What a CUDA graph of a training step depends on, and Python alone sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sbn_lightning.distributed.gradient_mean import means_of
from sbn_lightning.distributed.whole_parameters import local
from sbn_lightning.layers.masked_linear import masked_layers


def form(prepared: tuple[Any, ...]) -> tuple[Any, ...]:
    """The shapes and dtypes of the tensors of a prepared weight, and its other fields as they are."""
    return tuple((v.shape, v.dtype) if isinstance(v, Tensor) else v for v in prepared)


def writable(prepared: Any) -> Any:
    """A prepared weight whose tensors can be written to: the reference expands the scale of a part to its rows."""
    return prepared._make(v.contiguous() if isinstance(v, Tensor) and 0 in v.stride() else v for v in prepared)


def addresses(model: nn.Module) -> list[Any]:
    """Where the parameters of a model lie on this rank, and which of them are trained."""
    return [(id(one), local(one).data_ptr(), one.requires_grad) for one in model.parameters()]


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """What decides which kernels run on which addresses, and is not a value on the GPU."""
    layers = []
    for _, layer in masked_layers(model):
        prepared, rounding = getattr(layer, "_prepared", None), getattr(layer, "_rounding", None)
        layers.append((
            None if prepared is None else form(prepared), id(layer.backend), layer.regrow, layer.hold_mask,
            layer.density, layer.mask_bits.data_ptr(), None if rounding is None else rounding[0].data_ptr(),
        ))  # fmt: skip
    device = next(model.parameters()).device.type
    means = frozenset((id(mean), mean.hold) for mean in means_of(model))
    return model.training, torch.is_autocast_enabled(device), means, tuple(layers)
