"""What layers share: options as attributes, a check of the tokens, the dtype of the result, and who has hooks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sbn_lightning.core.errors import ConfigError


def config_option(name: str) -> Any:
    """Make a property of a layer that reads and writes one field of ``layer.sparsity``."""

    def read(layer: Any) -> Any:
        return getattr(layer.sparsity, name)

    def write(layer: Any, value: Any) -> None:
        layer.sparsity = replace(layer.sparsity, **{name: value})

    return property(read, write, doc=f"The field ``{name}`` of ``sparsity``.")


def result_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a layer's result: autocast's dtype where autocast is on, else the dtype of the tokens."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def check_tokens(x: Tensor, layer: str) -> None:
    """Refuse tokens that are not floating-point numbers, as ``nn.Linear`` does.

    Args:
        x: The tokens.
        layer: The name of the layer, for the message.

    Raises:
        ConfigError: If the tokens are of another dtype. The message names the layer and the dtype.
    """
    if not x.is_floating_point():
        raise ConfigError(
            f"{layer}: the tokens are {x.dtype}, not floating-point numbers: pass x.float(), or embed ids"
        )


def in_compiled_training() -> bool:
    """Whether ``torch.compile`` traces a forward with gradients at the moment."""
    return torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody has put a hook on a module, or a ``forward`` into the instance, as accelerate does."""
    return "forward" in module.__dict__ or any(getattr(module, hooks) for hooks in _HOOKS)
