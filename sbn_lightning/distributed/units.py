"""``Unit``: the ternary layers of one block, whose codes are whole only while the block computes.

With ``gather: packed_layer`` a rank holds the words of its own rows (2 bits a weight), and gathers the words of a block
when the block runs: before its forward, and again before its backward. Meanwhile the gather of the next block is under
way already. After the block has run, the memory of its codes is given back.

Autograd, compiled graphs and layers hold on to the tensors of codes. So the tensors stay, and only their memory goes
and comes back, as FSDP2 does with parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._pytree import tree_flatten

from sbn_lightning.distributed.rows import FlatGather

if TYPE_CHECKING:
    from sbn_lightning.distributed.exchange import Exchange, Request

FREED = ("codes", "packed", "transposed")  # The fields of a prepared weight whose memory is given back.


class _Held(NamedTuple):
    """What a rank needs to make the weight of a layer whole again."""

    request: Request
    words: Tensor  # The words of this rank's rows.
    row_scale: Tensor
    prepared: Any


class Unit:
    """The ternary layers of one block.

    Args:
        exchange: The exchange that gathers.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.before: Unit | None = None  # The unit of the block before this one.
        self.after: Unit | None = None
        self._held: dict[int, _Held] = {}  # By the leaf of the layer, which stays when the layer gets another backend.
        self._coming: FlatGather | None = None
        self._whole = self._running = False
        self._backward: _Backward = _Backward()

    def __deepcopy__(self, memo: dict[int, Any]) -> Unit:
        # A copy of a model, for example an average of weights, prepares its own weights.
        unit = memo[id(self)] = Unit(self.exchange)
        return unit

    def attach(self, block: nn.Module, before: Unit | None) -> None:
        """Gather codes when ``block`` runs.

        Args:
            block: The block that has the layers.
            before: The unit of the block that runs before this one; None for the first block.
        """
        self.before = before
        if before is not None:
            before.after, self._backward = self, before._backward
        block.register_forward_pre_hook(self.before_forward, prepend=True)
        block.register_forward_hook(self.after_forward, always_call=True)

    def hold(self, request: Request, words: Tensor, row_scale: Tensor, prepared: Any) -> None:
        """Note how the weight of a layer is made whole again. Its memory is there at present."""
        self._held[id(request.backend.leaf)] = _Held(request, words, row_scale, prepared)
        self._coming, self._whole = None, True

    def replace(self, backend: Any, prepared: Any) -> None:
        """Hold a weight in the form that its layer takes: without its codes."""
        held = self._held[id(backend.leaf)]
        self._held[id(backend.leaf)] = held._replace(prepared=prepared)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]  # Inside a compiled graph there is no memory to give back.
    def before_forward(self, block: nn.Module, arguments: Any) -> None:
        self._running = True
        self.gather()
        if self.after is not None and self._backward.unit is None:
            self.after.start()

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def after_forward(self, block: nn.Module, arguments: Any, output: Any) -> None:
        self._running = False
        if self._backward.unit is self:
            return  # Activation checkpointing computes the block again, and its backward follows.
        wanting = [tensor for tensor in tree_flatten(output)[0] if isinstance(tensor, Tensor) and tensor.requires_grad]
        for tensor in wanting:
            tensor.register_hook(self._before_backward)
        if not wanting or self.after is not None:  # The backward begins with the last block.
            self.free()

    def _before_backward(self, gradient: Tensor) -> None:
        if self._backward.unit is self:
            return
        if self._backward.unit is None:
            Variable._execution_engine.queue_callback(self._end_backward)
        else:
            self._backward.unit.free()
        self._backward.unit = self
        self.gather()
        if self.before is not None:
            self.before.start()

    def _end_backward(self) -> None:
        if self._backward.unit is not None:
            self._backward.unit.free()
        self._backward.unit = None

    def start(self) -> None:
        """Start to gather, unless the codes are whole or coming."""
        if self._coming is None and not self._whole and self._held:
            held = list(self._held.values())
            self._coming = self.exchange.gather([one.words for one in held], [one.request for one in held])

    def gather(self) -> None:
        """Make the codes whole."""
        if self._whole or not self._held:
            return
        with torch.inference_mode(False), torch.no_grad():
            self.start()
            assert self._coming is not None
            for held, whole in zip(self._held.values(), self._coming.wait(), strict=True):
                again = held.request.backend.assemble(held.request, whole, held.row_scale, held.prepared.mask_bits)
                for old, new in _memories(held.prepared, again):
                    with _unsafe_preserve_version_counter(old):
                        old.untyped_storage().resize_(new.untyped_storage().nbytes())
                        old.copy_(new)
        self._coming, self._whole = None, True

    def prepared(self) -> None:
        """Note that layers were prepared: give their memory back, unless the block is running."""
        if not self._running:
            self.free()

    def free(self) -> None:
        """Give the memory of the codes back."""
        for held in self._held.values():
            for tensor, _ in _memories(held.prepared, held.prepared):
                tensor.untyped_storage().resize_(0)
        self._coming, self._whole = None, False

    def reset(self) -> None:
        """Forget a backward that has raised an error."""
        if self._coming is not None:
            self._coming.wait()
        self._backward.unit = None
        self.free()

    def weight(self, backend: Any) -> Any:
        """A whole copy of the prepared weight of a layer. All ranks must call this together."""
        held = self._held[id(backend.leaf)]
        whole = self.exchange.gather([held.words], [held.request]).wait()[0]
        return held.request.backend.assemble(held.request, whole, held.row_scale, held.prepared.mask_bits)


class _Backward:
    """The unit whose backward is under way; shared by the units of a model."""

    unit: Unit | None = None


def _memories(prepared: Any, again: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors of a prepared weight whose memory is given back, in pairs with those of ``again``."""
    names = [name for name in FREED if isinstance(getattr(prepared, name, None), Tensor)]
    return [(getattr(prepared, name), getattr(again, name)) for name in names]
