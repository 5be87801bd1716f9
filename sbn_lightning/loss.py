"""Cross-entropy of a linear head without holding all logits at once.

With a vocabulary of 150k the logits of 16k tokens take 5 GB in bfloat16, and their gradient as much again. Libraries
fuse the head with the loss and work through the tokens in chunks; which one is used:

* ``"liger"``: Liger-Kernel (Triton, CUDA only), the extra ``[liger]``;
* ``"torch"``: ``torch.nn.functional.linear_cross_entropy``, in newer versions of PyTorch, every device;
* ``"plain"``: logits, then ``cross_entropy``: the fastest for a small vocabulary;
* ``"auto"``: ``plain`` below :data:`FUSED_VOCABULARY` classes, else the first of the above that is there.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbn_lightning.errors import ConfigError

LossImplementation = Literal["auto", "liger", "torch", "plain"]

FUSED_VOCABULARY = 16384


def choose_loss(implementation: LossImplementation, vocab_size: int, device: torch.device) -> LossImplementation:
    """Resolves ``"auto"`` and checks that what was asked for is there.

    Raises:
        ConfigError: If the asked-for implementation cannot run here, with what would make it run.
    """
    has_liger = device.type == "cuda" and find_spec("liger_kernel") is not None
    has_torch = hasattr(nn, "LinearCrossEntropyOptions")
    if implementation == "auto":
        if vocab_size < FUSED_VOCABULARY:
            return "plain"
        return "liger" if has_liger else "torch" if has_torch else "plain"
    if implementation == "liger" and not has_liger:
        raise ConfigError('loss "liger" needs a CUDA device and pip install "sbn-lightning[liger]"')
    if implementation == "torch" and not has_torch:
        raise ConfigError(
            f'loss "torch" needs torch.nn.functional.linear_cross_entropy, which torch {torch.__version__} lacks; '
            'use "liger" or "plain"'
        )
    if implementation not in ("liger", "torch", "plain"):
        raise ConfigError(f"loss={implementation!r} is not one of 'auto', 'liger', 'torch', 'plain'")
    return implementation


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, implementation: LossImplementation = "auto"
) -> Tensor:
    """Mean cross-entropy of ``hidden @ weight^T`` against ``target``, in nats.

    Args:
        hidden: ``[tokens, d_model]``.
        weight: Head weight ``[vocab_size, d_model]``.
        target: int64 ``[tokens]``.
        implementation: See the module.

    Returns:
        A float32 scalar.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        chosen = choose_loss(implementation, weight.shape[0], hidden.device)
        if chosen == "liger":
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            loss: Tensor = liger_fused_linear_cross_entropy(hidden, weight, target)
        elif chosen == "torch":
            loss = F.linear_cross_entropy(hidden, weight, target, options=nn.LinearCrossEntropyOptions())
        else:
            logits = hidden @ weight.t()
            loss = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)
    return loss.float()
