"""The figures of the paper (arXiv 2603.05168), second hand. :data:`ORIGIN` says where they come from."""

from __future__ import annotations

ORIGIN = (
    "The paper's figures (Sparse-BitNet, arXiv 2603.05168) are second hand, from public digests that agree with each "
    "other: shapes of Qwen2.5, 0.5B where no size is given, about 50 billion tokens of RefinedWeb, sequences of 2,048. "
    "The paper's own noise is not known."
)
INCONSISTENT = (
    "The paper's masked gradient and gamma over masked weights are reported inconsistently: take them as about."
)
ABSOLUTE_ARE_APART = (
    "Absolute values cannot be compared across: they are of other text, tokenizers, sizes and lengths of training."
)
FLIP_RATES = (
    "The paper gives flip rates in words alone: high early, then settling; with masked gradients masks freeze too "
    "early, with masks from ternary weights they keep oscillating."
)
# Perplexity at 0.5B, as a multiple of the perplexity of the dense model of the same family.
RELATIVE = {
    "bf16-sparse": {"8:8": 1.0, "7:8": 1.02, "6:8": 1.05, "5:8": 1.07, "2:4": 1.188, "3:8": 1.31, "2:8": 1.45},
    "ternary": {"8:8": 1.0, "7:8": 1.01, "6:8": 1.01, "5:8": 1.03, "2:4": 1.057, "3:8": 1.15, "2:8": 1.27},
}
# Perplexities of the dense and the 6:8 model, by size.
ABSOLUTE = {
    "bf16-sparse": {"0.5B": (21.91, 23.11), "1.5B": (18.10, 18.70), "3B": (16.03, 16.48)},
    "ternary": {"0.5B": (25.99, 26.31), "1.5B": (20.11, 20.35), "3B": (17.70, 17.87)},
}
DENSE_BITNET, SPARSE_BITNET = ABSOLUTE["ternary"]["0.5B"]
# Perplexities of ternary 6:8 at 0.5B, to compare with SPARSE_BITNET.
ABLATIONS = {
    ("mask_source", "ternary"): 32.23,
    ("gradient", "masked"): 27.1,
    ("gamma_over", "masked"): 26.9,
}
SHARES = {"share_75": 26.71, "share_50": 27.39, "share_25": 27.48, "never sparse": DENSE_BITNET}
# The share of weights that a long dense ternary training rounds to zero, and the share that the mask adds.
NATURAL_ZEROS = 0.42
ENFORCED_ZEROS = {"6:8": 0.013, "2:4": 0.14}
