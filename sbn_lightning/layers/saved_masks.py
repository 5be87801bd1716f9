"""Whether a mask that was saved fits the layer that is to load it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from sbn_lightning.sparsity.pattern import NMPattern, unpack_mask


def kept_in_groups(mask_bits: Tensor, pattern: NMPattern, in_features: int) -> Tensor:
    """Count the weights that a packed mask keeps in each group, ``[out_features, in_features / M]``."""
    return unpack_mask(mask_bits, in_features).unflatten(-1, (-1, pattern.m)).sum(-1)


def why_unfit(
    saved: Any, saved_pattern: str | None, mask_bits: Tensor, pattern: NMPattern, in_features: int
) -> str | None:
    """Say why a saved mask does not have a layer's pattern.

    Args:
        saved: The packed mask in the state dict, or whatever stands in its place.
        saved_pattern: The pattern in the metadata of the state dict; None if the metadata is lost.
        mask_bits: The present mask of the layer, for its shape.
        pattern: The pattern of the layer.
        in_features: The columns of the weight.

    Returns:
        The reason, or None if the mask fits or if nobody can know.
    """
    if not isinstance(saved, Tensor) or saved.shape != mask_bits.shape or saved.is_meta:
        return None  # torch itself reports a shape that does not fit.
    if saved_pattern is not None and saved_pattern != str(pattern):
        return f"the saved mask is of the pattern {saved_pattern}, and the layer has {pattern}"
    if isinstance(saved, DTensor) or pattern.is_dense:
        return None
    # Even in the middle of a ramp, all groups of a row keep the same number of weights.
    kept = kept_in_groups(saved, pattern, in_features)
    fewest, most = kept.amin(-1), kept.amax(-1)
    if bool((fewest == most).all()) and int(fewest.min()) >= pattern.n:
        return None
    return (
        f"the saved mask keeps {int(kept.min())} to {int(kept.max())} of {pattern.m} weights, which no mask "
        f"of the layer's pattern {pattern} does"
    )
