"""Measure what a conversion does to a model before any training: as a whole, by part and by block.

A twin of each linear layer is converted and shares the weight with the layer. A forward hook replaces the rows of the
chosen parts by the rows that the twin computes. So q can be ternary while k and v, which live in the same fused layer,
stay dense; and the tokens are quantised as in training. The model itself is not changed.

The hidden states before each block are kept from the dense run. A run in which one block is converted starts at this
block, and a run in which the first blocks are converted starts where the last one ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.core.tables import format_table
from sbn_lightning.formats.init_from import without_learned_scales, without_masks
from sbn_lightning.layers.candidates import shape_of
from sbn_lightning.layers.conversion import convert_quietly
from sbn_lightning.layers.sparse_bit_linear import ternary_layers
from sbn_lightning.models.loss import linear_cross_entropy
from sbn_lightning.models.transformer import TernaryTransformer
from sbn_lightning.sparsity.config import SparsityConfig

Variant = Literal["masked", "rounded", "ternary"]
VARIANTS: dict[Variant, str] = {
    "masked": "N:M, not rounded",
    "rounded": "ternary, not masked",
    "ternary": "ternary N:M",
}
Section = Literal["whole", "parts", "blocks", "cumulative"]
SECTIONS: tuple[Section, ...] = get_args(Section)
# The parts of each linear layer of a block, in the order of the rows.
PARTS = {"attention.qkv": ("q", "k", "v"), "attention.o": ("o",), "mlp.gate_up": ("gate", "up"), "mlp.down": ("down",)}

NO_LATENT_WEIGHTS = "packed weights have no latent weights left to convert; give the checkpoint of the training"


@dataclass(frozen=True)
class Measured:
    """The loss of a model of which a part is converted.

    Attributes:
        section: What is compared: ``"whole"``, ``"parts"``, ``"blocks"`` or ``"cumulative"``.
        converted: What is converted, for example ``"down"``, ``"block 3"`` or ``"blocks 0 to 3"``.
        variant: The kind of conversion; None for the model as it is.
        loss: The mean cross-entropy in nats.
    """

    section: Section
    converted: str
    variant: Variant | None
    loss: float

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where the value is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def variant_of(sparsity: SparsityConfig, variant: Variant) -> SparsityConfig:
    """Return the options of a kind of conversion: with its mask alone, with its rounding alone, or with both."""
    if variant == "masked":
        return replace(sparsity, kind="masked")
    if variant == "rounded":
        return replace(sparsity, kind="ternary", pattern=f"{sparsity.nm.m}:{sparsity.nm.m}")
    return replace(sparsity, kind="ternary")


@dataclass(frozen=True)
class Place:
    """A linear layer of a model under inspection.

    Attributes:
        layer: The layer, dense.
        block: The number of the block that the layer is in.
        parts: The names of the layer's parts, in the order of the rows.
        sizes: The rows of each part; None if the layer is one part.
    """

    layer: nn.Module
    block: int
    parts: tuple[str, ...]
    sizes: tuple[int, ...] | None = None


class Inspection:
    """Runs a dense model with parts of it converted, on a few rows of tokens.

    Args:
        model: The dense model; hooks are added and removed again.
        rows: The tokens, int64 ``[rows, T + 1]``.
        sparsity: The options of the conversion.

    Raises:
        ConfigError: If the pattern does not fit the layers.
    """

    def __init__(self, model: TernaryTransformer, rows: Tensor, sparsity: SparsityConfig) -> None:
        if getattr(model.config, "n_experts", 0):
            raise ConfigError("inspect does not know the parts of a mixture of experts")
        self.model, self.rows, self.sparsity = model, rows, sparsity
        self._places = {
            f"{i}/{kind.replace('.', '/')}": Place(
                _linear(block, kind), i, parts, _rows_of(block, kind) if len(parts) > 1 else None
            )
            for i, block in enumerate(model.blocks)
            for kind, parts in PARTS.items()
        }
        for name, place in self._places.items():
            sparsity.nm.check_divides(shape_of(place.layer)[0], f"layer {name.replace('/', '.')}")
        length = rows.shape[1] - 1
        self._rope = model.cos[:length], model.sin[:length]
        self._before = [model.embed(rows[:, :-1])]
        for block in model.blocks:
            self._before.append(block(self._before[-1], *self._rope))

    @property
    def parts(self) -> list[str]:
        """The names of all parts, in the order in which a block has them."""
        return list(dict.fromkeys(part for place in self._places.values() for part in place.parts))

    def measure(self, sections: Sequence[Section] = SECTIONS, points: int = 8) -> Iterator[Measured]:
        """Yield one measurement after the other.

        Args:
            sections: The sections to measure. ``"whole"``: the model as it is, and each kind of conversion of all
                layers. ``"parts"``: one part in all blocks. ``"blocks"``: one block. ``"cumulative"``: the first
                blocks.
            points: How many measurements the section ``"cumulative"`` has at most.
        """
        count, all_parts = len(self.model.blocks), self.parts
        if "whole" in sections:
            yield Measured("whole", "nothing", None, self._unchanged())
        for variant in VARIANTS:
            with self._twins(variant) as convert:
                if "whole" in sections:
                    yield Measured("whole", "everything", variant, self._run(convert, range(count), all_parts))
                if "parts" in sections:
                    for part in all_parts:
                        yield Measured("parts", part, variant, self._run(convert, range(count), [part]))
                if variant != "ternary":
                    continue
                if "blocks" in sections:
                    for i in range(count):
                        yield Measured("blocks", f"block {i}", variant, self._run(convert, range(i, i + 1), all_parts))
                if "cumulative" in sections:
                    yield from self._cumulative(convert, all_parts, points)

    def _cumulative(self, convert: Convert, parts: list[str], points: int) -> Iterator[Measured]:
        ends = self._ends(points)
        hidden = self._before[0]
        for i, block in enumerate(self.model.blocks):
            convert(range(i, i + 1), parts)
            hidden = block(hidden, *self._rope)
            if i + 1 not in ends:
                continue
            convert(range(0), parts)
            after = hidden
            for later in self.model.blocks[i + 1 :]:
                after = later(after, *self._rope)
            yield Measured("cumulative", first_blocks(i), "ternary", self._loss(after))
        convert(range(0), parts)

    def _ends(self, points: int) -> set[int]:
        """How many of the first blocks are converted, for each measurement of the section ``"cumulative"``."""
        count = len(self.model.blocks)
        return {round(count * (i + 1) / points) for i in range(points)} if count > points else set(range(1, count + 1))

    def _unchanged(self) -> float:
        """Return the loss of the model as it is."""
        return self._loss(self._before[-1])

    def _run(self, convert: Convert, blocks: range, parts: Sequence[str]) -> float:
        """Return the loss with some parts of some blocks converted."""
        convert(blocks, parts)
        hidden = self._before[blocks.start]
        for block in self.model.blocks[blocks.start :]:
            hidden = block(hidden, *self._rope)
        convert(range(0), parts)
        return self._loss(hidden)

    def _loss(self, hidden: Tensor) -> float:
        model = self.model
        loss = linear_cross_entropy(model.norm(hidden).flatten(0, 1), model.lm_head.weight, self.rows[:, 1:].flatten())
        return float(loss)

    @contextmanager
    def converted(self, variant: Variant, parts: Sequence[str]) -> Iterator[TernaryTransformer]:
        """Yield the model while parts of all its blocks are converted, for measurements of other kinds.

        Args:
            variant: The kind of conversion.
            parts: The names of the parts, among :attr:`parts`.
        """
        with self._twins(variant) as convert:
            convert(range(len(self.model.blocks)), parts)
            try:
                yield self.model
            finally:
                convert(range(0), parts)

    @contextmanager
    def _twins(self, variant: Variant) -> Iterator[Convert]:
        """Give each layer a converted twin, and yield the function that chooses what the twins compute."""
        twins = nn.ModuleDict()
        for key, place in self._places.items():
            twins[key] = twin = copy(place.layer)
            # The twin shares the weight, and has dictionaries of its own for parameters and hooks.
            vars(twin).update({name: copy(value) for name, value in vars(twin).items() if isinstance(value, dict)})
        sizes = {key: place.sizes for key, place in self._places.items()}
        convert_quietly(twins, variant_of(self.sparsity, variant), include=list(sizes), exclude=(), split_sizes=sizes)
        chosen: dict[str, Tensor] = {}

        def take_rows(key: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            rows = chosen.get(key)
            return None if rows is None else torch.where(rows, twins[key](inputs[0]), output)

        def convert(blocks: range, parts: Sequence[str]) -> None:
            chosen.clear()
            for key, place in self._places.items():
                wanted = torch.tensor([part in parts for part in place.parts])
                if place.block in blocks and wanted.any():
                    rows = torch.tensor(place.sizes or (shape_of(place.layer)[1],))
                    chosen[key] = wanted.repeat_interleave(rows).to(self.rows.device)

        hooks = [place.layer.register_forward_hook(partial(take_rows, key)) for key, place in self._places.items()]
        try:
            yield convert
        finally:
            for hook in hooks:
                hook.remove()


def first_blocks(last: int) -> str:
    """Name the blocks from the first to ``last``."""
    return f"blocks 0 to {last}" if last else "block 0"


Convert = Callable[[range, Sequence[str]], None]


def _linear(block: nn.Module, kind: str) -> nn.Linear:
    layer = block.get_submodule(kind)
    assert isinstance(layer, nn.Linear)
    return layer


def _rows_of(block: nn.Module, kind: str) -> tuple[int, ...]:
    """The rows of each part of a fused layer."""
    if kind == "attention.qkv":
        return tuple(block.get_submodule("attention").splits)  # type: ignore[arg-type]
    rows = _linear(block, kind).out_features // 2
    return rows, rows


@torch.no_grad()
def dense_twin(model: TernaryTransformer) -> TernaryTransformer:
    """Return the model with dense layers around the same weights: what the latent weights compute without a mask.

    Args:
        model: A model in any arithmetic that has latent weights.

    Raises:
        ConfigError: If a layer holds codes and no latent weight.
    """
    if model.config.linear == "dense":
        return model
    state = without_learned_scales(without_masks(model.state_dict()), ternary_layers(model))
    if any(name.endswith(".codes") for name in state):
        raise ConfigError(NO_LATENT_WEIGHTS)
    with torch.device("meta"):
        dense = TernaryTransformer(replace(model.config, linear="dense", layers=()))
    dense.load_state_dict(state, assign=True)
    dense.cos, dense.sin = model.cos, model.sin
    return dense.eval()


def as_tables(results: Sequence[Measured]) -> str:
    """Return the tables for a terminal: a section each, a row for what is converted, a column for each variant."""
    base = next((one.loss for one in results if one.variant is None), None)
    lines = []
    for section in SECTIONS:
        own = [one for one in results if one.section == section]
        if not own:
            continue
        if section == "whole":
            rows = [[VARIANTS[one.variant] if one.variant else "before conversion", *_cells(one, base)] for one in own]
            lines.append(format_table(["all layers", "loss", "perplexity", "more than before"], rows))
            continue
        variants = [variant for variant in VARIANTS if any(one.variant == variant for one in own)]
        found = {(one.converted, one.variant): one for one in own}
        names = list(dict.fromkeys(one.converted for one in own))
        title = {"parts": "one part alone", "blocks": "one block alone", "cumulative": "the first blocks"}[section]
        header = [title, *(f"{VARIANTS[variant]}: loss" for variant in variants)]
        rows = [[name, *(f"{found[name, variant].loss:.3f}" for variant in variants)] for name in names]
        lines.append(format_table(header, rows))
    return "\n\n".join(lines)


def _cells(one: Measured, base: float | None) -> list[str]:
    more = "" if one.variant is None or base is None else f"{one.loss - base:+.3f}"
    return [f"{one.loss:.3f}", f"{one.perplexity:,.1f}" if one.perplexity < 1e7 else f"{one.perplexity:.1e}", more]


def as_records(results: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return plain values for JSON."""
    return [asdict(one) | {"perplexity": one.perplexity if math.isfinite(one.perplexity) else None} for one in results]
