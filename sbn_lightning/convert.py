"""Turns the ``nn.Linear`` layers of any model into masked ones, and back.

A layer is changed in place, by changing its class: parameter objects, hooks, references from elsewhere in the model
and an optimiser that already exists all stay valid. Only exact ``nn.Linear`` instances are taken. A subclass may be
used in ways its class hides (``nn.MultiheadAttention`` reads the weight of its ``out_proj`` and never calls it).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, cast

from torch import nn

from sbn_lightning.errors import ConfigError
from sbn_lightning.layers import Gradient, MaskedLinear, MaskSource, SparseBitLinear, SparseLinear
from sbn_lightning.pattern import NMPattern
from sbn_lightning.ternary import GammaOver


@dataclass
class ConversionReport:
    """What a conversion did: names of converted layers, and the reason for each one skipped."""

    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"converted {len(self.converted)} layers: {', '.join(self.converted) or 'none'}"]
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def name_matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted module name, or one of its parents, matches a shell-style pattern.

    ``"h.1"`` matches ``h.1`` and ``h.1.mlp`` but not ``h.10``; ``"lm_head"`` also matches ``model.lm_head``.
    """
    parts = name.split(".")
    spans = [".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]
    return any(fnmatchcase(span, pattern) for pattern in patterns for span in spans)


def convert_linears(
    model: nn.Module,
    pattern: NMPattern | str = "6:8",
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = ("lm_head",),
    kind: Literal["ternary", "masked"] = "ternary",
    activation_bits: int | None = 8,
    mask_source: MaskSource = "latent",
    gradient: Gradient = "dense",
    gamma_over: GammaOver = "dense",
) -> ConversionReport:
    """Converts every ``nn.Linear`` that the name patterns select.

    Args:
        model: Changed in place.
        pattern: "N:M".
        include: Shell-style patterns of names to convert (see :func:`name_matches`).
        exclude: Patterns of names to leave alone; wins over ``include``.
        kind: ``"ternary"`` for :class:`SparseBitLinear`, ``"masked"`` for :class:`SparseLinear`.
        activation_bits: As in :class:`SparseBitLinear`; ignored for ``"masked"``, like the two options below.
        mask_source: As in :class:`SparseBitLinear`.
        gradient: As in :class:`SparseBitLinear`; for both kinds.
        gamma_over: As in :class:`SparseBitLinear`.

    Returns:
        What was converted and what was skipped, with reasons. A layer whose ``in_features`` the pattern does not
        divide, and one that shares its weight with another module (a tied head), is skipped.

    Raises:
        ConfigError: If nothing was converted although no layer is masked yet, or ``kind`` is unknown.
    """
    target = NMPattern.parse(pattern)
    if kind not in ("ternary", "masked"):
        raise ConfigError(f"kind={kind!r} is not 'ternary' or 'masked'")
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    report = ConversionReport()
    already = False
    for name, module in model.named_modules():
        if isinstance(module, MaskedLinear):
            already = True
            continue
        if not isinstance(module, nn.Linear):
            if type(module).__name__ in ("Conv1D", "MultiheadAttention") or isinstance(module, nn.modules.conv._ConvNd):
                report.skipped[name] = f"{type(module).__name__} is not an nn.Linear"
            continue
        if not name_matches(name, include) or name_matches(name, exclude):
            report.skipped[name] = "excluded by name"
        elif type(module) is not nn.Linear:
            report.skipped[name] = f"{type(module).__name__} is a subclass of nn.Linear that may be used differently"
        elif owners[id(module.weight)] > 1:
            report.skipped[name] = "shares its weight with another module"
        elif module.in_features % target.m:
            report.skipped[name] = f"in_features={module.in_features} is not a multiple of M={target.m}"
        else:
            if kind == "ternary":
                module.__class__ = SparseBitLinear
                cast("SparseBitLinear", module)._init_ternary(
                    target, None, activation_bits, mask_source, gradient, gamma_over, name
                )
            else:
                module.__class__ = SparseLinear
                cast("SparseLinear", module)._init_mask(target, gradient, name)
            report.converted.append(name)
    if not report.converted and not already:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(report.skipped.items())[:8])
        raise ConfigError(f"no layer was converted to {target} ({reasons or 'the model has no nn.Linear'})")
    return report


def revert_linears(model: nn.Module) -> list[str]:
    """Turns masked layers back into ``nn.Linear`` layers that hold the effective weight; returns their names."""
    reverted = []
    for name, module in model.named_modules():
        if isinstance(module, MaskedLinear):
            effective = module.effective_weight()
            module.weight.data.copy_(effective)
            bare = nn.Linear(1, 1, device="meta")
            for extra in set(vars(module)) - set(vars(bare)):
                delattr(module, extra)
            del module.mask_bits
            module.__class__ = nn.Linear  # type: ignore[assignment]
            reverted.append(name)
    return reverted
