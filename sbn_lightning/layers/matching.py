"""Converts a plain model so that it fits a saved state dict: the way back from the file of a converted model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.candidates import guess_split_sizes, shape_of
from sbn_lightning.layers.conversion import (
    _convert,
    _describe,
    _first_mask,
    _Planned,
    _unsuitable,
    connect_layers,
)
from sbn_lightning.layers.experts import Planned, convert_planned, fused_block, plan_experts, why_not
from sbn_lightning.layers.instance_forward import why_class_stays
from sbn_lightning.layers.masked_linear import MaskedLinear
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern


def convert_to_match(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    sparsity: SparsityConfig | NMPattern | str | None = None,
    **options: Any,
) -> list[str]:
    """Convert exactly the layers that have a mask in a saved state dict.

    The state dict can be loaded afterwards::

        state = torch.load("converted.ckpt")["state_dict"]
        convert_to_match(module, state)
        module.load_state_dict(state)

    Args:
        model: A model with plain layers, changed in place.
        state_dict: The state dict of a converted model.
        sparsity: The options of the layers, for a state dict that does not carry them. ``state_dict()`` keeps options
            in its metadata. ``torch.save`` saves the metadata; safetensors and sharded checkpoints lose it. Without it,
            the rows of fused layers are guessed as in a conversion.
        **options: Single fields of :class:`SparsityConfig`.

    Returns:
        The names of the converted layers.

    Raises:
        ConfigError: If the state dict has no masks, if it has a mask that no layer of the model can take, if neither
            the state dict nor the caller says what the options are, if the two contradict each other, or if ``include``
            or ``exclude`` is given. The model is unchanged then.
    """
    if chosen := [name for name in ("include", "exclude") if name in options]:
        raise ConfigError(
            f"leave out {' and '.join(chosen)}: the masks of the state dict say which layers are converted"
        )
    names = [name.removesuffix(".mask_bits") for name in state_dict if name.endswith(".mask_bits")]
    if not names:
        raise ConfigError("the state dict has no masks: it was not saved from a converted model")
    metadata = getattr(state_dict, "_metadata", {})
    modules = dict(model.named_modules())
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    plan = []
    experts: dict[int, Planned] = {}
    for name in names:
        fused = fused_block(model, name)
        module = modules.get(name) if fused is None else fused[0]
        if module is None or isinstance(module, MaskedLinear) or (name in modules and fused is not None):
            raise ConfigError(f"the state dict has a mask for {name}, and the model has no plain layer of that name")
        saved = metadata.get(name, {}).get("sparsity")
        own = _options_of(name, saved, sparsity, options)
        if fused is None:
            reason = _unsuitable(module, owners, own.nm) or _why_no_place(module, state_dict[f"{name}.mask_bits"])
        else:
            reason = why_not(module, own)
        if (reason := reason or why_class_stays(module)) is not None:
            raise ConfigError(f"the state dict has a mask for {name}, which cannot have one: {reason}")
        if fused is None:
            if saved is None and own.split_sizes is None:
                own = replace(own, split_sizes=guess_split_sizes(model, name, module))
            plan.append(_Planned(name, module, own, _first_mask(name, module, own)))
        elif id(module) not in experts:  # Both weights of the experts are converted together.
            experts[id(module)] = plan_experts(module, own)
    for planned in plan:
        _convert(planned)
    for block in experts.values():
        convert_planned(block)
    connect_layers(model)
    return names


def _options_of(
    name: str, saved: dict[str, Any] | None, sparsity: SparsityConfig | NMPattern | str | None, options: dict[str, Any]
) -> SparsityConfig:
    """The options of a saved layer, from the state dict or from the caller."""
    if saved is None:
        if sparsity is None and not options:
            raise ConfigError(
                f"the state dict does not say how {name} was converted: give the options of the training, for example "
                'pattern="2:4"'
            )
        return SparsityConfig.make(sparsity, **options)
    own = wanted = SparsityConfig(**saved)
    if isinstance(sparsity, SparsityConfig):
        wanted = replace(sparsity, split_sizes=sparsity.split_sizes or own.split_sizes)
    elif sparsity is not None:
        wanted = replace(own, pattern=sparsity)
    if (wanted := replace(wanted, **options)) != own:
        raise ConfigError(
            f"the state dict says that {name} was converted to {_describe(own)}, and not to {_describe(wanted)}: leave "
            "the options out; another conversion is convert_linears, after which the weights load without the masks"
        )
    return own


def _why_no_place(module: nn.Module, saved_mask: Tensor) -> str | None:
    """Why a layer has no place for a saved mask; None if it has."""
    in_features, out_features = shape_of(module)
    if tuple(saved_mask.shape) == (out_features, -(-in_features // 8)):
        return None
    return (
        f"the layer is {in_features} -> {out_features}, and the mask is of {saved_mask.shape[0]} rows with "
        f"{8 * saved_mask.shape[-1]} bits"
    )
