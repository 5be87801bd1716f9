"""Turns the ``nn.Linear`` layers of any model into masked ones, and back.

A layer is changed in place: it gets another class. Parameter objects, hooks, references from elsewhere in the model
and an existing optimiser therefore stay valid. A conversion takes only exact ``nn.Linear`` instances, and GPT-2's
``Conv1D``, which is a linear layer with a transposed weight, and the fused experts of transformers 5
(:mod:`sbn_lightning.layers.experts`). A subclass of ``nn.Linear`` may be used in another way:
``nn.MultiheadAttention`` reads the weight of its ``out_proj`` and never calls the layer.

A conversion first checks every layer and computes every mask, and only then changes the first layer. So it happens as a
whole or not at all. :mod:`sbn_lightning.layers.reversion` is the way back.

Convolutions are left alone. The quantiser scales each token, and a convolution with a window larger than 1x1 has no
tokens: a pixel takes part in many windows, and each window has a maximum of its own. A 1x1 convolution is a linear
layer over channels, and can be written as an ``nn.Linear``. The patch embedding of a vision model is an input layer,
which is best kept in high precision anyway.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.candidates import (
    guess_split_sizes,
    is_output_head,
    left_alone,
    name_matches,
    not_linear,
    shape_of,
)
from sbn_lightning.layers.connection import connect_layers as connect_layers
from sbn_lightning.layers.connection import named_modules as named_modules
from sbn_lightning.layers.conv1d import SparseBitConv1D, SparseConv1D, is_conv1d
from sbn_lightning.layers.conversion_report import ConversionReport as ConversionReport
from sbn_lightning.layers.experts import (
    Planned,
    check_shared,
    convert_planned,
    fused_weights,
    plan_experts,
    why_not,
)
from sbn_lightning.layers.instance_forward import change_class, refuse, why_class_stays
from sbn_lightning.layers.latent_dtype import has_16_bits, note_told
from sbn_lightning.layers.masked_linear import MaskedLinear
from sbn_lightning.layers.reversion import revert_linears as revert_linears
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.layers.sparse_linear import SparseLinear
from sbn_lightning.layers.ties import find_ties
from sbn_lightning.sparsity.config import Kind, SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern, pattern_for

# The classes of converted layers by kind: the class for an ``nn.Linear``, and the class for a ``Conv1D``.
_CLASSES: dict[Kind, tuple[type[MaskedLinear], type[MaskedLinear]]] = {
    "ternary": (SparseBitLinear, SparseBitConv1D),
    "masked": (SparseLinear, SparseConv1D),
}
_CUT = r"in_features=(\d+) "  # Matches the reason of a layer whose rows would be cut in the middle of a group.


@dataclass
class _Planned:
    """A layer that is to be converted, with its new options and its first mask."""

    name: str
    module: nn.Module
    sparsity: SparsityConfig
    mask_bits: Tensor


def as_patterns(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Return patterns as a tuple. A single string is one pattern, not a sequence of one-letter patterns."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def convert_linears(
    model: nn.Module,
    sparsity: SparsityConfig | NMPattern | str | None = None,
    *,
    include: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
    split_sizes: Mapping[str, tuple[int, ...] | None] | None = None,
    **options: Any,
) -> ConversionReport:
    """Convert every ``nn.Linear`` (and ``Conv1D``) that the name patterns select, and the fused experts of a mixture.

    Output heads, routers, gates with one row and the matrices of a LoRA are skipped (:func:`left_alone`) unless
    ``include`` names them with a pattern other than ``"*"``. If less than half of the linear parameters became sparse,
    if a pattern fits no name in the model, if frozen layers were converted, if weights that are to be trained have 16
    bits, or if equal weights lie on both sides of the edge of many masks, a warning says so.

    Args:
        model: The model, changed in place: as a whole or, on an error, not at all.
        sparsity: The options of the new layers: a :class:`SparsityConfig`, or only a pattern.
        include: One shell-style pattern or several, for the names of layers to convert (see :func:`name_matches`).
        exclude: The patterns for layers to leave alone, besides those that a conversion skips anyway. ``exclude`` wins
            over ``include``.
        split_sizes: The rows of each part of fused layers, by name pattern, for example
            ``{"*.qkv": (64, 32, 32)}``. None in place of the rows says that a layer is one part. The rows of a layer
            without an entry are guessed if its architecture is known (:func:`guess_split_sizes`).
        **options: Single fields of :class:`SparsityConfig`, for example ``kind="masked"``.

    Returns:
        A report of what was converted and what was skipped, with reasons. A layer is skipped if M does not divide its
        ``in_features``, or if another module shares its weight (a tied head).

    Raises:
        ConfigError: If the model has no masked layer and nothing can be converted (the message says why, also if
            ``include`` fits no linear layer), if a selected layer is already masked with other options, if the
            ``forward`` of a selected layer was replaced or its weights are offloaded, if an entry of ``split_sizes``
            fits no layer, or if an option cannot work.
    """
    report = convert_quietly(model, sparsity, include=include, exclude=exclude, split_sizes=split_sizes, **options)
    report.tied = find_ties(model)
    if report.warning is not None:
        warnings.warn(report.warning, stacklevel=2)
    return report


def convert_quietly(
    model: nn.Module,
    sparsity: SparsityConfig | NMPattern | str | None = None,
    *,
    include: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
    split_sizes: Mapping[str, tuple[int, ...] | None] | None = None,
    shown: bool = True,
    **options: Any,
) -> ConversionReport:
    """Convert layers as :func:`convert_linears` does, but without a warning and without a look for ties.

    Args:
        model: The model.
        sparsity: The options of the new layers.
        include: The patterns for layers to convert.
        exclude: The patterns for layers to leave alone.
        split_sizes: The rows of each part of fused layers.
        shown: Whether the caller shows ``report.warning``. If not, the first step of an optimiser warns of weights in
            16 bits.
        **options: Single fields of :class:`SparsityConfig`.
    """
    sparsity = SparsityConfig.make(sparsity, **options)
    include, exclude = as_patterns(include), as_patterns(exclude)
    given = dict(split_sizes or {})
    used: set[str] = set()
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    report = ConversionReport(parameters=sum(p.numel() for p in model.parameters()))
    plan: list[_Planned] = []
    experts: dict[str, Planned] = {}
    fixed: dict[str, str] = {}
    linear: list[str] = []
    already = False
    for name, module in named_modules(model):
        if weights := fused_weights(module):
            names = [f"{name}.{weight}".lstrip(".") for weight in weights]
            linear += names
            # The two weights of an expert are converted together, because one forward computes with both.
            unselected = _why_unselected(names, include, exclude)
            wanted = unselected is None
            reason = unselected or why_not(module, sparsity) or check_shared(module, owners)
            size = sum(cast(Tensor, module._parameters[weight]).numel() for weight in weights)
            _count(report, size, wanted=wanted)
            if reason is None and (stays := why_class_stays(module)) is not None:
                fixed[name] = stays
            elif reason is None:
                experts[name] = plan_experts(module, sparsity)
                report.converted_parameters += size
                report.frozen += [] if any(p.requires_grad for p in module.parameters(recurse=False)) else names
            else:
                report.skipped |= dict.fromkeys(names, reason)
            continue
        unselected = _why_unselected([name], include, exclude)
        named = name_matches(name, [pattern for pattern in include if pattern != "*"])
        if isinstance(module, MaskedLinear):
            already = True
            linear.append(name)
            _count(report, module.weight.numel(), wanted=True)
            report.converted_parameters += module.weight.numel()
            if unselected is None and (named or left_alone(model, name, module) is None):
                _check_same(name, module, sparsity, given)
            continue
        if not isinstance(module, nn.Linear) and not is_conv1d(module):
            reasons = not_linear(name, module)
            report.skipped.update(reasons)
            if reasons:
                matrices = (p.numel() for p in module.parameters(recurse=False) if p.ndim >= 2)
                _count(report, sum(matrices), wanted=unselected is None and (named or not is_output_head(name)))
            continue
        linear.append(name)
        weight = module._parameters.get("weight")
        size = 0 if weight is None or owners[id(weight)] > 1 else weight.numel()
        reason = unselected or _unsuitable(module, owners, sparsity.nm)
        chosen = None if named or reason is not None else left_alone(model, name, module)
        _count(report, size, wanted=unselected is None and (named or not is_output_head(name)))
        if (reason or chosen) is not None:
            report.skipped[name] = reason or f"{chosen}; name it in include to convert it"
            continue
        if (stays := why_class_stays(module)) is not None:
            fixed[name] = stays
            continue
        sizes = _sizes_given(name, given, used)
        if sizes == "guess":
            sizes = sparsity.split_sizes or guess_split_sizes(model, name, module)
        own = replace(sparsity, split_sizes=cast("tuple[int, ...] | None", sizes))
        plan.append(_Planned(name, module, own, _first_mask(name, module, own)))
        report.converted_parameters += size
        if not cast(Tensor, module._parameters["weight"]).requires_grad:
            report.frozen.append(name)
        if own.split_sizes is not None:
            report.split_sizes[name] = own.split_sizes
    report.unmatched = _unmatched(model, (*include, *exclude))
    refuse(fixed, "converted", "; or exclude them")
    if unused := set(given) - used:
        raise ConfigError(f"split_sizes: no converted layer has a name like {', '.join(sorted(unused))}")
    if not plan and not experts and not already:
        raise ConfigError(_why_nothing(sparsity.nm, report, linear, include))
    for planned in plan:
        _convert(planned)
        report.converted.append(planned.name)
    for name, block in experts.items():
        report.converted += [f"{name}.{weight}".lstrip(".") for weight in convert_planned(block)]
    layers = [planned.module for planned in plan] + [one for block in experts.values() for one in block.layers.values()]
    latent = [cast(Tensor, layer._parameters["weight"]) for layer in layers]
    narrow = [weight for weight in latent if weight.requires_grad and has_16_bits(weight)]
    note_told(narrow if shown else [])
    report.narrow = narrow[0].dtype if narrow else None
    report.swiglu = connect_layers(model)
    return report


def _why_unselected(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why the patterns leave out weights that are converted together; None if the patterns take all of them."""
    if any(name_matches(name, exclude) for name in names):
        return "excluded by name"
    return None if all(name_matches(name, include) for name in names) else "include does not name it"


def _why_nothing(pattern: NMPattern, report: ConversionReport, linear: Sequence[str], include: Sequence[str]) -> str:
    """Say why no layer was converted, and what would help."""
    known = f"{', '.join(linear[:8])}{f' and {len(linear) - 8} more' if len(linear) > 8 else ''}"
    if linear and not any(name_matches(name, include) for name in linear):
        return f"include fits no linear layer of the model: {', '.join(include)}; the linear layers are {known}"
    reasons = "; ".join(f"{name}: {reason}" for name, reason in list(report.skipped.items())[:8])
    text = f"no layer was converted to {pattern} ({reasons or 'the model has no nn.Linear'})"
    if widths := [int(cut[1]) for reason in report.skipped.values() if (cut := re.match(_CUT, reason))]:
        text += f"; {pattern_for(*widths)}"
    if report.unmatched:
        text += f"; include or exclude has names that fit nothing in the model: {', '.join(report.unmatched)}"
    return text


def _count(report: ConversionReport, parameters: int, wanted: bool) -> None:
    report.linear_parameters += parameters
    report.wanted_parameters += parameters if wanted else 0


def _check_same(name: str, layer: MaskedLinear, sparsity: SparsityConfig, given: Mapping[str, Any]) -> None:
    """Refuse to convert a masked layer to other options."""
    if given or sparsity.split_sizes is not None:
        wanted = replace(sparsity, split_sizes=_sizes_given(name, given, set()) if given else sparsity.split_sizes)  # type: ignore[arg-type]
        if wanted.split_sizes == "guess":  # type: ignore[comparison-overlap]
            wanted = replace(wanted, split_sizes=layer.split_sizes)
    else:
        wanted = replace(sparsity, split_sizes=layer.split_sizes)
    if wanted != layer.sparsity:
        raise ConfigError(
            f"{name} is converted already, to {_describe(layer.sparsity)}, and not to {_describe(wanted)}: call "
            "revert_linears(model) first, set layer.sparsity, or exclude the layer"
        )


def _describe(sparsity: SparsityConfig) -> str:
    plain = SparsityConfig().to_dict()
    differing = {key: value for key, value in sparsity.to_dict().items() if value != plain[key] and key != "pattern"}
    return ", ".join([str(sparsity.pattern), *(f"{key}={value!r}" for key, value in differing.items())])


def _unsuitable(module: nn.Module, owners: Counter[int], pattern: NMPattern) -> str | None:
    """Why a linear layer cannot be converted; None if it can."""
    weight = module._parameters.get("weight")
    if not is_conv1d(module) and not isinstance(module, nn.Linear):
        return f"{type(module).__name__} is no linear layer"
    if not is_conv1d(module) and type(module) is not nn.Linear:
        return f"{type(module).__name__} is a subclass of nn.Linear that may be used differently"
    if weight is None:
        return "its weight is computed from other parameters (weight_norm, pruning)"
    if owners[id(weight)] > 1:
        return "shares its weight with another module"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"its weight is {weight.dtype}, and a latent weight needs 16 bits or more"
    in_features = shape_of(module)[0]
    if in_features % pattern.m:
        return f"in_features={in_features} is not a multiple of M={pattern.m}"
    return None


def _unmatched(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The patterns that fit no module and no parameter. ``lm_head`` is not counted: many programs always pass it."""
    names = [name for name, _ in named_modules(model)] + [name for name, _ in model.named_parameters()]
    asked = dict.fromkeys(pattern for pattern in patterns if pattern not in ("*", "lm_head"))
    return [pattern for pattern in asked if not any(name_matches(name, [pattern]) for name in names)]


def _sizes_given(name: str, given: Mapping[str, tuple[int, ...] | None], used: set[str]) -> Any:
    """The caller's ``split_sizes`` for a layer, or ``"guess"``."""
    for pattern, sizes in given.items():
        if name_matches(name, [pattern]):
            used.add(pattern)
            return sizes
    return "guess"


def _first_mask(name: str, module: nn.Module, sparsity: SparsityConfig) -> Tensor:
    """The first mask of a layer that is to be converted. The layer itself is not changed.

    Raises:
        ConfigError: If the options do not fit the shape of the layer.
    """
    in_features, out_features = shape_of(module)
    sparsity.check_fits(in_features, out_features, name)
    weight = cast(Tensor, module._parameters["weight"])
    if is_conv1d(module):
        weight = weight.t()
    layer = _CLASSES[sparsity.kind][0](in_features, out_features, bias=False, sparsity=sparsity, device="meta")
    layer._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=False)
    layer.mask_bits = torch.empty(layer.mask_bits.shape, dtype=torch.uint8, device=weight.device)
    layer.refresh_mask()
    return layer.mask_bits


def _convert(planned: _Planned) -> None:
    module = planned.module
    transposed = is_conv1d(module)
    if transposed:
        # A reversion needs the class. Conv1D's own attributes nx and nf stay as they are.
        in_features, out_features = shape_of(module)
        vars(module).update(converted_from=type(module), in_features=in_features, out_features=out_features)
    change_class(module, _CLASSES[planned.sparsity.kind][transposed])
    cast(MaskedLinear, module)._init_mask(planned.sparsity, planned.mask_bits)
