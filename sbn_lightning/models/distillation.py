r"""The losses with which a model learns from a teacher, in plain PyTorch.

With the teacher's distribution P and the student's Q over the next token, both at temperature t:

* ``"forward"``: :math:`t^2\, KL(P \| Q)`, the classic distillation loss (Hinton et al., arXiv 1503.02531). For
  quantised language models, LLM-QAT (arXiv 2305.17888) found the logits of the float model to be enough.
* ``"reverse"``: :math:`t^2\, KL(Q \| P)`, as in MiniLLM (arXiv 2306.08543): the student need not cover everything that
  the teacher holds possible.

With ``top_k``, only the teacher's k most likely classes are compared one by one; all others count as one class.

The logits of a long batch do not fit into memory with a vocabulary of 150k, and here there are two sets of them. So
:func:`linear_distillation` works through the tokens in chunks, computes the gradients of a chunk at once, and keeps
only the gradients of the hidden states and of the head.

The teacher may be a model, or what a model said before: its k most likely classes and their log-probabilities, stored
with the text (:class:`StoredLogits`). All other classes count as one there, too.

The gradient of the forward divergence over all classes with respect to the student's logits is ``t (Q - P)``. On a GPU
this case is one compiled function of the logits (:func:`forward_losses_and_gradient`). Elsewhere, and for the other
divergences, autograd differentiates :meth:`LogitsLoss.compare`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sbn_lightning.models.loss import CHUNK_BYTES
from sbn_lightning.sparsity.ternary import float32_mm

Divergence = Literal["forward", "reverse"]


@dataclass(frozen=True)
class LogitsLoss:
    """How the student's logits are compared with the data and with the teacher.

    Attributes:
        language_model: The weight of the cross-entropy against the next token.
        teacher: The weight of the divergence from the teacher.
        divergence: ``"forward"`` or ``"reverse"``; the docstring of the module has the formulas.
        temperature: The number by which all logits are divided for the divergence.
        top_k: How many classes of the teacher are compared one by one; None for all.
    """

    language_model: float = 0.0
    teacher: float = 1.0
    divergence: Divergence = "forward"
    temperature: float = 1.0
    top_k: int | None = None

    @property
    def is_closed(self) -> bool:
        """Whether :func:`forward_losses_and_gradient` computes this comparison."""
        return self.divergence == "forward" and self.top_k is None

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the divergence of each token, ``[tokens]``, from logits ``[tokens, classes]``."""
        q = (student / self.temperature).log_softmax(-1)
        p = (teacher.to(q.dtype) / self.temperature).log_softmax(-1)
        if self.top_k is not None and self.top_k < p.shape[-1]:
            p, classes = p.topk(self.top_k, -1)
            return self._with_rest(q.gather(-1, classes), p)
        return self._divergence(q, p)

    def compare_stored(self, student: Tensor, classes: Tensor, log_probabilities: Tensor) -> Tensor:
        """Return the divergence of each token, ``[tokens]``, from a teacher's stored classes, at temperature 1.

        Args:
            student: The student's logits, ``[tokens, classes]``.
            classes: The teacher's most likely classes, int64 ``[tokens, k]``.
            log_probabilities: Their log-probabilities, ``[tokens, k]``.
        """
        q = student.log_softmax(-1).gather(-1, classes)
        return self._with_rest(q, log_probabilities.to(q.dtype))

    def _with_rest(self, q: Tensor, p: Tensor) -> Tensor:
        p, q = (torch.cat((part, _log_rest(part)), -1) for part in (p, q))
        return self._divergence(q, p)

    def _divergence(self, q: Tensor, p: Tensor) -> Tensor:
        a, b = (p, q) if self.divergence == "forward" else (q, p)
        return (a.exp() * (a - b)).sum(-1) * self.temperature**2


class StoredLogits(NamedTuple):
    """What a teacher said about each token: its most likely classes, and their log-probabilities.

    Attributes:
        classes: The classes, int64 ``[tokens, k]``.
        log_probabilities: Their log-probabilities at temperature 1, ``[tokens, k]``.
    """

    classes: Tensor
    log_probabilities: Tensor


def likeliest(hidden: Tensor, weight: Tensor, top_k: int, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Return the most likely classes of a linear head and their log-probabilities, both ``[..., top_k]``.

    Args:
        hidden: The hidden states, ``[..., d_model]``.
        weight: The weight of the head, ``[classes, d_model]``.
        top_k: The number of classes of each token, the likeliest first.
        chunk: How many tokens' logits exist at once.
    """
    parts = [
        (part.to(weight.dtype) @ weight.t()).float().log_softmax(-1).topk(top_k, -1)
        for part in hidden.flatten(0, -2).split(chunk)
    ]
    shape = (*hidden.shape[:-1], top_k)
    return (
        torch.cat([part.indices for part in parts]).view(shape),
        torch.cat([part.values for part in parts]).view(shape),
    )


def _log_rest(log_probabilities: Tensor) -> Tensor:
    """Return the logarithm of the probability that is left, ``[tokens, 1]``."""
    return (1 - log_probabilities.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log()


def linear_distillation(
    hidden: Tensor,
    weight: Tensor | None,
    teacher_hidden: Tensor | StoredLogits,
    teacher_weight: Tensor | None,
    target: Tensor,
    options: LogitsLoss,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare the logits of two linear heads, a chunk of tokens at a time.

    Args:
        hidden: The student's hidden states, ``[tokens, d_model]``.
        weight: The weight of the student's head, ``[classes, d_model]``. None if ``hidden`` are logits already,
            ``[tokens, classes]``.
        teacher_hidden: The teacher's hidden states, ``[tokens, width]``; the width may differ from the student's. Or
            what the teacher said before.
        teacher_weight: The weight of the teacher's head, ``[classes, width]``. None for a teacher that was stored, and
            if ``teacher_hidden`` are logits already.
        target: The next tokens, int64 ``[tokens]``.
        options: How the logits are compared.
        chunk: The number of tokens in a chunk. None takes what fits into about a gigabyte.

    Returns:
        The weighted sum, which has gradients for ``hidden`` and ``weight``; the cross-entropy and the divergence, which
        have none. All are means over tokens, float32 scalars.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden = hidden if weight is None else hidden.to(dtype)
        if isinstance(teacher_hidden, Tensor) and teacher_weight is not None:
            teacher_hidden = teacher_hidden.to(dtype)
    closed = options.is_closed and isinstance(teacher_hidden, Tensor)
    if chunk is None:
        # Autograd holds five tensors of logits in float32: both models' logits, their logarithms, and a gradient. The
        # compiled function holds three in the dtype of the hidden states. A power of two divides the tokens of a common
        # batch into equal chunks.
        compiled = hidden.is_cuda and closed
        classes = hidden.shape[-1] if weight is None else weight.shape[0]
        most = CHUNK_BYTES // (classes * (3 * hidden.element_size() if compiled else 20))
        chunk = 1 << (max(64, most).bit_length() - 1)
    differentiate = torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        parts, dh, dw = _in_chunks(
            hidden.detach(),
            None if weight is None else weight.detach(),
            _detach(teacher_hidden, teacher_weight),
            target,
            options,
            chunk,
            needed=(
                differentiate and hidden.requires_grad,
                differentiate and weight is not None and weight.requires_grad,
            ),
        )
        total: Tensor = options.language_model * parts[0] + options.teacher * parts[1]
        if differentiate:
            total = _WithGradients.apply(total, hidden, weight, dh, dw)
    return total, parts[0], parts[1]


def _detach(hidden: Tensor | StoredLogits, weight: Tensor | None) -> tuple[Tensor, Tensor | None] | StoredLogits:
    if isinstance(hidden, StoredLogits):
        return hidden
    return hidden.detach(), None if weight is None else weight.detach().to(hidden.dtype)


def _logits(hidden: Tensor, head: Tensor | None) -> Tensor:
    return hidden if head is None else hidden @ head.t()


def _in_chunks(
    hidden: Tensor,
    weight: Tensor | None,
    teacher: tuple[Tensor, Tensor | None] | StoredLogits,
    target: Tensor,
    options: LogitsLoss,
    chunk: int,
    needed: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return both losses ``[2]``, and the gradients of ``hidden`` and ``weight`` where they are needed."""
    need_dh, need_dw = needed
    head = None if weight is None else weight.to(hidden.dtype)
    parts = hidden.new_zeros(2, dtype=torch.float32)
    dh = torch.empty_like(hidden) if need_dh else None
    dw = None
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        student = _logits(hidden[part], head)
        if isinstance(teacher, StoredLogits):
            its: Tensor | StoredLogits = StoredLogits(teacher.classes[part], teacher.log_probabilities[part])
        else:
            its = _logits(teacher[0][part], teacher[1])
        if hidden.is_cuda and options.is_closed and isinstance(its, Tensor):
            weights = (options.language_model, options.teacher, options.temperature)
            sums, gradient = _compiled()(student, its, target[part], *weights, 1 / len(hidden))
        else:
            sums, gradient = _by_autograd(student, its, target[part], options, need_dh or need_dw, len(hidden))
        parts += sums
        if gradient is None:
            continue
        gradient = gradient.to(hidden.dtype)
        if dh is not None:
            if head is None:
                dh[part] = gradient
            else:
                torch.mm(gradient, head, out=dh[part])
        if need_dw:
            product = float32_mm(gradient.t(), hidden[part])  # summed in float32, whatever the dtype of the head
            dw = product if dw is None else dw.add_(product)
    if need_dw and dw is None and weight is not None:  # No tokens. Other ranks may have some, and average gradients.
        dw = torch.zeros_like(weight)
    return parts / max(len(hidden), 1), dh, None if dw is None or weight is None else dw.to(weight.dtype)


def _by_autograd(
    student: Tensor,
    teacher: Tensor | StoredLogits,
    target: Tensor,
    options: LogitsLoss,
    differentiate: bool,
    count: int,
) -> tuple[Tensor, Tensor | None]:
    """Return both losses summed over tokens ``[2]``, and the gradient of their weighted sum divided by ``count``."""
    student = _wide(student).requires_grad_(differentiate)
    language = F.cross_entropy(student, target, reduction="sum")
    if isinstance(teacher, StoredLogits):
        divergence = options.compare_stored(student, teacher.classes, teacher.log_probabilities).sum()
    else:
        divergence = options.compare(student, _wide(teacher)).sum()
    sums = torch.stack((language.detach(), divergence.detach())).float()
    if not differentiate:
        return sums, None
    both = (options.language_model * language + options.teacher * divergence) / count
    return sums, torch.autograd.grad(both, student)[0]


def forward_losses_and_gradient(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    language_model: float,
    weight: float,
    temperature: float,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and the forward divergence, summed over tokens ``[2]``, and one gradient for both.

    Args:
        student: The student's logits, ``[tokens, classes]``.
        teacher: The teacher's logits, of the same shape.
        target: The next tokens, int64 ``[tokens]``.
        language_model: The weight of the cross-entropy in the gradient.
        weight: The weight of the divergence in the gradient.
        temperature: The number by which logits are divided for the divergence.
        scale: A factor of the gradient; the losses are not scaled.

    Returns:
        The losses without weights; and the gradient of their weighted sum with respect to ``student``, in the logits'
        dtype.
    """
    q_logits, p_logits = _wide(student), _wide(teacher)
    log_probabilities = q_logits - q_logits.logsumexp(-1, keepdim=True)
    q = log_probabilities
    if temperature != 1:  # At 1 both are the same, which a compiler does not see. It would read the logits once more.
        q_logits, p_logits = q_logits / temperature, p_logits / temperature
        q = q_logits - q_logits.logsumexp(-1, keepdim=True)
    p = p_logits - p_logits.logsumexp(-1, keepdim=True)
    language = -log_probabilities.gather(-1, target.unsqueeze(-1)).sum()
    divergence = (p.exp() * (p - q)).sum() * temperature**2
    classes = torch.arange(student.shape[-1], device=student.device)
    right = (classes == target.unsqueeze(-1)).to(q.dtype)
    gradient = language_model * (log_probabilities.exp() - right) + weight * temperature * (q.exp() - p.exp())
    return torch.stack((language, divergence)).float(), (gradient * scale).to(student.dtype)


@functools.cache
def _compiled() -> Any:
    return torch.compile(forward_losses_and_gradient)


class _WithGradients(torch.autograd.Function):
    """Attach gradients that were computed already to a loss."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, hidden: Tensor, weight: Tensor | None, dh: Tensor | None, dw: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(dh, dw)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dh, dw = ctx.saved_tensors
        dy = grad_outputs[0]
        return (
            None,
            None if dh is None else dh * dy.to(dh.dtype),
            None if dw is None else dw * dy.to(dw.dtype),
            None,
            None,
        )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def hidden_state_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare hidden states: the squared distance as a share of the teacher's squared length, a mean over tokens.

    The share is taken for each token, because a few tokens of a pretrained model (often the first) are a hundred times
    longer than the others, and would otherwise be the whole loss.

    Args:
        student: The student's hidden states, ``[..., d_model]``.
        teacher: The teacher's hidden states, of the same shape.
    """
    student, teacher = student.float(), teacher.float()
    return ((student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-6)).mean()


def relation_loss(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    """Compare how strongly the tokens of a sequence relate to each other, in the queries, the keys or the values.

    The features are split into relation heads. The relations of a head are ``softmax(X X^T / sqrt(size))``, and the
    loss is the KL divergence of the student's relations from the teacher's, a mean over heads and tokens (MiniLMv2,
    arXiv 2012.15828, sections 3.1 and 3.2; BitDistill, arXiv 2510.13998, uses it for ternary students). The widths of
    the two models may differ.

    Args:
        student: One kind of vectors of the student, ``[B, T, features]``.
        teacher: The same kind of vectors of the teacher, ``[B, T, features of the teacher]``.
        heads: The number of relation heads; divides both numbers of features.
    """
    q, p = (_log_relations(x.float(), heads) for x in (student, teacher))
    return (p.exp() * (p - q)).sum(-1).mean()


def _log_relations(x: Tensor, heads: int) -> Tensor:
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return (x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5).log_softmax(-1)
