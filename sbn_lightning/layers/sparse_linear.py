"""The two linear layers with an N:M mask: :class:`SparseBitLinear` (ternary) and :class:`SparseLinear` (the BF16
baseline). Weight, mask and how they stay true to each other are :class:`MaskedLinear`'s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sbn_lightning.backends.reference import REFERENCE, Backend, WeightSpec
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.masked_linear import Gradient, MaskedLinear, check_choice, masked_layers, prepare_layers
from sbn_lightning.sparsity.pattern import NMPattern, unpack_mask
from sbn_lightning.sparsity.ternary import (
    ACTIVATION_BITS,
    GammaOver,
    MaskedLinearFunction,
    apply_swiglu,
    expand_scale,
    ternary_codes,
    weight_scale,
)

__all__ = [
    "Gradient",
    "MaskSource",
    "MaskedLinear",
    "SparseBitLinear",
    "SparseLinear",
    "masked_layers",
    "prepare_layers",
    "ternary_layers",
]

MaskSource = Literal["latent", "ternary"]


class SparseBitLinear(MaskedLinear):
    """A linear layer with ternary, N:M-sparse weights and quantised activations (:mod:`sbn_lightning.sparsity.ternary`).

    Args:
        in_features: Features in; a multiple of the pattern's M.
        out_features: Features out.
        bias: Whether to add a bias (kept in high precision).
        pattern: "N:M", any 1 <= N <= M <= 32.
        split_sizes: Rows of each part of a fused weight, for example (q, k, v); each part has its own gamma.
        activation_bits: 8, 4, or None to leave activations as they are.
        mask_source: Rank a group by ``"latent"`` weights, or by ``"ternary"`` codes (an ablation, clearly worse).
        gradient: Straight-through gradient for all positions (``"dense"``) or kept ones only (``"masked"``).
        gamma_over: Weights that gamma averages: ``"dense"`` (all), ``"kept"``, or ``"masked"`` (all, with masked ones
            counted as zero), or ``"nonzero"`` (codes by the dense gamma, scaled by gamma over what they keep non-zero).
            With ``mask_source="ternary"`` the codes that rank a group always use the dense gamma.
        device: Device of the parameters.
        dtype: dtype of the parameters; float32 keeps small updates that bfloat16 would round away.

    Shape:
        x ``[..., in_features]`` -> y ``[..., out_features]`` in the dtype of x, or autocast's where autocast is on.

    Raises:
        ConfigError: On options that cannot work; the message names the layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pattern: NMPattern | str = "6:8",
        split_sizes: tuple[int, ...] | None = None,
        activation_bits: int | None = 8,
        mask_source: MaskSource = "latent",
        gradient: Gradient = "dense",
        gamma_over: GammaOver = "dense",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self._init_ternary(pattern, split_sizes, activation_bits, mask_source, gradient, gamma_over)

    def _init_ternary(
        self,
        pattern: NMPattern | str,
        split_sizes: tuple[int, ...] | None,
        activation_bits: int | None,
        mask_source: MaskSource,
        gradient: Gradient,
        gamma_over: GammaOver,
        name: str | None = None,
    ) -> None:
        label = name or f"{type(self).__name__}({self.in_features}, {self.out_features})"
        if split_sizes is not None and (sum(split_sizes) != self.out_features or min(split_sizes) < 1):
            raise ConfigError(f"{label}: split_sizes={split_sizes} do not add up to out_features={self.out_features}")
        check_choice("activation_bits", activation_bits, ACTIVATION_BITS, label)
        check_choice("mask_source", mask_source, ("latent", "ternary"), label)
        check_choice("gamma_over", gamma_over, get_args(GammaOver), label)
        self.split_sizes = tuple(split_sizes) if split_sizes is not None else None
        self.activation_bits = activation_bits
        self.mask_source = mask_source
        self.gamma_over: GammaOver = gamma_over
        self._backend: Backend = REFERENCE
        self._prepared: Any = None
        self._prepared_of: tuple[Any, ...] | None = None
        self._init_mask(pattern, gradient, name)
        self._spec = WeightSpec(self.pattern, self.split_sizes, gamma_over)

    @property
    def backend(self) -> Backend:
        return self._backend

    @backend.setter
    def backend(self, backend: Backend) -> None:
        self._backend = backend
        self._forget_prepared()

    def _forget_prepared(self) -> None:
        self._prepared = self._prepared_of = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_prepared": None, "_prepared_of": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseBitLinear:
        super()._apply(fn, recurse)
        if self._prepared is not None and self._prepared.codes.device != self.weight.device:
            self._forget_prepared()  # memory of the device that the layer has left
        return self

    def ternary(self) -> tuple[Tensor, Tensor]:
        """Returns int8 codes ``[out_features, in_features]`` in {-1, 0, 1} and gamma, one a split, float32."""
        self.prepare()
        starts = [0]
        for rows in (self.split_sizes or (self.out_features,))[:-1]:
            starts.append(starts[-1] + rows)
        return self._prepared.codes, self._prepared.row_scale[starts]

    def effective_weight(self) -> Tensor:
        self.prepare()
        return (self._prepared.codes * self._prepared.row_scale.unsqueeze(-1)).to(self.weight.dtype)

    def values(self, masked: bool = True) -> Tensor:
        self.prepare()
        codes: Tensor = self._prepared.codes
        if masked:
            return codes
        return self._codes() if self.gamma_over == "nonzero" else ternary_codes(self.latent(), self._prepared.row_scale)

    def prepare(self) -> None:
        stale = self._mask_is_stale()
        if stale and self.mask_source != "latent":
            self.refresh_mask()
            stale = False
        if not stale and self._prepared_key() == self._prepared_of:
            return
        # A validation loop runs in inference mode; tensors made there could not be used in the next training step.
        with torch.inference_mode(False), torch.no_grad():
            keep = self._keep() if stale else self._most_kept
            self._prepared = self._backend.prepare(self.latent(), None if stale else self.mask_bits, keep, self._spec)
            if stale:
                self.mask_bits.copy_(self._prepared.mask_bits)
                self._note_fresh_mask()
        self._prepared_of = self._prepared_key()

    def _prepared_key(self) -> tuple[Any, ...]:
        """What the codes depend on: the weight, where it is, and the mask (its buffer's version counts refreshes)."""
        return (*self._weight_key(), self.weight.device, id(self.mask_bits), self.mask_bits._version)

    def _multiply(self, x: Tensor, swiglu: bool) -> Tensor:
        if torch.compiler.is_compiling() and not self.owner_prepares:
            fused = self.mask_source == "latent" and not self._mask_stays()
            keep = self._keep() if fused else self._most_kept
            prepared = self._backend.prepare(self.latent(), None if fused else self._graph_mask(), keep, self._spec)
            mask_bits = prepared.mask_bits
        else:
            if not torch.compiler.is_compiling():
                self.prepare()
            prepared, mask_bits = self._prepared, self.mask_bits
        gradient_mask = self._gradient_mask(mask_bits)
        return self._backend.linear(x, self.weight, prepared, gradient_mask, self.activation_bits, swiglu)

    def _mask_scores(self) -> Tensor:
        weight = self.latent()
        return weight if self.mask_source == "latent" else self._codes()

    def _codes(self) -> Tensor:
        """Codes of all weights, masked or not, by the dense gamma; a kernel's own may differ in its last bit."""
        weight = self.latent()
        gamma = weight_scale(weight, self.split_sizes)
        return ternary_codes(weight, expand_scale(gamma, self.split_sizes, self.out_features))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation_bits={self.activation_bits}, backend={self._backend.name}"


class SparseLinear(MaskedLinear):
    """The unquantised baseline: ``y = x (W * mask)^T + bias`` with a dense straight-through gradient.

    Args:
        in_features: Features in; a multiple of the pattern's M.
        out_features: Features out.
        bias: Whether to add a bias.
        pattern: "N:M", any 1 <= N <= M <= 32.
        gradient: Gradient for all positions (``"dense"``) or kept ones only (``"masked"``).
        device: Device of the parameters.
        dtype: dtype of the parameters.
    """

    def values(self, masked: bool = True) -> Tensor:
        weight = self.latent()
        return weight * self.mask if masked else weight

    def effective_weight(self) -> Tensor:
        return self.values()

    def _multiply(self, x: Tensor, swiglu: bool) -> Tensor:
        if swiglu:
            x = apply_swiglu(x)
        mask_bits = self._graph_mask() if torch.compiler.is_compiling() else self.packed_mask()
        mask = unpack_mask(mask_bits, self.in_features)
        y: Tensor = MaskedLinearFunction.apply(x, self.weight, mask, self._gradient_mask(mask_bits))
        return y


def ternary_layers(model: nn.Module) -> dict[str, SparseBitLinear]:
    """The ternary layers of a model by name, in the model's order."""
    return {name: layer for name, layer in masked_layers(model) if isinstance(layer, SparseBitLinear)}
