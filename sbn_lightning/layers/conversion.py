"""Turns the ``nn.Linear`` layers of any model into masked ones, and back.

A layer is changed in place, by changing its class: parameter objects, hooks, references from elsewhere in the model
and an optimiser that already exists all stay valid. Only exact ``nn.Linear`` instances are taken, and GPT-2's
``Conv1D``, which is one with a transposed weight. A subclass may be used in ways its class hides
(``nn.MultiheadAttention`` reads the weight of its ``out_proj`` and never calls it).

Convolutions are left alone. The quantiser scales each token, and a convolution has none: a pixel takes part in many
windows, each with a maximum of its own, so ternary convolutions need an arithmetic of their own. What most models of
this kind have, a patch embedding, is an input layer, which is best kept in high precision anyway.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.conv1d import SparseBitConv1D, SparseConv1D, is_conv1d
from sbn_lightning.layers.masked_linear import MaskedLinear, masked_layers
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.layers.sparse_linear import SparseLinear
from sbn_lightning.sparsity.config import Kind, SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern

# In evaluation these modules of PyTorch hand the weights of their linear layers to one fused kernel and never call the
# layers: the latent, dense weights would be used. The switch that turns the fused kernel off, and its "off".
_FUSED_INFERENCE: dict[type[nn.Module], tuple[str, int]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}

# The class of a converted layer by its kind: in place of an ``nn.Linear``, and of a ``Conv1D``.
_CLASSES: dict[Kind, tuple[type[MaskedLinear], type[MaskedLinear]]] = {
    "ternary": (SparseBitLinear, SparseBitConv1D),
    "masked": (SparseLinear, SparseConv1D),
}


@dataclass
class ConversionReport:
    """What a conversion did: names of converted layers, and the reason for each one skipped.

    What is skipped are linear layers, and every other parameter with two dimensions or more that is not an embedding:
    by the name of its module, or its own where the module only holds it (``attention.in_proj_weight``).
    """

    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"converted {len(self.converted)} layers: {', '.join(self.converted) or 'none'}"]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(name)
        lines += [f"skipped {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
        return "\n".join(lines)


def name_matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted module name, or one of its parents, matches a shell-style pattern.

    ``"h.1"`` matches ``h.1`` and ``h.1.mlp`` but not ``h.10``; ``"lm_head"`` also matches ``model.lm_head``.
    """
    parts = name.split(".")
    spans = [".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]
    return any(fnmatchcase(span, pattern) for pattern in patterns for span in spans)


def as_patterns(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """A tuple, also of a single pattern: its letters would be patterns too, which match nothing."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def convert_linears(
    model: nn.Module,
    sparsity: SparsityConfig | NMPattern | str | None = None,
    *,
    include: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = ("lm_head",),
    **options: Any,
) -> ConversionReport:
    """Converts every ``nn.Linear`` (and ``Conv1D``) that the name patterns select.

    Args:
        model: Changed in place.
        sparsity: The options of the new layers: a :class:`SparsityConfig`, or only a pattern.
        include: Shell-style pattern or patterns of names to convert (see :func:`name_matches`).
        exclude: Patterns of names to leave alone; wins over ``include``. Name the head here if it is not ``lm_head``.
        **options: Single fields of :class:`SparsityConfig`, for example ``kind="masked"``.

    Returns:
        What was converted and what was skipped, with reasons. A layer whose ``in_features`` the pattern does not
        divide, and one that shares its weight with another module (a tied head), is skipped.

    Raises:
        ConfigError: If nothing was converted although no layer is masked yet.
    """
    sparsity = SparsityConfig.make(sparsity, **options)
    target, layer_class = sparsity.nm, _CLASSES[sparsity.kind]
    include, exclude = as_patterns(include), as_patterns(exclude)
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    report = ConversionReport()
    already = False
    for name, module in _named_modules(model):
        if isinstance(module, MaskedLinear):
            already = True
            continue
        if not isinstance(module, nn.Linear) and not is_conv1d(module):
            report.skipped.update(_unconvertible(name, module))
            continue
        transposed = not isinstance(module, nn.Linear)
        in_features = cast(int, module.nx if transposed else module.in_features)
        if not name_matches(name, include) or name_matches(name, exclude):
            report.skipped[name] = "excluded by name"
        elif not transposed and type(module) is not nn.Linear:
            report.skipped[name] = f"{type(module).__name__} is a subclass of nn.Linear that may be used differently"
        elif module._parameters.get("weight") is None:
            report.skipped[name] = "its weight is computed from other parameters (weight_norm, pruning)"
        elif owners[id(module._parameters["weight"])] > 1:
            report.skipped[name] = "shares its weight with another module"
        elif in_features % target.m:
            report.skipped[name] = f"in_features={in_features} is not a multiple of M={target.m}"
        else:
            if transposed:
                # nx and nf stay as they are; the class is remembered for the way back.
                module.converted_from, module.in_features, module.out_features = type(module), in_features, module.nf  # type: ignore[assignment]
            module.__class__ = layer_class[transposed]
            cast("MaskedLinear", module)._init_mask(sparsity)
            report.converted.append(name)
    if not report.converted and not already:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(report.skipped.items())[:8])
        raise ConfigError(f"no layer was converted to {target} ({reasons or 'the model has no nn.Linear'})")
    _switch_fused_inference(model, on=False)
    return report


def revert_linears(model: nn.Module) -> list[str]:
    """Turns masked layers back into the plain layers they were, which now hold the effective weight.

    Parameter objects stay the same. Activations are no longer quantised, so outputs of ternary layers move by that
    rounding; convert with ``activation_bits=None`` where this matters. A Hugging Face model should be reverted before
    ``save_pretrained``: until then its weights are latent ones, which ``from_pretrained`` would use as they are.

    Returns:
        Names of the layers.
    """
    ours = set(vars(SparseBitLinear(1, 1, pattern="1:1", device="meta"))) - set(vars(nn.Linear(1, 1, device="meta")))
    reverted = []
    for name, module in _named_modules(model):
        if isinstance(module, MaskedLinear):
            with torch.no_grad():
                module.weight.copy_(module.effective_weight())
            transposed = "converted_from" in vars(module)
            plain = vars(module).pop("converted_from", nn.Linear)
            for extra in ours | ({"in_features", "out_features"} if transposed else set()):
                vars(module).pop(extra, None)
            del module.mask_bits
            module.__class__ = plain
            reverted.append(name)
    _switch_fused_inference(model, on=True)
    return reverted


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        yield name.replace("_orig_mod.", ""), module


def _unconvertible(name: str, module: nn.Module) -> dict[str, str]:
    """Reasons for the matrices of a module that is not a linear layer; vectors and embeddings are no candidates."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {}
    kind = type(module).__name__
    if isinstance(module, nn.modules.conv._ConvNd):
        return {name: f"{kind} has no tokens to quantise: one pixel is part of many windows"}
    use = "packed q, k and v are" if isinstance(module, nn.MultiheadAttention) else "it is"
    return {
        f"{name}.{parameter}".lstrip("."): f"{use} a bare parameter of {kind}, not an nn.Linear"
        for parameter, value in module.named_parameters(recurse=False)
        if value.ndim >= 2
    }


def _switch_fused_inference(model: nn.Module, on: bool) -> None:
    for module in model.modules():
        for kind, (switch, off) in _FUSED_INFERENCE.items():
            if isinstance(module, kind):
                if on and "fused_before" in vars(module):
                    setattr(module, switch, vars(module).pop("fused_before"))
                elif not on and "fused_before" not in vars(module) and any(masked_layers(module)):
                    vars(module)["fused_before"] = getattr(module, switch)
                    setattr(module, switch, off)
