"""What the paper reports (arXiv 2603.05168; second hand, from public digests that agree with each other).

Qwen2.5 shapes, about 50 billion tokens of RefinedWeb, sequences of 2,048 tokens.
"""

from __future__ import annotations

# Perplexity as a multiple of the dense model's of the same family, at 0.5B.
RELATIVE = {
    "bf16-sparse": {"8:8": 1.0, "7:8": 1.02, "6:8": 1.05, "5:8": 1.07, "2:4": 1.188, "3:8": 1.31, "2:8": 1.45},
    "ternary": {"8:8": 1.0, "7:8": 1.01, "6:8": 1.01, "5:8": 1.03, "2:4": 1.057, "3:8": 1.15, "2:8": 1.27},
}
# Perplexities of ternary 6:8 at 0.5B. Those of masked gradients and of gamma over masked weights are reported
# inconsistently.
SPARSE_BITNET = 26.31
DENSE_BITNET = 25.99
ABLATIONS = {
    ("mask_source", "ternary"): 32.23,
    ("gradient", "masked"): 27.1,
    ("gamma_over", "masked"): 26.9,
}
SHARES = {"share_75": 26.71, "share_50": 27.39, "share_25": 27.48}
# Share of weights that are zero in a long run of dense ternary training, and newly because of the mask.
NATURAL_ZEROS = 0.42
ENFORCED_ZEROS = {"6:8": 0.013, "2:4": 0.14}
