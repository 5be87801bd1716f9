"""Model FLOPs: the floating-point operations that training would take with a dense model, however a run computes.

The count follows PaLM (arXiv 2204.02311, appendix B). Each weight that multiplies tokens costs 6 FLOPs for each token:
2 in the forward and 4 in the backward. Of a mixture of experts only the experts of a token count, because the others
multiply other tokens. Embeddings do not count. Causal attention adds ``6 n_heads head_size T`` in each
block for each token, where T is the sequence length. With a sliding window of W < T tokens, ``2 W - W^2 / T`` takes the
place of T. Recomputation adds nothing, and sparsity and int8 take nothing away.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from sbn_lightning.layers.experts_linear import active_share
from sbn_lightning.models.transformer import TernaryTransformer

# Peak FLOP/s of tensor cores for dense BF16 with float32 sums. The values are from the makers' data sheets (half of the
# figures "with sparsity"). The first name that matches wins. Lightning 2.6 has such a table too, but some of its values
# do not fit here: figures with sparsity for H200 and H100 NVL, rates without tensor cores for GeForce cards, A6000 and
# A40, and the value of L4 for L40. GH200 and Blackwell are missing there.
PEAK_FLOPS = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("RTX A6000", 154.8e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)


def peak_flops(device: torch.device) -> float | None:
    """The dense BF16 FLOP/s of a GPU, found by its name; None for unknown GPUs and for other devices."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS if re.search(rf"\b{part}\b", name)), None)


def flops_per_token(model: nn.Module, sequence_length: int) -> float:
    """The model FLOPs of training on one token, forward and backward.

    Args:
        model: The model. The count is complete for a :class:`TernaryTransformer` and for a module that holds one. For
            other models only the weights of linear layers count, and attention is left out.
        sequence_length: T, the number of tokens in a sequence.
    """
    linear = sum(
        6.0 * layer.in_features * layer.out_features * active_share(layer)
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    )
    inner = next((module for module in model.modules() if isinstance(module, TernaryTransformer)), None)
    if inner is None:
        return linear
    config = inner.config
    seen = sum(_attended(config.window(block), sequence_length) for block in range(config.n_layers))
    return linear + 6.0 * config.attention_width * seen


def _attended(window: int | None, sequence_length: int) -> float:
    """Twice the number of tokens that a token attends to on average: T if there is no window."""
    if window is None or window >= sequence_length:
        return sequence_length
    return 2 * window - window**2 / sequence_length
