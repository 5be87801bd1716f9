"""Cross-entropy of a linear head without holding all logits at once.

With a vocabulary of 150k the logits of 16k tokens take 5 GB in bfloat16, and their gradient takes as much again. Fused
implementations work through the tokens in chunks. There is a choice of implementations:

* ``"chunked"`` is the one in this file, and runs on any device. It computes the loss and the gradients of a chunk in
  one go. A chunk has about a gigabyte of logits, and the host never waits for the device. (Liger's chunks shrink as the
  vocabulary grows, to 128 tokens for Qwen2.5-0.5B. The gradient of the head is read and written once for each chunk,
  which then takes longer than the products.)
* ``"liger"`` is Liger-Kernel (Triton, CUDA only), from the extra ``[liger]``. It takes the least memory.
* ``"torch"`` is ``torch.nn.functional.linear_cross_entropy`` of newer versions of PyTorch, on any device.
* ``"plain"`` computes all logits and then ``cross_entropy``. It compiles nothing, and is good enough for a small
  vocabulary.
* ``"auto"`` chooses. On CUDA it takes ``"chunked"`` for a vocabulary of :data:`CHUNKED_VOCABULARY` classes or more.
  Elsewhere it takes ``"torch"``, if PyTorch has it, for :data:`FUSED_VOCABULARY` classes or more. For a smaller
  vocabulary it takes ``"plain"``.

In training, the head's three products can run in 8 bits (:mod:`sbn_lightning.backends.int8_head`). Then ``"chunked"``
computes the loss. A loss without gradients, as in validation, is computed in full precision.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbn_lightning.backends.int8_head import Int8Head
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.core.install import how_to_install
from sbn_lightning.sparsity.ternary import float32_mm

LossImplementation = Literal["auto", "chunked", "liger", "torch", "plain"]
HeadPrecision = Literal["full", "int8"]

# The number of classes from which torch's fused loss is faster than "plain" on a CPU.
FUSED_VOCABULARY = 16384
# The number of classes from which "chunked" is faster than "plain" on CUDA.
CHUNKED_VOCABULARY = 4096
# The number of bytes that the logits of a chunk may take. With 152k classes in bfloat16 a chunk has 4,096 tokens.
CHUNK_BYTES = 5 * 2**28


def choose_loss(implementation: LossImplementation, vocab_size: int, device: torch.device) -> LossImplementation:
    """Choose an implementation for ``"auto"``, and check that any other one can run here.

    Args:
        implementation: The name of an implementation, or ``"auto"``.
        vocab_size: The number of classes.
        device: The device that computes the loss.

    Raises:
        ConfigError: If the implementation is unknown or cannot run here. The message says what to do.
    """
    has_liger = device.type == "cuda" and find_spec("liger_kernel") is not None
    has_torch = hasattr(nn, "LinearCrossEntropyOptions")
    if implementation == "auto":
        if device.type == "cuda":
            return "chunked" if vocab_size >= CHUNKED_VOCABULARY else "plain"
        return "torch" if has_torch and vocab_size >= FUSED_VOCABULARY else "plain"
    if implementation == "liger" and not has_liger:
        raise ConfigError(f"loss 'liger' needs a CUDA device and liger-kernel: {how_to_install('liger')}")
    if implementation == "torch" and not has_torch:
        raise ConfigError(
            f'loss "torch" needs torch.nn.functional.linear_cross_entropy, which torch {torch.__version__} lacks; '
            'use "liger" or "plain"'
        )
    if implementation not in get_args(LossImplementation):
        raise ConfigError(f"loss={implementation!r} is not one of {', '.join(map(repr, get_args(LossImplementation)))}")
    return implementation


def check_head(precision: HeadPrecision, implementation: LossImplementation) -> None:
    """Check that an implementation can have a head of this precision.

    Raises:
        ConfigError: If the precision is unknown, or the implementation has no head in 8 bits.
    """
    if precision not in get_args(HeadPrecision):
        known = ", ".join(map(repr, get_args(HeadPrecision)))
        raise ConfigError(f"head_precision={precision!r} is not one of {known}")
    if precision == "int8" and implementation not in ("auto", "chunked"):
        raise ConfigError(f'head_precision="int8" needs loss="chunked" or "auto", not {implementation!r}')


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    implementation: LossImplementation = "auto",
    head_precision: HeadPrecision = "full",
) -> Tensor:
    """Mean cross-entropy of ``hidden @ weight^T`` against ``target``, in nats.

    Args:
        hidden: The hidden states, ``[tokens, d_model]``.
        weight: The weight of the head, ``[vocab_size, d_model]``.
        target: The classes to predict, int64 ``[tokens]``.
        implementation: The implementation; the docstring of this module lists them.
        head_precision: The precision of the products in training: ``"full"`` is the dtype of the tokens.

    Returns:
        The mean over tokens, a float32 scalar. It is 0 if there are none.

    Raises:
        ConfigError: If the implementation cannot run here, or not with this precision.
    """
    device = hidden.device.type
    check_head(head_precision, implementation)
    if not len(hidden):
        # Every weight gets a gradient, as on ranks that have tokens: the ranks average them.
        return (hidden * 0).sum(dtype=torch.float32) + (weight * 0).sum(dtype=torch.float32)
    in_int8 = head_precision == "int8" and torch.is_grad_enabled()
    chosen = "chunked" if in_int8 else choose_loss(implementation, weight.shape[0], hidden.device)
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden = hidden.to(dtype)
        weight = weight if chosen == "chunked" else weight.to(dtype)
    with torch.autocast(device, enabled=False):
        if chosen == "chunked":
            loss: Tensor = ChunkedCrossEntropy.apply(hidden, weight, target, torch.is_grad_enabled(), in_int8)
        elif chosen == "liger":
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            loss = liger_fused_linear_cross_entropy(hidden, weight, target)
        elif chosen == "torch":
            loss = F.linear_cross_entropy(hidden, weight, target, options=nn.LinearCrossEntropyOptions())
        else:
            logits = hidden @ weight.t()
            loss = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)
    return loss.float()


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of ``hidden [tokens, d_model]`` times ``weight [vocab_size, d_model]``, in chunks of tokens.

    The forward computes the gradients too. With the softmax ``P``, the one-hot targets ``Y`` and ``n`` tokens they are
    ``dH = (P - Y) W / n`` and ``dW = (P - Y)^T H / n``. Products are computed in the dtype of ``hidden``, and ``dW`` is
    summed in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, differentiate: bool, in_int8: bool = False
    ) -> Tensor:
        """Compute the loss, and with ``differentiate`` the gradients, whose products ``in_int8`` runs in 8 bits.

        ``weight`` may have a wider dtype than ``hidden``.
        """
        need_dh, need_dw = (differentiate and needed for needed in ctx.needs_input_grad[:2])
        if differentiate and in_int8:
            head: Int8Head | _Head = Int8Head(hidden, weight, target)
        else:
            head = _Head(hidden, weight, target)
        most = max(256, CHUNK_BYTES // (weight.shape[0] * hidden.element_size()))
        rows = 1 << (most.bit_length() - 1)  # A power of two divides the tokens of a common batch into equal chunks.
        scale = 1.0 / max(len(hidden), 1)
        total = hidden.new_zeros((), dtype=torch.float32)
        dh = torch.empty_like(hidden) if need_dh else None
        dw: Tensor | None = None
        for number, start in enumerate(range(0, len(hidden), rows)):
            part = slice(start, start + rows)
            if isinstance(head, _Head) and not differentiate:
                total += head.loss(part)
                continue
            loss, dh_part, dw = head.part(part, number, scale, need_dh, need_dw, dw)
            total += loss
            if dh is not None and dh_part is not None:
                dh[part] = dh_part
        ctx.save_for_backward(dh, dw)
        ctx.dtype = weight.dtype
        return total * scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dh, dw = ctx.saved_tensors
        (dy,) = grad_outputs
        # Nobody else holds these gradients, and that of a float32 head is large, so both are scaled in place.
        return None if dh is None else dh.mul_(dy), None if dw is None else dw.mul_(dy).to(ctx.dtype), *[None] * 3


class _Head:
    """The loss and the gradients of a micro-batch, with products in the dtype of the tokens."""

    def __init__(self, hidden: Tensor, weight: Tensor, target: Tensor) -> None:
        self._hidden, self._weight, self._target = hidden, weight.to(hidden.dtype), target
        self._run = _compiled() if hidden.is_cuda else _loss_and_gradient

    def loss(self, part: slice) -> Tensor:
        """The sum of the cross-entropies of some tokens."""
        logits = self._hidden[part] @ self._weight.t()
        return F.cross_entropy(logits.float(), self._target[part], reduction="sum")

    def part(
        self, part: slice, number: int, scale: float, want_hidden: bool, want_weight: bool, dw: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same with gradients, as :meth:`Int8Head.part`."""
        logits = self._hidden[part] @ self._weight.t()
        loss, gradient = self._run(logits, self._target[part], scale)
        del logits
        dh = gradient @ self._weight if want_hidden else None
        if want_weight:
            product = float32_mm(gradient.t(), self._hidden[part])
            dw = product if dw is None else dw.add_(product)
        return loss, dh, dw


def _loss_and_gradient(logits: Tensor, target: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy summed over tokens, and ``(softmax - one-hot) * scale`` in the dtype of the logits."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_sum = wide.logsumexp(-1, keepdim=True)
    loss = (log_sum - wide.gather(-1, target.unsqueeze(-1))).sum()
    classes = torch.arange(logits.shape[-1], device=logits.device)
    gradient = ((wide - log_sum).exp() - (classes == target.unsqueeze(-1)).to(wide.dtype)) * scale
    return loss, gradient.to(logits.dtype)


@functools.cache
def _compiled() -> Any:
    return torch.compile(_loss_and_gradient)
