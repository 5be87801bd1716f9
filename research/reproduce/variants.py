"""The variants of ternary training that tables and plots show, under the names they have there."""

from __future__ import annotations

from typing import Any

# The patterns at which variants are tried.
BASES = ("6:8", "2:4")
ABLATIONS = (
    ("mask_source", "ternary"),
    ("gradient", "masked"),
    ("gamma_over", "kept"),
    ("gamma_over", "nonzero"),
    ("gamma_over", "masked"),
)
RAMPS = ("share_75", "share_50", "share_25", "walk")
FLIPS: dict[str, dict[str, Any]] = {
    "as the method is": {},
    "with masked gradients": {"gradient": "masked"},
    "with masks from ternary weights": {"mask_source": "ternary"},
}
