"""The exchange that makes ternary weights from rows on several ranks: one collective for many layers.

A model has hundreds of ternary layers, and a collective for each would cost the host more time than the GPU needs for
the work. So layers hand in requests, and the requests of a whole model are served together:

1. Each rank computes the terms of gamma of its rows. One collective sends the terms of all layers.
2. Each rank computes codes and masks of its rows, at 2 bits a weight. One collective sends the words of all layers.
3. Each rank unpacks the words of all ranks.

``gamma_over: nonzero`` needs the codes before it can compute gamma, so layers with this option repeat step 1.

A buffer for the words of a very large model would be large itself. So a collective takes as many layers as fit into
:data:`MOST_BYTES`: 1.5 billion weights go at once, 8 billion in four collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

from sbn_lightning.backends.base import Keep
from sbn_lightning.backends.rows import Over, RowMaker, Terms
from sbn_lightning.distributed.gradients import GradientScatter
from sbn_lightning.distributed.rows import FlatGather, RowCut
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern

MOST_BYTES = 2**29  # The most bytes that one collective gathers from all ranks together.


class RowsBackend(Protocol):
    """What the exchange needs of a layer's backend, :class:`~sbn_lightning.distributed.packed.PackedRows`."""

    cut: RowCut
    maker: RowMaker
    leaf: Tensor
    unit: Any

    def fresh_rows(self, scores: Tensor, pattern: NMPattern, keep: Keep) -> Tensor: ...
    def take(self, request: Request, words: Tensor, whole: Tensor, row_scale: Tensor) -> Any: ...
    def assemble(self, request: Request, whole: Tensor, row_scale: Tensor, mask_bits: Tensor | None) -> Any: ...


class Request(NamedTuple):
    """What a layer asks for: its ternary weight. The fields are those of ``Backend.prepare``.

    Attributes:
        backend: The backend of the layer.
        latent: The latent weights of this rank's rows, ``[count, in_features]``.
        mask_bits: The whole packed mask; None for a fresh mask.
        keep: How many weights a fresh mask leaves in a group, for all rows, or for each row of the whole weight.
        sparsity: The options of the layer.
    """

    backend: RowsBackend
    latent: Tensor
    mask_bits: Tensor | None
    keep: Keep
    sparsity: SparsityConfig

    @property
    def own_keep(self) -> Keep:
        """``keep`` for this rank's rows."""
        return self.backend.cut.mine(self.keep) if isinstance(self.keep, Tensor) else self.keep


class Exchange:
    """Serves the requests of many layers together.

    Args:
        group: The ranks that share the rows of a weight.

    Attributes:
        beside: A function that is called when the words of the first layers are on their way. What the function starts
            runs while the words are unpacked.
        scatter: Where the gradients of the layers go.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.beside: Callable[[], object] | None = None
        self.scatter: GradientScatter | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        return self  # A copy of a model exchanges with the same ranks.

    def prepare(self, requests: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Make the ternary weights of some layers. All ranks must call this together, with requests of equal layers.

        Args:
            requests: The fields of a :class:`Request` for each layer.

        Yields:
            What ``linear`` takes, for each layer. A layer that drops its codes does so before the next layer has any.
        """
        asked = [Request(*request) for request in requests]
        masks = [_own_mask(request) for request in asked]
        overs: list[Over] = ["dense" if (over := r.sparsity.gamma_over) == "nonzero" else over for r in asked]
        read = [None if over == "dense" else mask for over, mask in zip(overs, masks, strict=True)]
        scales = self._row_scales(asked, read, overs, [None] * len(asked))
        words = [
            request.backend.maker.words(
                request.latent, mask, request.own_keep, request.backend.cut.mine(scale), request.sparsity
            )
            for request, mask, scale in zip(asked, masks, scales, strict=True)
        ]
        again = [i for i, request in enumerate(asked) if request.sparsity.gamma_over == "nonzero"]
        if again:
            own = [asked[i].backend.cut.mine(scales[i]) for i in again]
            new = self._row_scales([asked[i] for i in again], [masks[i] for i in again], ["kept"] * len(again), own)
            for i, scale in zip(again, new, strict=True):
                scales[i] = scale
        for some in _that_fit(asked, words):
            gather = self.gather([words[i] for i in some], [asked[i] for i in some])
            if self.beside is not None and some[0] == 0:
                self.beside()
            for i, whole in zip(some, gather.wait(), strict=True):
                yield asked[i].backend.take(asked[i], words[i], whole, scales[i])
            for unit in {id(unit): unit for i in some if (unit := asked[i].backend.unit) is not None}.values():
                unit.prepared()

    def gather(self, words: Sequence[Tensor], asked: Sequence[Request]) -> FlatGather:
        """Start to gather the words of some layers from all ranks."""
        return FlatGather(words, [request.backend.cut for request in asked], self.group)

    def _row_scales(
        self,
        asked: Sequence[Request],
        masks: Sequence[Tensor | None],
        overs: Sequence[Over],
        rounding: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """Compute gamma of each row of the whole weights.

        Args:
            asked: The requests.
            masks: The packed masks of this rank's rows; None if gamma is the mean over all weights.
            overs: The weights that gamma is a mean over, for each request.
            rounding: gamma of this rank's rows, if the weights that round to zero do not count; otherwise None.
        """
        terms = [
            request.backend.maker.terms(request.latent, mask, over, scale)
            for request, mask, over, scale in zip(asked, masks, overs, rounding, strict=True)
        ]
        scales: list[Tensor] = []
        for some in _that_fit(asked, [term[0] for term in terms]):
            cuts = [asked[i].backend.cut for i in some for _ in terms[i]]
            gather = FlatGather([term for i in some for term in terms[i]], cuts, self.group)
            whole = iter(gather.wait())
            gathered = [
                Terms(
                    parts=tuple(next(whole) for _ in terms[i]),
                    buffer=gather.buffer,
                    rows=asked[i].backend.cut.rows,
                    over=overs[i],
                    in_features=asked[i].latent.shape[1],
                    split_sizes=asked[i].sparsity.split_sizes,
                )
                for i in some
            ]
            scales += asked[some[0]].backend.maker.row_scales(gathered)
        return scales


def _own_mask(request: Request) -> Tensor | None:
    """The packed mask of this rank's rows, if it is given or if gamma depends on it; otherwise None."""
    if request.mask_bits is not None:
        return request.backend.cut.mine(request.mask_bits)
    if request.sparsity.gamma_over == "dense":
        return None
    return request.backend.fresh_rows(request.latent, request.sparsity.nm, request.own_keep)


def _that_fit(asked: Sequence[Request], tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Cut requests into runs that one collective takes. A run has one kind of backend, and at most one unit."""
    some: list[int] = []
    size = 0
    for i, (request, mine) in enumerate(zip(asked, tensors, strict=True)):
        cut = request.backend.cut
        own = cut.padded * cut.ranks * mine.shape[1:].numel() * mine.element_size()
        last = asked[some[-1]].backend if some else None
        if last is not None and (
            size + own > MOST_BYTES
            or last.unit is not request.backend.unit
            or type(last.maker) is not type(request.backend.maker)
        ):
            yield some
            some, size = [], 0
        some.append(i)
        size += own
    if some:
        yield some
