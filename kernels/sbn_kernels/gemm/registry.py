"""The registry of kernels: what each one needs, which weights it reads, and which of several comes first.

A kernel is one :class:`Product` (``y = x8 @ T^T``, scaled), one :class:`Grouped` (the same for the tokens of many
experts) or one :class:`Gradients` (both products of the backward).
The file of the kernel registers it; nothing else in the package knows it by name. To support a new GPU, write the
kernel in a folder of its own and register it with a higher ``rank`` than the kernels it is to replace.

The registry answers three questions: which kernels can serve a layer on a GPU, and why the others cannot
(:func:`products`, :meth:`Product.unfit`); which of the kernels that read one form of packed weight takes a given number
of tokens (:func:`serving`); which kernels make the gradients (:func:`gradients`). It measures nothing: that, and the
wish of the user, belong to the caller.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sbn_kernels.runtime.capability import Needs, UnsupportedError, constant, multiprocessors

Form = str
"""How a weight is stored for a kernel. ``"codes"``: int8 ``[out, in]``. ``"dense"`` and ``"sparse24"``: the 2-bit words
of :mod:`sbn_kernels.common.packing`. Any other name belongs to the kernels that read it."""


class Multiply(Protocol):
    """``(x8 @ T^T) * scale * row_scale (+ bias)``."""

    def __call__(
        self,
        x8: Tensor,
        scale: Tensor,
        weight: Tensor,
        row_scale: Tensor,
        out_features: int,
        bias: Tensor | None = None,
        out_dtype: torch.dtype = torch.bfloat16,
        /,
    ) -> Tensor:
        """Multiplies int8 tokens ``[tokens, in]`` by a weight in the form of the kernel -> ``[tokens, out]``."""


@dataclass(frozen=True)
class LinearShape:
    """What a kernel asks of a layer before it says whether it can serve it.

    Attributes:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        n: Weights left in a group.
        m: Weights of a group.
        activation_bits: Bits of a quantised token; None: tokens are not quantised.
    """

    in_features: int
    out_features: int
    n: int
    m: int
    activation_bits: int | None = 8


@dataclass(frozen=True)
class Product:
    """A kernel that multiplies int8 tokens by a ternary weight.

    Attributes:
        name: The name of the kernel, unique.
        backend: The name under which a user asks for such kernels: ``"int8"`` for dense integer tensor cores,
            ``"sparse"`` for sparse ones.
        needs: What the kernel needs of the machine.
        form: The form of weight the kernel reads.
        multiply: The product.
        pack: Makes that form of int8 codes ``[out, in]``.
        pattern: The pattern the kernel is written for, as (N, M); None: any.
        multiple_of: The number that has to divide in_features and out_features.
        for_packed_layers: Whether the kernel can serve a layer that holds packed weights and no latent weight.
        most_tokens: The largest number of tokens the kernel takes; None: any number.
        prefers: Whether the kernel is the fastest for (tokens, out_features, in_features, multiprocessors); asked only
            of kernels with ``most_tokens``, where another kernel reads the same form. None: always.
        denser: The name of the kernel that serves a layer while its mask still keeps more than ``pattern`` allows.
        rank: The priority: of several kernels of one backend that fit, the one with the highest rank is taken.
        untimed: Whether nobody has timed the kernel on the GPUs that would take it, so that its rank is a guess. A
            caller that measures times such a kernel beside the first one.
    """

    name: str
    backend: str
    needs: Needs
    form: Form
    multiply: Multiply
    pack: Callable[[Tensor], Tensor]
    pattern: tuple[int, int] | None = None
    multiple_of: int = 1
    for_packed_layers: bool = True
    most_tokens: int | None = None
    prefers: Callable[[int, int, int, int], bool] | None = None
    denser: str = ""
    rank: int = 0
    untimed: bool = False

    def holds(self, n: int, m: int) -> bool:
        """Whether a weight with at most ``n`` of ``m`` left fits the kernel's pattern."""
        return self.pattern is None or (m == self.pattern[1] and n <= self.pattern[0])

    def unfit(self, shape: LinearShape) -> str | None:
        """Says why the kernel cannot serve a layer, whatever the machine; None if it can."""
        if shape.activation_bits is None:
            return "activation_bits=None leaves nothing to multiply as integers"
        if self.pattern is not None and not self.holds(shape.n, shape.m):
            n, m = self.pattern
            return f"sparse tensor cores take {n}:{m}, not {shape.n}:{shape.m}"
        if shape.in_features % self.multiple_of or shape.out_features % self.multiple_of:
            return f"{self.name} needs multiples of {self.multiple_of}, not {shape.in_features} -> {shape.out_features}"
        return None


@dataclass(frozen=True)
class Gradients:
    """Kernels of a backward pass with int8 gradients.

    Attributes:
        name: The name of the kernels, unique.
        needs: What the kernels need of the machine.
        transpose: Makes of int8 codes ``[out, in]`` the form of the weight that ``input_gradient`` reads.
        input_gradient: ``dX = scale * (a8 @ T)`` of (a8, scale, transposed weight, in_features, dtype).
        weight_gradient: ``dW = scale * (b8t @ x8t^T)`` of (b8t, scale, x8t, dtype).
        add_weight_gradient: Adds ``dW`` to a float32 tensor in place: (tensor, b8t, scale, x8t). None: there is no such
            kernel, and the product is made and added.
        rank: The priority: the kernels with the highest rank that run are taken.
    """

    name: str
    needs: Needs
    transpose: Callable[[Tensor], Tensor]
    input_gradient: Callable[[Tensor, Tensor, Tensor, int, torch.dtype], Tensor]
    weight_gradient: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
    add_weight_gradient: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None
    rank: int = 0


@dataclass(frozen=True)
class Grouped:
    """A kernel that multiplies the tokens of a mixture of experts, all experts in one launch.

    Attributes:
        name: The name of the kernel, unique.
        needs: What the kernel needs of the machine.
        multiply: The product of (int8 tokens sorted by expert, their scales, packed weight, row_scale, number of tokens
            of each expert, dtype).
        pack: Makes the form of weight that the kernel reads of int8 codes ``[experts * rows, in]``.
        rank: The priority: of the kernels that run, the one with the highest rank is taken.
    """

    name: str
    needs: Needs
    multiply: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]
    pack: Callable[[Tensor], Tensor]
    rank: int = 0


Kernel = Product | Gradients | Grouped

_PRODUCTS: dict[str, Product] = {}
_GRADIENTS: dict[str, Gradients] = {}
_GROUPED: dict[str, Grouped] = {}


def register(kernel: Kernel) -> None:
    """Adds a kernel.

    Raises:
        ValueError: If another kernel has the name.
    """
    tables: dict[type, dict[str, Any]] = {Product: _PRODUCTS, Gradients: _GRADIENTS, Grouped: _GROUPED}
    table = tables[type(kernel)]
    if kernel.name in table:
        raise ValueError(f"a kernel named {kernel.name!r} is registered already")
    table[kernel.name] = kernel
    _forget()


def unregister(name: str) -> None:
    """Removes the kernels of that name."""
    _PRODUCTS.pop(name, None)
    _GRADIENTS.pop(name, None)
    _GROUPED.pop(name, None)
    _forget()


@contextmanager
def registered(*kernels: Kernel) -> Iterator[None]:
    """Adds kernels for the time of a ``with`` block."""
    for kernel in kernels:
        register(kernel)
    try:
        yield
    finally:
        for kernel in kernels:
            unregister(kernel.name)


def _forget() -> None:
    _readers.cache_clear()
    _gradients_on.cache_clear()


def product(name: str) -> Product:
    """The product of that name.

    Raises:
        KeyError: If there is none.
    """
    return _PRODUCTS[name]


def products(backend: str | None = None) -> list[Product]:
    """All products, of one backend or of any, the first choice first."""
    found = [kernel for kernel in _PRODUCTS.values() if backend is None or kernel.backend == backend]
    return sorted(found, key=lambda kernel: -kernel.rank)


def all_grouped() -> list[Grouped]:
    """All kernels for mixtures of experts, the first choice first."""
    return sorted(_GROUPED.values(), key=lambda kernel: -kernel.rank)


def grouped(index: int | None) -> Grouped:
    """The kernel for mixtures of experts on GPU ``index`` (None: no GPU).

    Raises:
        UnsupportedError: If no such kernel runs there.
    """
    reasons = []
    for kernel in all_grouped():
        if (reason := kernel.needs.missing(index)) is None:
            return kernel
        reasons.append(f"{kernel.name} {reason}")
    raise UnsupportedError(f"experts in one launch: {'; '.join(reasons) or 'no kernel is registered'}")


def all_gradients() -> list[Gradients]:
    """All kernels of the backward, the first choice first."""
    return sorted(_GRADIENTS.values(), key=lambda kernel: -kernel.rank)


@constant
def readers(form: Form, index: int | None) -> tuple[str, ...]:
    """Names of the kernels that read a form of weight and run on GPU ``index``; those for few tokens come first.

    A constant to ``torch.compile``.
    """
    return _readers(form, index)


@functools.cache
def _readers(form: Form, index: int | None) -> tuple[str, ...]:
    found = [kernel for kernel in products() if kernel.form == form and kernel.needs.missing(index) is None]
    return tuple(kernel.name for kernel in sorted(found, key=lambda kernel: kernel.most_tokens is None))


def serving(
    form: Form, tokens: int, out_features: int, in_features: int, index: int | None, chosen: str | None = None
) -> Product | None:
    """The kernel that multiplies so many tokens by a weight in this form.

    Comparisons and constants only, so that ``torch.compile`` can follow a number of tokens that varies.

    Args:
        form: The form of the weight.
        tokens: The number of tokens.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        index: The number of the GPU; None: no GPU.
        chosen: The name of the kernel for any number of tokens that the caller has chosen; None: the first one that
            somebody has timed.

    Returns:
        The kernel, or None if no kernel that runs here reads the form for so many tokens.
    """
    names = readers(form, index)
    if chosen is None:
        for name in names:
            if _PRODUCTS[name].most_tokens is None and not _PRODUCTS[name].untimed:
                chosen = name
                break
    for name in names:
        kernel = _PRODUCTS[name]
        if kernel.most_tokens is None or tokens > kernel.most_tokens:
            continue
        if chosen is None or kernel.prefers is None or index is None:
            return kernel
        if kernel.prefers(tokens, out_features, in_features, multiprocessors(index)):
            return kernel
    return None if chosen is None else _PRODUCTS[chosen]


def form_for_few_tokens(kernel: Product, index: int | None) -> Form | None:
    """The form of weight that serves a few tokens beside a kernel for many: the kernel's own if one reads it.

    Args:
        kernel: The kernel for many tokens.
        index: The number of the GPU; None: no GPU.

    Returns:
        The form, or None if no kernel for few tokens runs here.
    """
    few = [k for k in products() if k.most_tokens is not None and k.needs.missing(index) is None and k.pattern is None]
    if kernel.form != "codes" or not few:
        return None if kernel.form == "codes" else kernel.form
    return few[0].form


@constant
def gradients_on(index: int | None) -> str | None:
    """The name of the kernels that make the gradients on GPU ``index``, None if no kernel can.

    A constant to ``torch.compile``.
    """
    return _gradients_on(index)


@functools.cache
def _gradients_on(index: int | None) -> str | None:
    return next((kernel.name for kernel in all_gradients() if kernel.needs.missing(index) is None), None)


def gradients(index: int | None) -> Gradients:
    """The kernels that make the gradients on GPU ``index`` (None: no GPU).

    Raises:
        UnsupportedError: If no kernel can.
    """
    name = gradients_on(index)
    if name is None:
        raise UnsupportedError("int8 gradients: no kernel for them runs here")
    return _GRADIENTS[name]
