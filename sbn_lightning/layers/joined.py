"""Layers of a foreign model that read the same tokens, computed as one layer in a compiled training step.

``q``, ``k`` and ``v`` of an attention read the same tokens in most models, and so do gate and up. A conversion notes
such layers by the names of their siblings. In a forward the first of them multiplies for all of them, and leaves each
of the others its result together with the tokens. A layer takes the result if it gets the very same tensor. Otherwise
it multiplies itself, and its group is given up. In the next forward a group is also given up if a layer has not taken
its result. So a wrong guess from names costs time in the first step, and a layer that is not called has gradients of
zeros there.

This happens only inside ``torch.compile``, in training, and where the backend can join layers
(:mod:`sbn_lightning.backends.joined`). Layers stay apart in a checkpoint inside of a compiled model. Whether a step is
compiled does not change during a run. So a run that resumes has the bits of one that went on.
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


def note_groups(model: nn.Module, layer_class: type[nn.Module]) -> None:
    """Tell layers which of their siblings read the same tokens, by their names.

    Args:
        model: A model with converted layers.
        layer_class: The class of the layers, exactly.
    """
    for module in model.modules():
        children = dict(module.named_children())
        for names in GROUPS:
            layers = tuple(children.get(name) for name in names)
            if all(type(layer) is layer_class for layer in layers):
                for layer in layers:
                    layer.readers = layers  # type: ignore[union-attr, assignment]


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
    if not in_compiled_training() or _is_in_operation():
        return None
    if any(other.given is not None for other in layer.readers):
        # A sibling was not called. It would keep its result, and get a gradient of zeros.
        _give_up(layer.readers)
        return None
    results = _together(layer.readers, x)
    own = None
    for other, y in zip(layer.readers, results, strict=False):
        if other is layer:
            own = y
        else:
            other.given = (x, y)
    return own


def _give_up(layers: tuple[Any, ...]) -> None:
    for layer in layers:
        layer.readers, layer.given = (), None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_in_operation() -> bool:
    """Whether the compiler traces a function that it treats as one operation, such as a checkpoint.

    A layer cannot leave a result with another layer in such a function: the compiler would give up the whole model.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.current_tracer.parent is not None
    except AttributeError:  # Another version of torch. Layers that stay apart are slower and never wrong.
        return True


def _together(layers: tuple[Any, ...], x: Tensor) -> tuple[Tensor, ...]:
    """The results of all layers; none if the layers cannot be joined."""
    backends = [layer.backend for layer in layers]
    if not x.is_floating_point() or any(layer.is_partly_rounded or is_hooked(layer) for layer in layers):
        return ()
    # Looked up in the class: a wrapper that passes attributes on has other latent weights than the layer.
    if not hasattr(type(backends[0]), "several") or len({type(backend) for backend in backends}) > 1:
        return ()
    dtype = result_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        found = backends[0].several(x, [layer.for_gradients() for layer in layers], backends, dtype)
        return tuple(
            y if layer.bias is None else y + layer.bias.to(y.dtype) for layer, y in zip(layers, found, strict=False)
        )
