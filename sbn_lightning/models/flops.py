"""Model FLOPs: what training is worth in floating-point operations of the dense model, whatever it really runs on.

Counted as in the field (PaLM, arXiv 2204.02311, appendix B): 6 FLOPs a token for each weight that multiplies tokens (2
forward, 4 backward), embeddings left out, and causal attention's ``6 n_layers d_model T``. Recomputation does not
count, and neither sparsity nor int8 make the count smaller.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from sbn_lightning.models.transformer import TernaryTransformer

# Dense BF16 tensor FLOP/s with float32 sums, from the makers' data sheets (half of the figures "with sparsity"). First
# match wins. Not Lightning's table (2.6): it has sparse figures for H200 and H100 NVL, rates without tensor cores for
# GeForce cards, A6000 and A40, L4's for L40, and neither GH200 nor Blackwell.
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
    """Dense BF16 FLOP/s of a GPU by its name; None for others."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS if re.search(rf"\b{part}\b", name)), None)


def flops_per_token(model: nn.Module, sequence_length: int) -> float:
    """Model FLOPs of training on one token, forward and backward.

    Args:
        model: Exact for a :class:`TernaryTransformer` (or a module that holds one); for others 6 for each parameter of
            a linear layer, attention left out.
        sequence_length: T, tokens a sequence.
    """
    linear = sum(
        6.0 * layer.in_features * layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)
    )
    inner = next((module for module in model.modules() if isinstance(module, TernaryTransformer)), None)
    if inner is None:
        return linear
    return linear + 6.0 * inner.config.n_layers * inner.config.d_model * sequence_length
