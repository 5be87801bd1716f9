"""Finds the SwiGLU of models that this package did not write, and hands it to the layer after it.

Many models compute ``down(silu(gate(x)) * up(x))`` with three linear layers. A backend that multiplies integers has to
quantise the product ``silu(gate) * up`` before the last layer, and can do both in one pass over gates and ups
(:mod:`sbn_kernels.swiglu`). For that, the module has to give the last layer gates and ups in place of their product.

A module is recognised by its forward and not by its name: ``torch.fx`` traces the forward, and the graph must be
exactly the formula above, with no other operation in it. The module then gets a class of its own, derived from the
class it had. The new forward gives the pair to the last layer where the layer's backend takes pairs. Everywhere else,
for example on the reference backend, or if somebody has put a hook on the last layer or on the activation, it runs the
module's own forward. So nothing changes on a CPU.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from sbn_lightning.layers.gated import swiglu_of_pair
from sbn_lightning.layers.instance_forward import change_class, why_class_stays
from sbn_lightning.layers.options import is_hooked
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear

_PRODUCTS: tuple[Any, ...] = (operator.mul, torch.mul, "mul")


class FusedSwiGLU(nn.Module):
    """The part of a module's class that computes ``down(silu(gate(x)) * up(x))`` with the pair.

    Attributes:
        swiglu_parts: The names of gate, up, down and activation; the last one is None for a function.
        swiglu_of: The class that the module had before.
    """

    swiglu_parts: tuple[str, str, str, str | None]
    swiglu_of: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the module's own forward computes."""
        gate, up, down, activation = self.swiglu_parts
        last = getattr(self, down)
        if kwargs or len(args) != 1 or not _takes_pair(last) or is_hooked(last):
            return super().forward(*args, **kwargs)
        if activation is not None and is_hooked(getattr(self, activation)):
            return super().forward(*args, **kwargs)
        return swiglu_of_pair(getattr(self, gate), getattr(self, up), last, args[0])

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the class that the module had, because this class is made while the program runs."""
        parts: Any = super().__reduce_ex__(protocol)
        return _empty, (self.swiglu_of,), *parts[2:]


_classes: dict[type[nn.Module], type[FusedSwiGLU]] = {}


def _fused_class(own: type[nn.Module]) -> type[FusedSwiGLU]:
    if own not in _classes:
        names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "swiglu_of": own}
        _classes[own] = type(own.__name__, (FusedSwiGLU, own), names)
    return _classes[own]


def _empty(own: type[nn.Module]) -> nn.Module:
    made = _fused_class(own)
    return made.__new__(made)


def _takes_pair(layer: nn.Module) -> bool:
    """Whether a layer multiplies on a backend that takes gates and ups in two tensors."""
    if type(layer) is not SparseBitLinear or not layer.backend.takes_pairs:
        return False
    return getattr(layer, "_rounding", None) is None  # A partial rounding is computed in plain PyTorch.


def fuse_swiglu(model: nn.Module) -> list[str]:
    """Find every SwiGLU between ternary layers, and let the last layer compute it.

    Args:
        model: A model with converted layers, changed in place.

    Returns:
        The names of the modules.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, FusedSwiGLU) or "forward" in vars(module):
            continue
        parts = _swiglu_parts(module)
        if parts is not None:
            module.__class__ = _fused_class(type(module))
            vars(module)["swiglu_parts"] = parts
            found.append(name.replace("_orig_mod.", ""))
    return found


def split_swiglu(model: nn.Module) -> None:
    """Undo :func:`fuse_swiglu`.

    A module whose ``forward`` somebody replaced since keeps its class, because the replacement may call the forward of
    that class. Between plain layers this forward computes what the module's own forward computes.
    """
    for module in model.modules():
        if isinstance(module, FusedSwiGLU) and why_class_stays(module) is None:
            own: Any = module.swiglu_of
            del vars(module)["swiglu_parts"]
            change_class(module, own)


class _Tracer(fx.Tracer):
    """Records the forward of one module; each child is one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _swiglu_parts(module: nn.Module) -> tuple[str, str, str, str | None] | None:
    """The names of gate, up, down and activation if the forward of ``module`` is exactly a SwiGLU between them."""
    ternary = [name for name, child in module.named_children() if type(child) is SparseBitLinear]
    if len(ternary) != 3:
        return None
    try:
        graph = _Tracer().trace(module)
    except Exception:  # The forward of somebody else may do anything; what cannot be traced is left as it is.
        return None
    inner = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    (output,) = (node for node in graph.nodes if node.op == "output")
    down = _call_of(output.args[0], ternary)
    if down is None or len(inner) != 5 or any(len(node.users) != 1 for node in inner):
        return None
    product = down.args[0]
    if not isinstance(product, fx.Node) or product.target not in _PRODUCTS or product.kwargs or len(product.args) != 2:
        return None
    for activated, other in (product.args, reversed(product.args)):
        up = _call_of(other, ternary)
        gate = _call_of(_input_of_silu(activated, module), ternary)
        if gate is None or up is None or gate.args != up.args or not isinstance(activated, fx.Node):
            continue
        if isinstance(gate.args[0], fx.Node) and gate.args[0].op == "placeholder":
            name = str(activated.target) if activated.op == "call_module" else None
            return str(gate.target), str(up.target), str(down.target), name
    return None


def _call_of(node: Any, names: list[str]) -> fx.Node | None:
    """``node`` if it calls one of the children with one argument."""
    if isinstance(node, fx.Node) and node.op == "call_module" and node.target in names:
        return node if len(node.args) == 1 and not node.kwargs else None
    return None


def _input_of_silu(node: Any, module: nn.Module) -> Any:
    """What a SiLU reads, if ``node`` is a SiLU."""
    if not isinstance(node, fx.Node) or len(node.args) != 1 or node.kwargs.get("inplace", False):
        return None
    if node.op == "call_function" and node.target is F.silu:
        return node.args[0]
    if node.op == "call_module" and _is_silu(getattr(module, str(node.target), None)):
        return node.args[0]
    return None


def _is_silu(activation: Callable[..., Any] | None) -> bool:
    """Whether a module without parameters computes SiLU, to the last bit."""
    if not isinstance(activation, nn.Module) or any(True for _ in activation.parameters()):
        return False
    if type(activation) is nn.SiLU:
        return True
    x = torch.linspace(-20, 20, 321)
    try:
        return torch.equal(activation(x.clone()), F.silu(x))
    except Exception:  # It wants something else than one tensor of floats.
        return False
