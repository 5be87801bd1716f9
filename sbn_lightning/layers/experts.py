"""Ternary N:M experts: the fused 3-D weights of a mixture of experts, as transformers 5 holds them.

transformers keeps the experts of a block in one parameter ``[experts, out_features, in_features]`` that belongs to no
linear layer. Here each of these parameters moves into an :class:`ExpertsWeight`, a :class:`SparseBitLinear` that
views it as one matrix ``[experts * out_features, in_features]`` with a gamma for each expert (and for gate and up).
Masks, schedules, statistics and optimisers therefore treat experts like any other layer. The state dict keeps the
parameter's old name, so checkpoints fit in both directions.

The forward loops over the experts that got tokens, and calls the layer's backend once for each. Routers stay dense:
they are small, and a rounded router sends tokens to other experts.

The class of a converted block is made at the moment of the conversion, and cannot be pickled. So save the state dict:
``torch.save`` of the whole model fails.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from sbn_lightning.backends.reference import REFERENCE
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.sparsity.config import SparsityConfig

_UP, _DOWN = ("gate_up_proj", "up_proj"), "down_proj"


class ExpertsWeight(SparseBitLinear):
    """One fused weight of a mixture of experts. Only :func:`convert_experts` makes one."""

    experts: int

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The latent weights of all experts as one matrix ``[experts * out, in_features]``, a view."""
        parameter = self._parameters["weight"]
        assert parameter is not None
        return parameter.flatten(0, 1)

    def by_expert(self) -> list[tuple[Tensor, Any, Tensor | None]]:
        """Return the latent weight, the prepared weight and the gradient mask of each expert, all up to date."""
        self.prepare()
        parameter = self._parameters["weight"]
        assert parameter is not None
        mask = self._gradient_mask(self.mask_bits)
        masks = [None] * self.experts if mask is None else mask.chunk(self.experts)
        return list(zip(parameter.unbind(0), self._prepared_by_expert(), masks, strict=True))

    def _prepared_by_expert(self) -> list[Any]:
        if self.backend is REFERENCE:
            fields = [part.chunk(self.experts) for part in self._prepared]
            return [type(self._prepared)(*one) for one in zip(*fields, strict=True)]
        key = self._prepared_key()
        if vars(self).get("_experts_of") != key:
            sizes = self.split_sizes
            own = replace(self.sparsity, split_sizes=None if sizes is None else sizes[: len(sizes) // self.experts])
            latents, bits = self.latent().chunk(self.experts), self.mask_bits.chunk(self.experts)
            with torch.inference_mode(False), torch.no_grad():
                self._experts = [
                    self.backend.prepare(latent, mask, self._most_kept, own)
                    for latent, mask in zip(latents, bits, strict=True)
                ]
            self._experts_of = key
        return self._experts

    def multiply(self, x: Tensor, one: tuple[Tensor, Any, Tensor | None]) -> Tensor:
        """Multiply the tokens of one expert.

        Args:
            x: The tokens, ``[tokens, in_features]``.
            one: The expert's entry in the list that :meth:`by_expert` returns.

        Returns:
            The products, ``[tokens, out]``.
        """
        latent, prepared, mask = one
        return self.backend.linear(x, latent, prepared, mask, self.activation_bits)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k not in ("_experts", "_experts_of")}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix.removesuffix(".")] = destination.pop(f"{prefix}weight")


class SparseExperts(nn.Module):
    """The forward of a converted block of experts. A conversion mixes it into the block's own class."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send tokens through their experts.

        Args:
            hidden_states: The tokens, ``[tokens, hidden]``.
            top_k_index: The experts of each token, int64 ``[tokens, k]``. Numbers from ``num_experts`` on are skipped.
            top_k_weights: The weights of the experts' outputs, ``[tokens, k]``.
        """
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        own = cast(Any, self)
        up: ExpertsWeight = own._modules[_UP[0]] if own.has_gate else own._modules[_UP[1]]
        down: ExpertsWeight = own._modules[_DOWN]
        ups, downs = up.by_expert(), down.by_expert()
        result = torch.zeros_like(hidden_states)
        with torch.autocast(device, enabled=False):
            for expert in top_k_index.unique().tolist():
                if expert >= len(ups):
                    continue
                token, place = torch.where(top_k_index == expert)
                hidden = up.multiply(hidden_states[token], ups[expert])
                hidden = own._apply_gate(hidden) if own.has_gate else own.act_fn(hidden)
                y = down.multiply(hidden, downs[expert]) * top_k_weights[token, place, None]
                result = result.index_add(0, token, y.to(result.dtype))
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in (*_UP, _DOWN):
            if f"{prefix}{name}" in state_dict and isinstance(self._modules.get(name), ExpertsWeight):
                state_dict[f"{prefix}{name}.weight"] = state_dict.pop(f"{prefix}{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)


@cache
def _sparse_class(plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Sparse{plain.__name__}", (SparseExperts, plain), {"plain_class": plain})


def fused_weights(module: nn.Module) -> list[str]:
    """Return the names of the fused expert weights of a module; empty if it is no block of experts."""
    if not hasattr(type(module), "_apply_gate"):
        return []
    names = [name for name in (*_UP, _DOWN) if isinstance(module._parameters.get(name), nn.Parameter)]
    if len(names) != 2 or any(cast(Tensor, module._parameters[name]).ndim != 3 for name in names):
        return []
    return names


def why_not(module: nn.Module, sparsity: SparsityConfig) -> str | None:
    """Return why a block of experts cannot be converted, or None."""
    if sparsity.kind != "ternary":
        return "fused experts become ternary only"
    for option, reason in (
        ("has_bias", "its experts have biases"),
        ("is_transposed", "its experts hold transposed weights"),
        ("has_post_expert_norm", "its experts have norms of their own"),
    ):
        if getattr(module, option, False):
            return reason
    if not getattr(module, "is_concatenated", True):
        return "it interleaves gate and up"
    for name in fused_weights(module):
        if (width := cast(Tensor, module._parameters[name]).shape[-1]) % sparsity.nm.m:
            return f"in_features={width} of {name} is not a multiple of M={sparsity.nm.m}"
    return None


def convert_experts(module: nn.Module, sparsity: SparsityConfig) -> list[str]:
    """Make the fused experts of one module ternary and sparse, in place.

    Args:
        module: A block of experts for which :func:`why_not` returns None.
        sparsity: The options of the new layers. Each expert gets a gamma of its own, and gate and up get one each.

    Returns:
        The names of the converted weights.
    """
    names = fused_weights(module)
    for name in names:
        parameter = cast(nn.Parameter, module._parameters.pop(name))
        experts, rows, width = parameter.shape
        layer = nn.Linear(width, experts * rows, bias=False, device="meta")
        layer._parameters["weight"] = parameter
        layer.__class__ = ExpertsWeight
        own = cast(ExpertsWeight, layer)
        own.experts = experts
        parts = (rows // 2, rows // 2) if name == _UP[0] else (rows,)
        own._init_mask(replace(sparsity, split_sizes=parts * experts))
        module._modules[name] = own.train(module.training)
    module.__class__ = _sparse_class(cast(Any, type(module)))
    return names


def revert_experts(model: nn.Module, *, effective: bool = True) -> list[str]:
    """Turn all converted experts of a model back into plain ones.

    Args:
        model: The model, changed in place.
        effective: Whether the plain experts get the effective weights. If False they keep the latent ones, which
            undoes a conversion.

    Returns:
        The names of the weights.
    """
    reverted = []
    for name, module in model.named_modules():
        if not isinstance(module, SparseExperts):
            continue
        for own in (*_UP, _DOWN):
            layer = module._modules.get(own)
            if isinstance(layer, ExpertsWeight):
                if effective:
                    with torch.no_grad():
                        layer.weight.copy_(layer.effective_weight())
                del module._modules[own]
                module._parameters[own] = layer._parameters["weight"]
                reverted.append(f"{name}.{own}".lstrip("."))
        module.__class__ = cast(Any, type(module)).plain_class
    return reverted


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a model with fused experts that are still dense, by name."""
    return {name: module for name, module in model.named_modules() if fused_weights(module)}
