"""Layers of a foreign model that read the same tokens, computed as one layer in a compiled training step.

``q``, ``k`` and ``v`` of an attention read the same tokens in most models, and so do gate and up. A conversion notes
such layers by the names of their siblings. In a forward the first of them multiplies for all of them, and leaves each
of the others its result together with the tokens. A layer takes the result if it gets the very same tensor. Otherwise
it multiplies itself, and its group is given up. In the next forward a group is also given up if a layer has not taken
its result. So a wrong guess from names costs time in the first step, and a layer that is not called has gradients of
zeros there.

This happens only inside ``torch.compile``, in training, and where the backend can join layers
(:mod:`sbn_lightning.backends.joined`). Layers stay apart under activation checkpointing inside of a compiled model.
Whether a step is compiled does not change during a run. So a run that resumes has the bits of one that went on. The
exception is a model with a wrong guess, for example with attention between two texts. A resumed run makes the guess
again, and rounds int8 gradients of its first step with other draws.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sbn_lightning.layers.options import in_compiled_training, is_hooked, result_dtype

GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("wq", "wk", "wv"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),  # A SwiGLU between them is found by its formula instead (swiglu_fusion.py).
)


class Readers:
    """Layers that probably read the same tokens.

    A copy or a pickle of a model has groups of its own. A copy of one layer does not take the other layers along. Its
    group is not complete, so it multiplies itself.

    Args:
        count: The number of layers.

    Attributes:
        layers: The layers in the order in which they are joined; empty if the group was given up.
        missing: How many layers have not entered the group. Layers of a copied group enter one by one.
    """

    def __init__(self, count: int) -> None:
        self.layers: list[Any] = [None] * count
        self.missing = count

    def __deepcopy__(self, memo: dict[int, Any]) -> Readers:
        return Readers(len(self.layers))

    def __reduce__(self) -> tuple[Any, ...]:
        return Readers, (len(self.layers),)

    def number(self, layer: Any) -> int:
        """The place of a layer in the group; -1 if the group was given up."""
        return next((i for i, other in enumerate(self.layers) if other is layer), -1)

    def enter(self, layer: Any, number: int) -> bool:
        """Put a layer at its place.

        Returns:
            Whether the place was free. It is not for a shallow copy of a layer, and not if the group was given up.
        """
        if number < 0 or self.layers[number] is not None:
            return False
        self.layers[number] = layer
        self.missing -= 1
        return True


def note_groups(model: nn.Module, layer_class: type[nn.Module]) -> None:
    """Tell layers which of their siblings read the same tokens, by their names. Known groups stay as they are.

    Args:
        model: A model with converted layers.
        layer_class: The class of the layers, exactly.
    """
    for module in model.modules():
        children = dict(module.named_children())
        for names in GROUPS:
            layers: list[Any] = [children.get(name) for name in names]
            if all(type(layer) is layer_class and layer.readers is None for layer in layers):
                group = Readers(len(layers))
                for i, layer in enumerate(layers):
                    layer.readers = group
                    group.enter(layer, i)


def joined_result(layer: Any, x: Tensor) -> Tensor | None:
    """Compute a layer together with those that read the same tokens.

    Args:
        layer: One layer of a group.
        x: The tokens, ``[..., features]``.

    Returns:
        The result of the layer; None if the layer has to compute by itself.
    """
    if layer.given is not None:
        (tokens, y), layer.given = layer.given, None
        if tokens is x:
            return y
        _give_up(layer.readers)
        return None
    layers = layer.readers.layers
    if not layers or layer.readers.missing or not in_compiled_training() or _is_in_operation():
        return None
    if any(other.given is not None for other in layers):
        # A sibling was not called. It would keep its result, and get a gradient of zeros.
        _give_up(layer.readers)
        return None
    results = _together(layers, x)
    own = None
    for other, y in zip(layers, results, strict=False):
        if other is layer:
            own = y
        else:
            other.given = (x, y)
    return own


def _give_up(group: Readers) -> None:
    for layer in group.layers:
        layer.given = None
    group.layers = []


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_in_operation() -> bool:
    """Whether the compiler traces a function that it treats as one operation, such as a checkpoint.

    A layer cannot leave a result with another layer in such a function: the compiler would give up the whole model.
    torch 2.11 to 2.14 have no public function for this question: ``torch.compiler.is_compiling`` is true on both sides.
    If a later torch has no such attribute, layers stay apart, and the tests that count joins fail.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx().output.current_tracer.parent is not None
    except (AttributeError, ImportError):
        return True  # Another version of torch. Layers that stay apart are slower and never wrong.


def _together(layers: list[Any], x: Tensor) -> tuple[Tensor, ...]:
    """The results of all layers; none if the layers cannot be joined."""
    backends = [layer.backend for layer in layers]
    if not x.is_floating_point() or any(layer.is_partly_rounded or is_hooked(layer) for layer in layers):
        return ()
    if len({type(backend) for backend in backends}) > 1:
        return ()
    dtype = result_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        found = backends[0].several(x, [layer.for_gradients() for layer in layers], backends, dtype)
        return tuple(
            y if layer.bias is None else y + layer.bias.to(y.dtype) for layer, y in zip(layers, found, strict=False)
        )
