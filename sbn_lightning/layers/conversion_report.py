"""What a conversion did: which layers it took, which it left, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from sbn_lightning.layers.latent_dtype import what_is_lost
from sbn_lightning.layers.ties import of_ties

_MOST_NAMES = 20  # A longer list in a warning helps nobody.


@dataclass
class ConversionReport:
    """What a conversion did.

    Linear parameters are those of linear layers, and all other parameters that have two dimensions or more and are not
    embeddings.

    Attributes:
        converted: The names of the converted layers.
        skipped: The reason for each layer or parameter that was skipped, by name. A parameter that belongs to no linear
            layer goes by its own name, for example ``attention.in_proj_weight``.
        split_sizes: The rows of each part of the fused layers that were converted, by layer.
        swiglu: The names of the modules whose SwiGLU is handed to the layer after it (:func:`fuse_swiglu`).
        unmatched: The patterns of ``include`` and ``exclude`` that are no name in the model, perhaps misspelt.
        frozen: The names of the converted layers whose weights were frozen (``requires_grad=False``) at the time.
        narrow: The dtype of converted weights that are to be trained and have only 16 bits; None if there are none.
        tied: The masked layers in which equal weights lie on both sides of the mask's edge, with the share of groups
            (:func:`~sbn_lightning.layers.ties.find_ties`). Only :func:`convert_linears` looks for them.
        converted_parameters: The number of weights in converted layers.
        linear_parameters: The number of linear parameters in the model.
        wanted_parameters: The number of linear parameters without those that the caller excluded by name, and without
            those of output heads.
        parameters: The number of all parameters of the model.
    """

    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    split_sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    swiglu: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    narrow: torch.dtype | None = None
    tied: dict[str, float] = field(default_factory=dict)
    converted_parameters: int = 0
    linear_parameters: int = 0
    wanted_parameters: int = 0
    parameters: int = 0

    @property
    def warning(self) -> str | None:
        """A line of warning; None if all went as asked.

        The line warns if less than half of the wanted parameters were converted, if a pattern fits no name, if frozen
        layers were converted, if latent weights have only 16 bits, and if weights are tied.
        """
        found = []
        if self.unmatched:
            found.append(f"include or exclude has names that fit nothing in the model: {', '.join(self.unmatched)}")
        if self.converted and 2 * self.converted_parameters < self.wanted_parameters:
            share = self.converted_parameters / self.wanted_parameters
            found.append(
                f"only {share:.1%} of the model's linear parameters became sparse; the rest is in layers that a "
                "conversion does not take. The report of the conversion names them, with the reasons"
            )
        if self.frozen:
            found.append(self._of_frozen())
        if self.narrow is not None:
            found.append(what_is_lost(self.narrow))
        if self.tied:
            found.append(f"{of_ties(self.tied)}; call break_ties(model) before training, or the loss jumps")
        return "; ".join(found) or None

    def _of_frozen(self) -> str:
        """Say that frozen layers were converted, and which names in ``exclude`` would leave them out."""
        trained = set(self.converted) - set(self.frozen)
        with_trained = {part for name in trained for part in _leading_parts(name)}
        # The shortest leading part of each name below which nothing is trained.
        outermost = (next((p for p in _leading_parts(name) if p not in with_trained), name) for name in self.frozen)
        names = list(dict.fromkeys(outermost))
        one = len(self.frozen) == 1
        others = "" if one else f" and {len(self.frozen) - 1} more"
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        remedy = f"add {names[:_MOST_NAMES]}{more} to exclude" if trained else "train them, or leave them dense"
        return (
            f"{self.frozen[0]}{others} {'is' if one else 'are'} frozen, and a weight that never trains cannot adapt to "
            f"its rounding: {remedy}. Nothing is wrong if training unfreezes the layers later"
        )

    def split_lines(self) -> list[str]:
        """Return a line for each kind of fused layer: its names, and the rows of its parts."""
        by_sizes: dict[tuple[int, ...], set[str]] = {}
        for name, sizes in self.split_sizes.items():
            by_sizes.setdefault(sizes, set()).add(re.sub(r"\b\d+\b", "*", name))
        return [
            f"fused {', '.join(sorted(names))}: a gamma for each of {sizes} rows" for sizes, names in by_sizes.items()
        ]

    def __str__(self) -> str:
        lines = [f"converted {len(self.converted)} layers: {', '.join(self.converted) or 'none'}"]
        if self.linear_parameters and self.converted:
            lines[0] += (
                f" ({self.converted_parameters / self.linear_parameters:.1%} of the linear parameters, "
                f"{self.converted_parameters / self.parameters:.1%} of all)"
            )
        lines += self.split_lines()
        if self.swiglu:
            names = ", ".join(sorted({re.sub(r"\b\d+\b", "*", name) for name in self.swiglu}))
            lines.append(f"SwiGLU in {names}: kernels compute it together with the quantisation after it")
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(name)
        lines += [f"skipped {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
        return "\n".join(lines)


def _leading_parts(name: str) -> list[str]:
    """The leading parts of a dotted name, the shortest first; the last one is the whole name."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
