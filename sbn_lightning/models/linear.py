"""The linear layers of a block: ternary, masked or dense, as the configuration says."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.layers.sparse_linear import SparseLinear
from sbn_lightning.models.config import TransformerConfig


def make_linear(
    config: TransformerConfig, in_features: int, splits: tuple[int, ...], *, bias: bool = False
) -> nn.Linear:
    """Make a linear layer of the kind ``config.linear``.

    Args:
        config: The configuration of the model.
        in_features: The width of the tokens.
        splits: The rows of each part of a fused layer. A ternary layer has one gamma for each part.
        bias: Whether the layer has a bias.
    """
    if config.linear == "dense":
        return nn.Linear(in_features, sum(splits), bias)
    sparsity = replace(config.sparsity, split_sizes=splits if len(splits) > 1 else None)
    layer = SparseLinear if config.linear == "masked" else SparseBitLinear
    return layer(in_features, sum(splits), bias, sparsity=sparsity)


def apply_rules(model: nn.Module, config: TransformerConfig) -> None:
    """Replace the linear layers of a new model whose kind ``config.layers`` changes.

    Args:
        model: The model, whose layers all have the kind ``config.linear``.
        config: The configuration of the model.

    Raises:
        ConfigError: If a rule matches no layer, or names a layer of experts.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("blocks.")}
    for rule in config.layers:
        if not any(fnmatchcase(name, rule.match) for name in layers):
            raise ConfigError(f"layers: no linear layer has a name like {rule.match!r}; there is {next(iter(layers))}")
    for name, layer in layers.items():
        if (kind := config.kind_of(name)) == config.linear:
            continue
        if config.n_experts and ".mlp." in name:
            raise ConfigError(f"layers: {name} holds experts, which all have the kind of the model")
        splits: tuple[int, ...] = (layer.out_features,)
        if name.endswith("attention.qkv"):
            splits = model.get_submodule(name.removesuffix(".qkv")).splits  # type: ignore[assignment]
        elif name.endswith("mlp.gate_up"):
            splits = (layer.out_features // 2,) * 2
        own = replace(config, linear=kind, layers=())
        model.set_submodule(name, make_linear(own, layer.in_features, splits, bias=layer.bias is not None))
