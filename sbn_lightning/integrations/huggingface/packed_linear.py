"""A packed ternary layer for transformers and PEFT: an ``nn.Linear`` that stores 2 bits a weight.

transformers builds a model without storage, sets tensors one by one, and only then hands the model back. So the layer
starts with empty 2-bit codes, and :meth:`TernaryLinear2Bit.finish` unpacks the codes that arrived. The state dict
always holds 2-bit codes, which makes loading and saving exact inverses.

PEFT adds LoRA to any ``nn.Linear``, so the layer is an ``nn.Linear``. It has no weight tensor of its own. Reading
``weight`` computes ``gamma * codes``. Writing to ``weight`` is an error, because ternary codes cannot take in a LoRA
update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.formats.huggingface.sbn import pack_codes, unpack_codes
from sbn_lightning.layers.experts import empty_packed
from sbn_lightning.layers.experts_linear import PackedExperts
from sbn_lightning.layers.packed import PackedTernaryLinear


class _TwoBit(PackedTernaryLinear):
    """The part of a packed layer that keeps 2-bit codes in its state dict."""

    _name: str

    def begin(self, name: str) -> None:
        """Make the codes a place for 2-bit codes, which are to be loaded.

        Args:
            name: The name of the layer, for messages.
        """
        shape = self.out_features, -(-self.in_features // 4)
        self.codes = torch.empty(shape, dtype=torch.uint8, device="meta")
        vars(self)["_name"] = name
        self._is_hf_initialized = True  # type: ignore[assignment]

    def finish(self) -> None:
        """Unpack the codes that were loaded.

        Raises:
            DataError: If no codes were loaded.
        """
        for tensor in (self.codes, self.gamma):
            if not getattr(tensor, "_is_hf_initialized", False):
                raise DataError(f"the folder lacks the codes or the gamma of {self._name}, which its config.json names")
        self._set_codes(self.codes, self.gamma)

    def _set_codes(self, packed: Tensor, gamma: Tensor) -> None:
        from sbn_lightning.sparsity.ternary import expand_scale

        self.codes = unpack_codes(packed, self.in_features)
        self.gamma = gamma.float()
        self.row_scale = expand_scale(self.gamma, self.split_sizes, self.out_features).clone()
        self._settle()  # The kernel is chosen now, because choosing it later would break a compiled graph.

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        if self.codes.dtype == torch.int8:
            destination[f"{prefix}codes"] = pack_codes(self.codes)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        packed = state_dict.get(f"{prefix}codes")
        if packed is None or packed.dtype == torch.int8:
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        gamma = state_dict[f"{prefix}gamma"]
        super()._load_from_state_dict(state_dict | {f"{prefix}codes": self.codes}, prefix, *args)
        self._set_codes(packed.to(self.gamma.device), gamma.to(self.gamma.device))


class TernaryLinear2Bit(_TwoBit, nn.Linear):  # type: ignore[misc]  # its bias is a buffer
    """:class:`PackedTernaryLinear` with 2-bit codes in its state dict. Made by :meth:`empty` only."""

    @classmethod
    def empty(cls, linear: nn.Module, name: str, options: dict[str, Any]) -> TernaryLinear2Bit:
        """Return a layer without storage in place of ``linear``, an ``nn.Linear`` or a ``Conv1D``."""
        if isinstance(linear, nn.Linear):
            out_features, in_features = linear.out_features, linear.in_features
        else:
            out_features, in_features = linear.nf, linear.nx  # type: ignore[assignment]
        split_sizes = options.get("split_sizes")
        bias = None if linear.bias is None else torch.empty_like(linear.bias, device="meta")  # type: ignore[arg-type]
        layer = PackedTernaryLinear(
            torch.empty(out_features, in_features, dtype=torch.int8, device="meta"),
            torch.empty(1 if split_sizes is None else len(split_sizes), dtype=torch.float32, device="meta"),
            None if bias is None else bias.detach(),
            pattern=options["pattern"],
            split_sizes=None if split_sizes is None else tuple(split_sizes),
            activation_bits=options["activation_bits"],
        )
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer.plain_class = nn.Linear if isinstance(linear, nn.Linear) else type(linear)
        layer.begin(name)
        return layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """``gamma * codes``, to read only."""
        return self.effective_weight().as_subclass(_ReadOnly)


class TernaryExperts2Bit(PackedExperts, _TwoBit):  # type: ignore[misc]
    """:class:`PackedExperts` with 2-bit codes in its state dict. Made by :meth:`empty` only.

    This is no ``nn.Linear``: PEFT would add one LoRA to the weights of all experts.
    """

    @classmethod
    def empty(cls, block: nn.Module, child: str, name: str, options: dict[str, Any]) -> TernaryExperts2Bit:
        """Return a layer without storage in place of the fused weight ``child`` of a block of experts."""
        layer = empty_packed(block, child, options["pattern"], options["activation_bits"])
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer.begin(name)
        return layer


class _ReadOnly(Tensor):
    """A weight that refuses to be replaced, where a write would otherwise be lost without a word."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__set__":
            raise ConfigError(
                "the weight of a packed ternary layer cannot be changed: codes in {-1, 0, 1} cannot take in a LoRA "
                "update. Keep the adapter beside the base, or train latent weights (form='latent')"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
