"""An 8-bit head: the rows of the output matrix in int8, each with a scale of its own.

Beside ternary layers the head is the largest part of what a decode step reads. In 8 bits it is half as large as in
bfloat16, and the logits change a little. So the 8-bit head is opt-in, and ``sbn evaluate --head_bits 8`` measures what
it costs: the error of the logits and the change of the perplexity. The embedding stays as it is.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.formats.packed import int8_rows
from sbn_lightning.models.transformer import TernaryTransformer

HeadBits = Literal[8, 16]
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Int8Head(nn.Module):
    """``y = (x @ codes^T) * scale``: a linear layer without bias whose weight has 8 bits, for models that are run.

    Args:
        weight: The weight to round, ``[vocab_size, d_model]``.

    Attributes:
        codes: The rounded rows, int8 ``[vocab_size, d_model]``.
        scale: The scale of each row, float32 ``[vocab_size]``.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        codes, scale = int8_rows(weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states ``[..., d_model]`` -> logits ``[..., vocab_size]`` in the dtype of ``x``."""
        rows = x.reshape(-1, x.shape[-1])
        if self._takes_kernel(rows):
            from sbn_kernels.decode import int8_rows as product

            y = product(rows, self.codes, self.scale)
        else:
            # The dtype of the tokens holds the codes exactly, and the scale comes after the sums.
            y = (F.linear(rows, self.codes.to(x.dtype)) * self.scale).to(x.dtype)
        return y.view(*x.shape[:-1], -1)

    def _takes_kernel(self, rows: Tensor) -> bool:
        if not rows.is_cuda or rows.dtype not in _KERNEL_DTYPES or (torch.is_grad_enabled() and rows.requires_grad):
            return False
        from sbn_kernels.decode.head import MAX_TOKENS, NEEDS

        return rows.shape[0] <= MAX_TOKENS and NEEDS.missing(rows.device.index) is None


def use_head(model: TernaryTransformer, bits: HeadBits) -> None:
    """Give a model a head of 8 bits; with 16 the head stays as it is.

    Args:
        model: A model that is run and not trained any more.
        bits: Bits for each weight of the head.

    Raises:
        ConfigError: If ``bits`` is another number, or the model is not our own transformer.
    """
    if bits not in (8, 16):
        raise ConfigError(f"head_bits={bits} is not 8 or 16")
    if bits == 16:
        return
    if not isinstance(model, TernaryTransformer):
        raise ConfigError("head_bits=8 is for models of our own transformer, and this is a model of transformers")
    if isinstance(model.lm_head, nn.Linear):
        model.lm_head = Int8Head(model.lm_head.weight)  # type: ignore[assignment]
