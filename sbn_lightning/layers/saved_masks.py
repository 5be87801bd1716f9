"""How a layer saves its mask, loads one, and is copied; and whether a saved mask fits the layer that is to load it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sbn_lightning.sparsity.config import SparsityConfig
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


class SavedMask(nn.Linear):
    """The part of a masked layer that deals with state dicts, copies and pickles."""

    mask_bits: Tensor
    pattern: NMPattern
    _most_kept: int

    @property
    def sparsity(self) -> SparsityConfig:
        """The options of the layer."""
        raise NotImplementedError

    def keep_mask(self) -> None:
        """Let the present mask stay with the present weight until the weight changes."""
        raise NotImplementedError

    def refresh_mask(self) -> None:
        """Recompute the mask from the weight as it is now."""
        raise NotImplementedError

    def _sync_mask(self) -> None:
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._sync_mask()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            # The options go into the metadata, beside torch's version number, so the keys stay as they are.
            destination._metadata[prefix[:-1]]["sparsity"] = self.sparsity.to_dict()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the saved mask as it is, or compute a mask if the checkpoint is dense and has none.

        A mask of another pattern is refused, and the layer stays as it was.
        """
        mask_name = prefix + "mask_bits"
        saved, pattern = state_dict.get(mask_name), local_metadata.get("sparsity", {}).get("pattern")
        if (reason := why_unfit(saved, pattern, self.mask_bits, self.pattern, self.in_features)) is not None:
            error_msgs.append(
                f"{prefix[:-1] or type(self).__name__}: {reason}. Set layer.pattern to the saved pattern, or leave "
                "the masks out of the state dict (every name that ends in .mask_bits), and masks are made anew"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if mask_name in state_dict:
            self.keep_mask()
            kept = kept_in_groups(self.mask_bits, self.pattern, self.in_features)
            self._most_kept = self.pattern.m if kept.is_meta else int(kept.max())
        elif prefix + "weight" in state_dict:
            if mask_name in missing_keys:
                missing_keys.remove(mask_name)
            self.refresh_mask()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, after the mask was brought up to date."""
        self._sync_mask()
        return vars(self).copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.keep_mask()  # The tracker still referred to the weight that was copied. The mask belongs to this one now.
