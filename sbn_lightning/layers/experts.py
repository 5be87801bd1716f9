"""Sparse experts: the fused 3-D weights of a mixture of experts, as transformers 5 holds them.

transformers keeps the experts of a block in one parameter ``[experts, out_features, in_features]`` that belongs to no
linear layer. Here each of these parameters moves into a layer of :mod:`sbn_lightning.layers.experts_linear`, which
views the parameter as one matrix ``[experts * out_features, in_features]``. Each expert has a gamma (gate and up have
one each). The state dict keeps the parameter's old name, so checkpoints fit in both directions.

Routers stay dense: they are small, and a rounded router sends tokens to other experts.

Every conversion goes through this file: :func:`convert_experts` for latent weights and :func:`put_packed` for codes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.experts_linear import (
    PackedExperts,
    Routing,
    SparseBitExperts,
    SparseExpertsLinear,
)
from sbn_lightning.layers.instance_forward import change_class, why_class_stays
from sbn_lightning.layers.masked_linear import MaskedLinear
from sbn_lightning.sparsity.config import SparsityConfig

_UP, _DOWN = ("gate_up_proj", "up_proj"), "down_proj"
MASK_BUFFER, SCALE_PARAMETER = "_mask_bits", "_log_scale"
"""What follows the name of a fused weight in the names of its mask and its learned scales, in folders of Hugging Face.

There a name with a dot would have to belong to a module, and the fused weight is a parameter.
"""


class FusedWeight(MaskedLinear):
    """The part of a layer of experts whose parameter has three dimensions. Only :func:`convert_experts` makes one."""

    experts: int

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The latent weights of all experts as one matrix ``[experts * out, in_features]``, a view."""
        parameter = self._parameters["weight"]
        assert parameter is not None
        return parameter.flatten(0, 1)

    def latent(self) -> Tensor:
        """The latent weights of all experts; see :meth:`MaskedLinear.latent`."""
        weight = self._weight().detach()
        return (weight.full_tensor() if isinstance(weight, DTensor) else weight).flatten(0, 1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix.removesuffix(".")] = destination.pop(f"{prefix}weight")


class ExpertsWeight(FusedWeight, SparseBitExperts):  # type: ignore[misc]
    """One fused weight of a mixture of experts, ternary and sparse."""


class MaskedExpertsWeight(FusedWeight, SparseExpertsLinear):  # type: ignore[misc]
    """One fused weight of a mixture of experts with a mask, not quantised."""


class SparseExperts(nn.Module):
    """The forward of a converted block of experts. A conversion mixes it into the block's own class."""

    plain_class: type[nn.Module]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send tokens through their experts.

        Args:
            hidden_states: The tokens, ``[tokens, hidden]``.
            top_k_index: The experts of each token, int64 ``[tokens, k]``. Numbers from ``num_experts`` on are skipped.
            top_k_weights: The weights of the experts' outputs, ``[tokens, k]``.
        """
        own = cast(Any, self)
        up, down = own._modules[_UP[0] if own.has_gate else _UP[1]], own._modules[_DOWN]
        route = Routing.of(top_k_index, up.experts)
        hidden = up(route.gather(hidden_states), route.counts)
        hidden = own._apply_gate(hidden) if own.has_gate else own.act_fn(hidden)
        y = down(hidden, route.counts)
        return route.combine(y, top_k_weights).to(y.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in (*_UP, _DOWN):
            if isinstance(self._modules.get(name), FusedWeight):
                for theirs, ours in (("", ".weight"), (MASK_BUFFER, ".mask_bits"), (SCALE_PARAMETER, ".log_scale")):
                    if f"{prefix}{name}{theirs}" in state_dict:
                        state_dict[f"{prefix}{name}{ours}"] = state_dict.pop(f"{prefix}{name}{theirs}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so a pickle names the plain class, and makes the sparse one again.
        return _new_block, (self.plain_class,), vars(self).copy()


@cache
def _sparse_class(plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Sparse{plain.__name__}", (SparseExperts, plain), {"plain_class": plain})


def _new_block(plain: type[nn.Module]) -> nn.Module:
    cls = _sparse_class(cast(Any, plain))
    return cls.__new__(cls)


class Planned(NamedTuple):
    """A block of experts that is to be converted, with the new layers by the names of their weights."""

    module: nn.Module
    layers: dict[str, FusedWeight]


def fused_weights(module: nn.Module) -> list[str]:
    """Return the names of the fused expert weights of a module; empty if it is no block of dense experts."""
    if not hasattr(type(module), "_apply_gate"):
        return []
    names = [name for name in (*_UP, _DOWN) if isinstance(module._parameters.get(name), nn.Parameter)]
    if len(names) != 2 or any(cast(Tensor, module._parameters[name]).ndim != 3 for name in names):
        return []
    return names


def fused_block(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """Return the block of experts that holds a weight, and the weight's name in the block.

    Args:
        model: The model.
        name: The name of a weight, for example ``model.layers.0.mlp.experts.down_proj``.

    Returns:
        None if the name is not that of a fused weight, dense or converted.
    """
    parent, _, own = name.rpartition(".")
    try:
        block = model.get_submodule(parent)
    except AttributeError:
        return None
    converted = isinstance(block, SparseExperts) and own in (*_UP, _DOWN) and own in block._modules
    return (block, own) if converted or own in fused_weights(block) else None


def fused_shape(block: nn.Module, name: str) -> tuple[int, int, int]:
    """Return the number of experts, and the output and input features of one, of a fused weight in any form."""
    parameter = block._parameters.get(name)
    if parameter is not None:
        return cast("tuple[int, int, int]", tuple(parameter.shape))
    layer = cast(Any, block._modules[name])
    return layer.experts, layer.out_features // layer.experts, layer.in_features


def why_not(module: nn.Module, sparsity: SparsityConfig | None = None) -> str | None:
    """Return why a block of experts cannot be converted, or None.

    Args:
        module: A module that has :func:`fused_weights`.
        sparsity: The options of the new layers; None to ask about the block alone.
    """
    for option, reason in (
        ("has_bias", "its experts have biases"),
        ("is_transposed", "its experts hold transposed weights"),
        ("has_post_expert_norm", "its experts have norms of their own"),
    ):
        if getattr(module, option, False):
            return reason
    if not getattr(module, "is_concatenated", True):
        return "it interleaves gate and up"
    if sparsity is None:
        return None
    for name in fused_weights(module):
        parameter = cast(Tensor, module._parameters[name])
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            return f"{name} is {parameter.dtype}, and a latent weight needs 16 bits or more"
        if parameter.shape[-1] % sparsity.nm.m:
            return f"in_features={parameter.shape[-1]} of {name} is not a multiple of M={sparsity.nm.m}"
    return None


def active_experts(module: nn.Module) -> int | None:
    """Return how many experts of a block a token goes to, if the block's configuration says so."""
    active = getattr(getattr(module, "config", None), "num_experts_per_tok", None)
    return active if isinstance(active, int) else None


def plan_experts(module: nn.Module, sparsity: SparsityConfig) -> Planned:
    """Make the sparse layers of a block of experts. The block itself is not changed.

    Args:
        module: A block of experts for which :func:`why_not` returns None.
        sparsity: The options of the new layers. Each expert gets a gamma of its own, and gate and up get one each.
    """
    layers: dict[str, FusedWeight] = {}
    for name in fused_weights(module):
        parameter = cast(nn.Parameter, module._parameters[name])
        experts, rows, width = parameter.shape
        layer = nn.Linear(width, experts * rows, bias=False, device="meta")
        layer._parameters["weight"] = parameter
        layer.__class__ = MaskedExpertsWeight if sparsity.kind == "masked" else ExpertsWeight
        own = cast(Any, layer)
        own.experts, own.active = experts, active_experts(module)
        own._init_mask(replace(sparsity, split_sizes=_split_sizes(name, experts, rows)))
        layers[name] = own.train(module.training)
    return Planned(module, layers)


def convert_planned(planned: Planned) -> list[str]:
    """Put the planned layers into their block, and return the names of the weights."""
    module = planned.module
    for name, layer in planned.layers.items():
        del module._parameters[name]
        module._modules[name] = layer
    change_class(module, _sparse_class(cast(Any, type(module))))
    return list(planned.layers)


def convert_experts(module: nn.Module, sparsity: SparsityConfig) -> list[str]:
    """Make the fused experts of one module sparse, in place; see :func:`plan_experts`.

    Raises:
        ConfigError: If the block cannot get another class.
    """
    if (reason := why_class_stays(module)) is not None:
        raise ConfigError(f"the experts of this {type(module).__name__} cannot be converted: {reason}")
    return convert_planned(plan_experts(module, sparsity))


def put_packed(block: nn.Module, name: str, layer: PackedExperts) -> None:
    """Put a layer without latent weights in the place of a fused weight.

    Args:
        block: The block of experts, dense or converted. It computes again once both of its weights are packed.
        name: The name of the weight in the block.
        layer: The new layer.
    """
    block._parameters.pop(name, None)
    block._modules[name] = layer
    layer.active = active_experts(block)
    if not isinstance(block, SparseExperts):
        change_class(block, _sparse_class(cast(Any, type(block))))


def revert_experts(
    model: nn.Module, *, dtype: torch.dtype | None = None, packed_dtype: torch.dtype = torch.float32
) -> list[str]:
    """Turn all converted experts of a model back into plain ones.

    Args:
        model: The model, changed in place. The plain experts get the effective weights.
        dtype: The dtype of plain weights that had latent weights; None keeps theirs.
        packed_dtype: The dtype of plain weights that were packed.

    Returns:
        The names of the weights.
    """
    reverted = []
    for name, module in model.named_modules():
        if not isinstance(module, SparseExperts):
            continue
        layers: dict[str, Any] = {
            own: layer for own, layer in module._modules.items() if isinstance(layer, FusedWeight | PackedExperts)
        }
        for own, layer in layers.items():
            if isinstance(layer, FusedWeight):
                parameter = cast(nn.Parameter, layer._parameters["weight"])
                with torch.no_grad():
                    layer.weight.copy_(layer.effective_weight())
                    parameter.data = parameter.data.to(dtype or parameter.dtype)
                layer.tracker.let_go()
            else:
                weight = layer.effective_weight().to(packed_dtype)
                parameter = nn.Parameter(weight.unflatten(0, (layer.experts, -1)))
            del module._modules[own]
            module._parameters[own] = parameter
            reverted.append(f"{name}.{own}".lstrip(".").replace("_orig_mod.", ""))
        if layers:
            change_class(module, module.plain_class)
    return reverted


def empty_packed(block: nn.Module, name: str, pattern: str, activation_bits: int | None) -> PackedExperts:
    """Return a packed layer without storage for a fused weight of a block of dense experts.

    Args:
        block: The block.
        name: The name of the weight in the block.
        pattern: The pattern of the layer.
        activation_bits: The number of bits of its tokens.
    """
    experts, rows, width = cast(Tensor, block._parameters[name]).shape
    sizes = _split_sizes(name, experts, rows)
    sparsity = SparsityConfig.make(pattern, activation_bits=activation_bits, split_sizes=sizes)
    codes = torch.empty(experts * rows, width, dtype=torch.int8, device="meta")
    gamma = torch.empty(1 if sizes is None else len(sizes), dtype=torch.float32, device="meta")
    layer = PackedExperts(codes, gamma, None, sparsity=sparsity)
    layer.experts, layer.active = experts, active_experts(block)
    return layer


def _split_sizes(name: str, experts: int, rows: int) -> tuple[int, ...] | None:
    """The rows of each part of a fused weight: gate and up of each expert are parts."""
    parts = (rows // 2, rows // 2) if name == _UP[0] else (rows,)
    return parts * experts if len(parts) * experts > 1 else None


def check_shared(module: nn.Module, owners: Counter[int]) -> str | None:
    """Return why the weights of a block cannot be converted if another module has them too, or None."""
    shared = any(owners[id(module._parameters[name])] > 1 for name in fused_weights(module))
    return "shares its weight with another module" if shared else None
