"""Describe each linear layer of a model: pattern, zeros, gamma. Every format of a model gives the same report."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sbn_lightning.core.tables import format_table
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.sparse_linear import MaskedLinear, SparseBitLinear, SparseLinear
from sbn_lightning.layers.statistics import count, kind_of
from sbn_lightning.sparsity.pattern import nonzeros_per_group


@dataclass(frozen=True)
class LayerReport:
    """One linear layer.

    Attributes:
        name: The name of the layer in the model.
        kind: ``"ternary"``, ``"masked"`` (sparse, not quantised) or ``"dense"``.
        in_features: The number of features in.
        out_features: The number of features out.
        pattern: The pattern, "N:M"; None for a dense layer.
        activation_bits: The bits of the activations of a ternary layer; None if they are not quantised.
        zeros: The share of weights that are zero.
        natural: The share of weights that round to zero by themselves. None for packed weights, which do not show why
            a code is zero.
        enforced: The share of weights that only the mask makes zero. None for packed weights.
        most_in_group: The most non-zero weights in a group of M. More than N means that the run had not yet reached
            the pattern. None for a dense layer.
        gamma: The weight scale of each part of a ternary layer; empty for other layers.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    pattern: str | None
    activation_bits: int | None
    zeros: float
    natural: float | None
    enforced: float | None
    most_in_group: int | None
    gamma: list[float]

    @property
    def weights(self) -> int:
        """How many weights the layer has."""
        return self.in_features * self.out_features

    @property
    def follows_pattern(self) -> bool | None:
        """Whether each group has at most N non-zero weights; None for a dense layer."""
        if self.pattern is None or self.most_in_group is None:
            return None
        return self.most_in_group <= int(self.pattern.split(":")[0])


@torch.no_grad()
def layer_reports(model: nn.Module) -> list[LayerReport]:
    """Describe every linear layer of a model, in the order of the model.

    A head that shares the weight of the embedding is left out.

    Args:
        model: Any model.
    """
    reports = []
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, module in model.named_modules():
        if isinstance(module, MaskedLinear):
            shares = count({name: module}, {})[0][name].shares()
            reports.append(_sparse(name, module, module.values(), shares["zeros_natural"], shares["zeros_enforced"]))
        elif isinstance(module, PackedTernaryLinear):
            reports.append(_sparse(name, module, module.ternary()[0], None, None))
        elif isinstance(module, nn.Linear) and id(module.weight) not in embeddings:
            reports.append(_dense(name, module))
    return reports


def _sparse(
    name: str,
    layer: MaskedLinear | PackedTernaryLinear,
    values: Tensor,
    natural: float | None,
    enforced: float | None,
) -> LayerReport:
    ternary = not isinstance(layer, SparseLinear)
    return LayerReport(
        name=name,
        kind="ternary" if ternary else "masked",
        in_features=layer.in_features,
        out_features=layer.out_features,
        pattern=str(layer.pattern),
        activation_bits=layer.activation_bits if isinstance(layer, SparseBitLinear | PackedTernaryLinear) else None,
        zeros=_share_of_zeros(values),
        natural=natural,
        enforced=enforced,
        most_in_group=int(nonzeros_per_group(values, layer.pattern.m).max()),
        gamma=layer.ternary()[1].tolist() if isinstance(layer, SparseBitLinear | PackedTernaryLinear) else [],
    )


def _dense(name: str, layer: nn.Linear) -> LayerReport:
    zeros = _share_of_zeros(layer.weight)
    return LayerReport(
        name=name,
        kind="dense",
        in_features=layer.in_features,
        out_features=layer.out_features,
        pattern=None,
        activation_bits=None,
        zeros=zeros,
        natural=zeros,
        enforced=0.0,
        most_in_group=None,
        gamma=[],
    )


def _share_of_zeros(values: Tensor) -> float:
    return 1 - int(values.count_nonzero()) / values.numel()


def as_table(reports: list[LayerReport]) -> str:
    """Write the layers as a table with a row for each kind: ``blocks.3.mlp.down`` counts as ``down``."""
    groups: dict[tuple[str, str, str], list[LayerReport]] = {}
    for report in reports:
        groups.setdefault((kind_of(report.name), report.kind, report.pattern or ""), []).append(report)
    header = ("layers", "kind", "pattern", "weights", "zeros", "natural", "enforced", "gamma")
    rows: list[tuple[str, ...]] = []
    for (name, kind, pattern), members in groups.items():
        total = sum(member.weights for member in members)
        gammas = [gamma for member in members for gamma in member.gamma]
        off = sum(member.follows_pattern is False for member in members)
        shares = [_mean(members, total, key) for key in ("zeros", "natural", "enforced")]
        scale = f"{min(gammas):.4g} to {max(gammas):.4g}" if gammas else ""
        label = f"{len(members)} x {name}" if len(members) > 1 else name
        rows.append((label, kind, pattern + (f" ({off} off)" if off else ""), f"{total:,}", *shares, scale))
    return format_table(header, rows, left=(0, 1, 2), rule=False)


def _mean(members: list[LayerReport], total: int, key: str) -> str:
    values = [getattr(member, key) for member in members]
    if any(value is None for value in values):
        return "-"
    return f"{100 * sum(v * m.weights for v, m in zip(values, members, strict=True)) / total:.2f} %"
