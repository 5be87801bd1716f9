"""Turns sparse layers back into the plain layers they were, in place.

A reversion first looks for everything that can go wrong and computes every ternary weight, and only then changes the
first layer. So it happens as a whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sbn_lightning.layers.connection import named_modules, switch_fused_inference
from sbn_lightning.layers.experts import SparseExperts, revert_experts
from sbn_lightning.layers.experts_linear import PackedExperts
from sbn_lightning.layers.instance_forward import change_class, refuse, why_class_stays
from sbn_lightning.layers.masked_linear import MaskedLinear
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.layers.sparse_linear import SparseLinear
from sbn_lightning.layers.swiglu_fusion import split_swiglu

METHOD = "sbn"  # Our quantisation method in transformers.


def revert_linears(model: nn.Module) -> list[str]:
    """Turn sparse layers back into the plain layers they were, which now hold the effective weight.

    Parameter objects stay the same, and packed layers get new ones. The plain layers do not quantise their tokens, so
    the outputs of ternary layers change by the size of that rounding. Convert with ``activation_bits=None`` if this
    matters.

    A model of transformers is no longer marked as quantised, so ``save_pretrained`` writes a dense folder. Before a
    reversion its weights are latent weights, and ``from_pretrained`` would use them as they are, unless the folder
    names our quantisation method. Revert also before a LoRA is merged (``merge_and_unload``): in a masked layer it
    would become part of the latent weight and be rounded away.

    Args:
        model: The model, changed in place: as a whole or, on an error, not at all.

    Returns:
        The names of the layers.

    Raises:
        ConfigError: If the ``forward`` of a layer was replaced, or its weights are offloaded.
    """
    names = revert_layers(model)
    for module in model.modules():
        _forget_quantization(module)
    return names


def revert_layers(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Do what :func:`revert_linears` does to layers, and nothing else.

    Args:
        model: The model.
        dtype: The dtype of the plain weights. None keeps that of latent weights; packed layers get that of the model's
            first parameter of floating-point numbers.
    """
    refuse({name: why for name, module in named_modules(model) if (why := _why_not(module))}, "reverted")
    layers = {name: one for name, one in named_modules(model) if isinstance(one, MaskedLinear | PackedTernaryLinear)}
    with torch.no_grad():
        for layer in layers.values():
            if isinstance(layer, MaskedLinear):
                layer.prepare()  # Raises whatever can go wrong, before the first layer is changed.
        of_packed = dtype or dtype_of(model)
        experts = set(revert_experts(model, dtype=dtype, packed_dtype=of_packed))
        for name, layer in layers.items():
            if name in experts:
                continue
            if isinstance(layer, MaskedLinear):
                _revert_masked(layer, dtype)
            else:
                _revert_packed(layer, of_packed)
    split_swiglu(model)
    switch_fused_inference(model, on=True)
    return list(layers)


def _why_not(module: nn.Module) -> str | None:
    changes = isinstance(module, MaskedLinear | PackedTernaryLinear | SparseExperts)
    return why_class_stays(module) if changes else None


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the first parameter of floating-point numbers; float32 if there is none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _revert_masked(layer: MaskedLinear, dtype: torch.dtype | None) -> None:
    layer.weight.copy_(layer.effective_weight())
    layer.tracker.let_go()
    transposed = "converted_from" in vars(layer)
    plain = vars(layer).pop("converted_from", nn.Linear)
    # Not the class for a Conv1D: only a conversion can make one.
    own = (SparseBitLinear if isinstance(layer, SparseBitLinear) else SparseLinear)(1, 1, sparsity="1:1", device="meta")
    for extra in _extra(own) | ({"in_features", "out_features"} if transposed else set()):
        vars(layer).pop(extra, None)
    del layer.mask_bits
    layer._parameters.pop("log_scale", None)  # The effective weight has the learned factor.
    change_class(layer, plain)
    if dtype is not None:
        layer.to(dtype)


def _revert_packed(layer: PackedTernaryLinear, dtype: torch.dtype) -> None:
    assert not isinstance(layer, PackedExperts)
    weight, bias, plain = layer.effective_weight().to(dtype), layer.bias, layer.plain_class
    in_features, out_features = layer.in_features, layer.out_features
    own = PackedTernaryLinear(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1), sparsity="1:1")
    for extra in _extra(own) | {"plain_class", "_name", "in_features", "out_features"}:
        vars(layer).pop(extra, None)
    for buffer in own._buffers:
        layer._buffers.pop(buffer, None)
    layer._non_persistent_buffers_set -= set(own._buffers)
    change_class(layer, plain)
    if plain is nn.Linear:
        vars(layer).update(in_features=in_features, out_features=out_features)
    else:  # A Conv1D, whose weight is transposed.
        vars(layer).update(nx=in_features, nf=out_features)
        weight = weight.t().contiguous()
    layer.register_parameter("weight", nn.Parameter(weight))
    layer.register_parameter("bias", None if bias is None else nn.Parameter(_plain(bias).to(dtype)))


def _plain(tensor: Tensor) -> Tensor:
    """A copy of a tensor, without attributes that somebody put on it."""
    return tensor.detach().clone()


def _extra(own: nn.Module) -> set[str]:
    """The attributes that a layer of ours has and a plain one has not."""
    return set(vars(own)) - set(vars(nn.Linear(1, 1, device="meta")))


def _forget_quantization(module: nn.Module) -> None:
    """Remove what marks a model of transformers as quantised by our method. transformers is not imported."""
    config: Any = getattr(module, "config", None)
    if _is_ours(getattr(config, "quantization_config", None)):
        del config.quantization_config
    own = vars(module)
    if _is_ours(getattr(own.get("hf_quantizer"), "quantization_config", None)):
        # Fused experts are again saved as transformers saves them.
        for name in ("hf_quantizer", "quantization_method", "is_quantized", "_weight_conversions"):
            own.pop(name, None)


def _is_ours(quantization: Any) -> bool:
    if isinstance(quantization, Mapping):
        return quantization.get("quant_method") == METHOD
    return getattr(quantization, "quant_method", None) == METHOD
