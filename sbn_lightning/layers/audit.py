"""``audit``: how much of a model is sparse, what is not and why, and which layers a forward bypasses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sbn_lightning.layers.candidates import left_alone, not_linear, shape_of
from sbn_lightning.layers.conv1d import is_conv1d
from sbn_lightning.layers.conversion import named_modules
from sbn_lightning.layers.experts import active_experts, fused_weights, why_not
from sbn_lightning.layers.experts_linear import active_share
from sbn_lightning.layers.masked_linear import MaskedLinear
from sbn_lightning.layers.packed import PackedTernaryLinear

# PyTorch's fused inference, which torch's counter of FLOPs does not know. Each token of the first argument meets each
# matrix once.
_FUSED = (torch.ops.aten._native_multi_head_attention, torch.ops.aten._transformer_encoder_layer_fwd)


@dataclass
class Audit:
    """What :func:`audit` found.

    Attributes:
        parameters: The number of all parameters of the model; ternary codes of packed layers count too.
        linear_parameters: The number of parameters that multiply tokens: those of linear layers, and all others with
            two dimensions or more that are not embeddings.
        sparse_parameters: The number of weights in layers with a mask or ternary codes, masked ones included.
        linear_flops: The multiplications and additions of linear layers in the example forward. Without an example:
            those for one token, if each linear parameter multiplies each token once. Experts count as often as a token
            goes to them, if their configuration says how often. Dense fused experts are counted only without an
            example.
        sparse_flops: The part of ``linear_flops`` that falls to layers with a mask or ternary codes.
        measured: Whether the FLOPs are those of an example forward.
        skipped: The reason for each layer or parameter that is not sparse.
        bypassed: The layers with a mask whose latent weight the example forward used without calling the layer. Such a
            product is neither sparse nor ternary.
        not_called: The layers with a mask that the example forward did not use at all.
    """

    parameters: int = 0
    linear_parameters: int = 0
    sparse_parameters: int = 0
    linear_flops: int = 0
    sparse_flops: int = 0
    measured: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    bypassed: list[str] = field(default_factory=list)
    not_called: list[str] = field(default_factory=list)

    @property
    def parameter_share(self) -> float:
        """The share of all parameters that are in sparse layers, 0 to 1."""
        return self.sparse_parameters / max(self.parameters, 1)

    @property
    def linear_share(self) -> float:
        """The share of the linear parameters that are in sparse layers, 0 to 1."""
        return self.sparse_parameters / max(self.linear_parameters, 1)

    @property
    def flop_share(self) -> float:
        """The share of the linear FLOPs that sparse layers do, 0 to 1."""
        return self.sparse_flops / max(self.linear_flops, 1)

    def __str__(self) -> str:
        how = "in the example forward" if self.measured else "if each weight multiplies each token once"
        lines = [
            f"sparse: {self.parameter_share:.1%} of {self.parameters:,} parameters, {self.linear_share:.1%} of "
            f"{self.linear_parameters:,} linear ones, {self.flop_share:.1%} of linear FLOPs ({how})"
        ]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(name)
        lines += [f"not sparse, {reason}: {', '.join(names)}" for reason, names in by_reason.items()]
        if self.bypassed:
            lines.append(f"bypassed, so neither sparse nor ternary: {', '.join(self.bypassed)}")
        if self.not_called:
            lines.append(f"not called: {', '.join(self.not_called)}")
        return "\n".join(lines)


def audit(model: nn.Module, forward: Callable[[], Any] | None = None) -> Audit:
    """Say how much of a model is sparse.

    Args:
        model: Any model, converted or not. It is not changed.
        forward: A function that runs the model once, for example ``lambda: model(tokens)``. The audit then counts the
            FLOPs that happen in this run. It also finds layers that the model bypasses, as the fused inference of
            ``nn.TransformerEncoder`` and timm's SwinV2 do. The function runs without gradients.

    Returns:
        The audit; ``print(audit(model))`` shows it.
    """
    found = Audit()
    sparse: dict[str, nn.Module] = {}
    plain: dict[str, nn.Module] = {}
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    found.parameters = sum(p.numel() for p in model.parameters())
    idle = sparse_idle = 0  # The weights of experts that a token does not go to.
    for name, module in named_modules(model):
        if isinstance(module, (MaskedLinear, PackedTernaryLinear)):
            weights = module.in_features * module.out_features
            found.sparse_parameters += weights
            found.linear_parameters += weights
            found.parameters += weights if isinstance(module, PackedTernaryLinear) else 0
            idle += _idle(module)
            sparse_idle += _idle(module)
            sparse[name] = module
        elif isinstance(module, nn.Linear) or is_conv1d(module):
            plain[name] = module
            shared = owners[id(module._parameters.get("weight"))] > 1
            found.linear_parameters += 0 if shared else _product(shape_of(module))
            found.skipped[name] = (
                "shares its weight with another module" if shared else left_alone(model, name, module)
            ) or "not converted"
            idle += _idle(module)
        elif fused := fused_weights(module):
            matrices = [cast(Tensor, module._parameters[weight]) for weight in fused]
            names = [f"{name}.{weight}".lstrip(".") for weight in fused]
            found.skipped |= dict.fromkeys(names, why_not(module) or "fused experts that are not converted")
            size = sum(matrix.numel() for matrix in matrices)
            found.linear_parameters += size
            idle += round(size * (1 - min((active_experts(module) or len(matrices[0])) / len(matrices[0]), 1.0)))
        elif reasons := not_linear(name, module):
            found.skipped.update(reasons)
            found.linear_parameters += sum(p.numel() for p in module.parameters(recurse=False) if p.ndim >= 2)
    if forward is None:
        heads = sum(_product(shape_of(module)) for module in plain.values() if owners[id(module.weight)] > 1)
        found.linear_flops, found.sparse_flops = (
            2 * (found.linear_parameters + heads - idle),
            2 * (found.sparse_parameters - sparse_idle),
        )
    else:
        _measure(found, model, forward, sparse, plain)
    return found


def _measure(
    found: Audit,
    model: nn.Module,
    forward: Callable[[], Any],
    sparse: dict[str, nn.Module],
    plain: dict[str, nn.Module],
) -> None:
    layers = sparse | plain
    tokens: Counter[str] = Counter()
    inside: list[str] = []

    def watched(name: str, own_forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        inside.append(name)
        tokens[name] += x.numel() // x.shape[-1]
        try:
            return own_forward(x, *args, **kwargs)
        finally:
            inside.remove(name)

    # Forward methods are replaced because hooks would not do: PyTorch turns its fused inference off for layers with
    # hooks, and the audit could not see it.
    before = {name: vars(module).get("forward") for name, module in layers.items()}
    for name, module in layers.items():
        vars(module)["forward"] = partial(watched, name, module.forward)
    latent = {
        module._parameters["weight"].untyped_storage().data_ptr(): name  # type: ignore[union-attr]
        for name, module in sparse.items()
        if isinstance(module, MaskedLinear)
    }
    watch = _WatchWeights(latent, _other_weights(model, sparse, plain), inside)
    try:
        with torch.no_grad(), watch:
            forward()
    finally:
        for name, module in layers.items():
            vars(module).pop("forward")
            if before[name] is not None:
                vars(module)["forward"] = before[name]
    # Each token of a layer of experts meets one expert's rows.
    size = {name: _product(shape_of(layer)) // getattr(layer, "experts", 1) for name, layer in layers.items()}
    flops = {name: 2 * count * size[name] for name, count in tokens.items()}
    found.measured = True
    found.linear_flops = sum(flops.values()) + watch.flops
    found.sparse_flops = sum(count for name, count in flops.items() if name in sparse)
    found.bypassed = [name for name in sparse if name in watch.used]
    found.not_called = [name for name in sparse if not tokens[name] and name not in watch.used]


class _WatchWeights(TorchDispatchMode):
    """Notes every operation on the weight of a layer that runs while the layer is not being called.

    Args:
        latent: The latent weights of sparse layers: the place in memory, and the name of the layer.
        others: All other matrices that multiply tokens: the place in memory, and the name of the linear layer; "" for
            a matrix that belongs to no linear layer, such as the packed q, k and v of ``nn.MultiheadAttention``.
        inside: The names of the layers that are being called.

    Attributes:
        used: The sparse layers whose weights were used without calling the layers.
        flops: The FLOPs of products with all these matrices, outside of the calls of their layers.
    """

    def __init__(self, latent: dict[int, str], others: dict[int, str], inside: list[str]) -> None:
        super().__init__()
        self.latent, self.others, self.inside = latent, others, inside
        self.used: set[str] = set()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(returned.alias_info for returned in func._schema.returns):  # A view computes nothing.
            return result
        counts = False
        matrices = 0
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and not value.is_meta:
                place = value.untyped_storage().data_ptr()
                name = self.latent.get(place)
                if name is not None and name not in self.inside:
                    self.used.add(name)
                    counts = True
                    matrices += value.numel()
                name = self.others.get(place)
                if name is not None and name not in self.inside:
                    counts = True
                    matrices += value.numel()
        if func._overloadpacket in _FUSED:
            self.flops += 2 * matrices * (args[0].numel() // args[0].shape[-1])
        elif counts and (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def _other_weights(model: nn.Module, sparse: dict[str, nn.Module], plain: dict[str, nn.Module]) -> dict[int, str]:
    """Return the matrices that multiply tokens and are not in ``sparse``, as ``_WatchWeights`` wants them."""
    embeddings = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    known = {id(one) for module in (*sparse.values(), *embeddings) for one in module.parameters(recurse=False)}
    owner = {id(one): name for name, layer in plain.items() for one in layer.parameters(recurse=False)}
    return {
        one.untyped_storage().data_ptr(): owner.get(id(one), "")
        for one in model.parameters()
        if one.ndim >= 2 and id(one) not in known
    }


def _idle(layer: nn.Module) -> int:
    """The number of weights of a layer that do not multiply a token, because they are other experts'."""
    return round((1 - active_share(layer)) * _product(shape_of(layer)))


def _product(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]
