"""RMSNorm as the models here use it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` that casts its weight to the dtype of the input. PyTorch's fused norm needs one dtype for both.

    Sums are float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
