"""The three products of a dense head in training on int8 tensor cores: logits, and the gradients of both factors.

The head is not ternary. Unlike in a ternary layer, weight and tokens are therefore rounded, too::

    logits = s_h s_w (h8 w8^T)               h8: one scale a token; w8: one scale a class; both to the nearest
    dH     = s_a (a8 w8)                     a8: G s_w, one scale a token, rounded stochastically
    dW     = s_b (b8^T h8)                   b8: G s_h, one scale a class, rounded stochastically

``G`` is the gradient of the logits. The sums are exact. Given the rounded factors, the gradients are unbiased: the
formulas are those of a ternary layer (:mod:`sbn_kernels.gradients.reference`), with ``w8`` in the place of the ternary
codes. The draws come from a seed that is made of the batch itself, so a pass that is run again gives the same bits, and
there is no state to save.

On a GPU the kernels of the ternary layers' backward multiply. Elsewhere their twins in plain PyTorch do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import sbn_kernels as sk
import torch
from sbn_kernels.gradients.reference import QuantizedGradient, cross_entropy_rounded_reference
from sbn_kernels.gradients.reference import weight_gradient_reference as product_reference
from sbn_kernels.quantize.reference import quantize_tokens_reference
from torch import Tensor


class _Arithmetic(NamedTuple):
    """The functions that compute.

    ``multiply(a8, scale, b8, dtype)`` is ``scale * (a8 @ b8^T)``, and ``add(total, a8, scale, b8)`` adds the same to a
    float32 tensor.
    """

    quantize: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    cross_entropy: Callable[..., tuple[Tensor, QuantizedGradient]]
    transpose: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
    add: Callable[[Tensor, Tensor, Tensor, Tensor], None]


def _by_twins(a8: Tensor, scale: Tensor, b8: Tensor, dtype: torch.dtype) -> Tensor:
    return product_reference(a8, scale, b8.t(), dtype)


def _add_product(multiply: Callable[..., Tensor], total: Tensor, a8: Tensor, scale: Tensor, b8: Tensor) -> None:
    total.add_(multiply(a8, scale, b8, torch.float32))


_TWINS = _Arithmetic(
    quantize_tokens_reference,
    cross_entropy_rounded_reference,
    lambda x: x.t().contiguous(),
    _by_twins,
    partial(_add_product, _by_twins),
)


def _arithmetic(tensor: Tensor) -> _Arithmetic:
    if find_spec("triton") is None:
        return _TWINS
    import sbn_kernels.catalog  # noqa: F401 (registers the kernels)
    from sbn_kernels.gemm import registry
    from sbn_kernels.gradients import cross_entropy_rounded

    index = tensor.device.index if tensor.is_cuda else None
    if registry.gradients_on(index) is None:
        return _TWINS
    kernels = registry.gradients(index)
    multiply = kernels.weight_gradient
    add = kernels.add_weight_gradient or partial(_add_product, multiply)
    return _Arithmetic(sk.quantize_tokens, cross_entropy_rounded, sk.transpose_tokens, multiply, add)


class Int8Head:
    """The products of one micro-batch.

    Args:
        hidden: The tokens, bfloat16, float16 or float32 ``[tokens, d_model]``.
        weight: The weight of the head, ``[classes, d_model]``, in any of these dtypes.
        target: The classes to predict, int64 ``[tokens]``.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, target: Tensor) -> None:
        hidden, weight = hidden.detach(), weight.detach()
        self._arithmetic = _arithmetic(hidden)
        self._dtype, self._target = hidden.dtype, target
        # Without the scales of the classes, logits are outside of float16's range.
        self._logits_dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        self._tokens, self._token_scale = self._arithmetic.quantize(hidden, 8)
        self._codes, self._class_scale = self._arithmetic.quantize(weight, 8)
        self._codes_t: Tensor | None = None
        self._seed = seed_of(hidden, target)

    def part(
        self, part: slice, number: int, scale: float, want_hidden: bool = True, want_weight: bool = True,
        dw: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """The loss of some tokens, and the gradients from them.

        Args:
            part: The place of the tokens in the micro-batch.
            number: The number of the part; each part has draws of its own.
            scale: The factor of the gradients.
            want_hidden: Whether to compute the gradient of the tokens.
            want_weight: Whether to compute the gradient of the weight.
            dw: The gradient of the weight from earlier parts. The gradient from this part is added to it in place.

        Returns:
            The sum of the cross-entropies, float32; the gradient of the tokens, ``[tokens, d_model]`` in their dtype;
            and the gradient of the weight, float32 ``[classes, d_model]``. A gradient that is not wanted is None.
        """
        do, dh = self._arithmetic, None
        tokens, token_scale = self._tokens[part], self._token_scale[part]
        logits = do.multiply(tokens, token_scale, self._codes, self._logits_dtype)
        loss, rounded = do.cross_entropy(
            logits, self._class_scale, self._target[part], scale, token_scale, self._seed, number
        )
        del logits
        if want_hidden:
            if self._codes_t is None:
                self._codes_t = do.transpose(self._codes)
            dh = do.multiply(rounded.tokens, rounded.token_scale, self._codes_t, self._dtype)
        if want_weight:
            factors = rounded.channels, rounded.channel_scale, do.transpose(tokens)
            if dw is None:
                dw = do.multiply(*factors, torch.float32)
            else:
                do.add(dw, *factors)
        return loss.sum(), dh, dw


def seed_of(hidden: Tensor, target: Tensor) -> Tensor:
    """A seed made of the bits of a micro-batch, int64 ``[1]`` on its device.

    Another micro-batch gives another seed, and so do other weights, which change ``hidden``.
    """
    bits = hidden.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[hidden.element_size()]).sum(dtype=torch.int64)
    # Odd factors spread the sums over all 64 bits; int64 products wrap.
    return (bits * 0x5851F42D4C957F2D + target.sum(dtype=torch.int64) * 0x14057B7EF767814F).reshape(1)
