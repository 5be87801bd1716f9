"""Linear layers with an N:M mask: :class:`SparseBitLinear` (ternary) and :class:`SparseLinear` (the BF16 baseline).

State lives here, time does not. A layer knows its latent weight, its mask and how many weights a group keeps at the
moment; *when* any of that changes is the callbacks' business.

The weight is a plain ``nn.Parameter`` and the mask a packed ``uint8`` buffer, so checkpoints, optimisers, DDP and
``torch.compile`` need to know nothing. Derived values (mask, ternary codes) follow the weight lazily: each use compares
the weight's version counter, which in-place updates increment, and recomputes only after a change. That makes the
layer correct in a bare training loop, and under gradient accumulation the work is done once an optimiser step.
Some updates do not count a version: a fused optimiser's, and those of FSDP2, which fills the weight that a forward sees
from shards. So weights that train are also taken to have changed with every optimiser step of the process.
:attr:`MaskedLinear.hold_mask` takes the mask out of that rule, for whoever decides about refreshes (``MaskRefresh``).

Inside ``torch.compile`` a version counter cannot be read, so the derived values are traced into the graph and computed
at each forward, unless an owner promises to call :func:`prepare_layers` before (``TernaryTransformer`` does).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from sbn_lightning.backends import REFERENCE, Backend, Keep, WeightSpec
from sbn_lightning.errors import ConfigError
from sbn_lightning.pattern import NMPattern, unpack_mask
from sbn_lightning.ternary import (
    ACTIVATION_BITS,
    GammaOver,
    MaskedLinearFunction,
    expand_scale,
    ternary_codes,
    weight_scale,
)

_GOLDEN_RATIO = (5**0.5 - 1) / 2

Gradient = Literal["dense", "masked"]
MaskSource = Literal["latent", "ternary"]


_optimizer_steps = 0


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class MaskedLinear(nn.Linear):
    """``nn.Linear`` whose weight carries an N:M mask. Use one of its two subclasses.

    Attributes:
        pattern: The target pattern.
        gradient: ``"dense"``: every position gets the straight-through gradient; ``"masked"``: kept positions only.
        hold_mask: If True the mask changes only in :meth:`refresh_mask`; otherwise it follows the weight.
        regrow: If False masked positions get no gradient for now, even with ``gradient="dense"``.
        mask_bits: The packed mask, uint8 ``[out_features, ceil(in_features / 8)]``; part of the state dict.
        owner_prepares: Set by an owner that calls :func:`prepare_layers` before each compiled forward.
    """

    pattern: NMPattern
    mask_bits: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pattern: NMPattern | str = "6:8",
        gradient: Gradient = "dense",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._init_mask(pattern, gradient)

    def _init_mask(self, pattern: NMPattern | str, gradient: Gradient, name: str | None = None) -> None:
        name = name or f"{type(self).__name__}({self.in_features}, {self.out_features})"
        self.pattern = NMPattern.parse(pattern)
        self.pattern.check_divides(self.in_features, name)
        _check_choice("gradient", gradient, ("dense", "masked"), name)
        self.gradient = gradient
        self.hold_mask = False
        self.regrow = True
        self.owner_prepares = False
        self._keep_n, self._sparse_share = self.pattern.n, 1.0
        self._most_kept = self.pattern.m  # in any group of the present mask
        self._mask_of: tuple[Any, ...] | None = None
        packed = torch.empty(self.out_features, -(-self.in_features // 8), dtype=torch.uint8, device=self.weight.device)
        self.register_buffer("mask_bits", packed)
        self.refresh_mask()

    @property
    def mask(self) -> Tensor:
        """The mask, bool ``[out_features, in_features]``."""
        return unpack_mask(self.packed_mask(), self.in_features)

    def packed_mask(self) -> Tensor:
        """``mask_bits``, brought up to date."""
        self._sync_mask()
        return self.mask_bits

    @property
    def density(self) -> tuple[int, float]:
        """``(keep_n, sparse_share)`` as last given to :meth:`set_density`; ``(pattern.n, 1.0)`` in a new layer."""
        return self._keep_n, self._sparse_share

    def set_density(self, keep_n: int, sparse_share: float = 1.0, *, refresh: bool = True) -> None:
        """Changes how much the mask keeps; takes effect at the mask's next use, also while the mask is held.

        Args:
            keep_n: Weights kept in each group of a sparse row, from ``pattern.n`` to ``pattern.m``.
            sparse_share: Share of rows that are sparse, 0 to 1; the others keep everything. Rows become sparse in a
                fixed order that spreads evenly (multiples of the golden ratio), and none turns dense again while
                the share grows.
            refresh: If False the present mask is taken to have this density already, as in a run that resumes.
        """
        if not self.pattern.n <= keep_n <= self.pattern.m:
            raise ConfigError(
                f"keep_n={keep_n} is outside {self.pattern.n} to {self.pattern.m}, pattern {self.pattern}"
            )
        if not 0.0 <= sparse_share <= 1.0:
            raise ConfigError(f"sparse_share={sparse_share} is outside 0..1")
        self._keep_n, self._sparse_share = keep_n, float(sparse_share)
        if not refresh:
            self._mask_of = self._mask_key()
        elif self.hold_mask:  # a compiled graph reads a held mask as it is
            self._sync_mask()

    @torch.no_grad()
    def refresh_mask(self) -> None:
        """Recomputes the mask from the weight as it is now."""
        self.mask_bits.copy_(self._fresh_mask())
        self._note_fresh_mask()

    def values(self, masked: bool = True) -> Tensor:
        """What the layer multiplies with, up to a scale: ternary codes, or the weight where it is not quantised.

        Args:
            masked: If False, as if there were no mask: tells zeros of quantisation from zeros of the mask.

        Returns:
            ``[out_features, in_features]``.
        """
        raise NotImplementedError

    def effective_weight(self) -> Tensor:
        """The weight of the equivalent plain linear layer, ``[out_features, in_features]``, dtype of the weight."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Brings everything derived from the weight up to date; free if the weight has not changed."""
        self._sync_mask()

    def forward(self, input: Tensor, swiglu: bool = False) -> Tensor:
        """``input [..., in_features]``; or with ``swiglu`` ``[..., 2 in_features]``, for ``silu(gate) * up``."""
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            y = self._multiply(input, swiglu)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def _multiply(self, x: Tensor, swiglu: bool) -> Tensor:
        """``forward`` without the bias, in the dtype of ``x``."""
        raise NotImplementedError

    def latent(self) -> Tensor:
        """The latent weight, whole: gathered from its shards where FSDP2 has sharded it (on every rank at once)."""
        weight = self.weight.detach()
        return weight.full_tensor() if isinstance(weight, DTensor) else weight

    @property
    def backend(self) -> Backend:
        """What the layer computes with; assign another to change it."""
        return REFERENCE

    def _mask_scores(self) -> Tensor:
        return self.latent()

    def _keep(self) -> Keep:
        """What a fresh mask keeps in each group."""
        if not 0 < self._sparse_share < 1:
            return self._keep_n if self._sparse_share > 0 else self.pattern.m
        rows = torch.arange(1, self.out_features + 1, dtype=torch.float64, device=self.weight.device)
        sparse = (rows * _GOLDEN_RATIO).frac() < self._sparse_share
        return torch.where(sparse, self._keep_n, self.pattern.m)

    def _fresh_mask(self) -> Tensor:
        return self.backend.fresh_mask(self._mask_scores(), self.pattern, self._keep())

    def _note_fresh_mask(self) -> None:
        self._mask_of = self._mask_key()
        self._most_kept = self._keep_n if self._sparse_share == 1 else self.pattern.m

    def _weight_key(self) -> tuple[Any, ...]:
        # The parameter itself: a subclass may show another view of it as its weight.
        weight = self._parameters["weight"]
        assert weight is not None
        return id(weight), weight._version, _optimizer_steps if weight.requires_grad else 0

    def _mask_key(self) -> tuple[Any, ...]:
        return (*self._weight_key(), self._keep_n, self._sparse_share)

    def _mask_is_stale(self) -> bool:
        key = self._mask_key()
        if key == self._mask_of:
            return False
        density_changed = self._mask_of is None or key[-2:] != self._mask_of[-2:]
        return density_changed or not self.hold_mask

    def _sync_mask(self) -> None:
        if self._mask_is_stale():
            self.refresh_mask()

    def _gradient_mask(self, mask_bits: Tensor) -> Tensor | None:
        return None if self.regrow and self.gradient == "dense" else unpack_mask(mask_bits, self.in_features)

    def _graph_mask(self) -> Tensor:
        """The packed mask inside a compiled graph."""
        return self.mask_bits if self.hold_mask or self.owner_prepares else self._fresh_mask()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._sync_mask()
        super()._save_to_state_dict(destination, prefix, keep_vars)

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
        """Takes the saved mask as it is. A dense checkpoint has none: its weights get a fresh mask."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        mask_name = prefix + "mask_bits"
        if mask_name in state_dict:
            self._mask_of = self._mask_key()
            kept = unpack_mask(self.mask_bits, self.in_features).unflatten(-1, (-1, self.pattern.m)).sum(-1)
            self._most_kept = self.pattern.m if kept.is_meta else int(kept.max())
        elif prefix + "weight" in state_dict:
            if mask_name in missing_keys:
                missing_keys.remove(mask_name)
            self.refresh_mask()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern}"


class SparseBitLinear(MaskedLinear):
    """A linear layer with ternary, N:M-sparse weights and quantised activations (:mod:`sbn_lightning.ternary`).

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
            counted as zero). With ``mask_source="ternary"`` the codes that rank a group always use the dense gamma.
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
        _check_choice("activation_bits", activation_bits, ACTIVATION_BITS, label)
        _check_choice("mask_source", mask_source, ("latent", "ternary"), label)
        _check_choice("gamma_over", gamma_over, ("dense", "kept", "masked"), label)
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
        self._prepared_of = None

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
        return codes if masked else ternary_codes(self.latent(), self._prepared.row_scale)

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
            fused = self.mask_source == "latent" and not self.hold_mask
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
        if self.mask_source == "latent":
            return weight
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
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        mask_bits = self._graph_mask() if torch.compiler.is_compiling() else self.packed_mask()
        mask = unpack_mask(mask_bits, self.in_features)
        y: Tensor = MaskedLinearFunction.apply(x, self.weight, mask, self._gradient_mask(mask_bits))
        return y


def masked_layers(model: nn.Module) -> Iterator[tuple[str, MaskedLinear]]:
    """Names and layers of a model that carry a mask, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, MaskedLinear):
            # torch.compile's wrapper adds a component to every name below it.
            yield name.replace("_orig_mod.", ""), module


def prepare_layers(model: nn.Module) -> None:
    """Calls :meth:`MaskedLinear.prepare` on every layer of ``model``."""
    for _, layer in masked_layers(model):
        layer.prepare()


def _check_choice(option: str, value: object, choices: tuple[object, ...], layer: str) -> None:
    if value not in choices:
        raise ConfigError(f"{layer}: {option}={value!r} is not one of {', '.join(map(repr, choices))}")
