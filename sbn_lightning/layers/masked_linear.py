"""What layers with an N:M mask share: :class:`MaskedLinear`.

State lives here, time does not. A layer knows its latent weight, its mask and how many weights a group keeps at the
moment; *when* any of that changes is the callbacks' business.

The weight is a plain ``nn.Parameter`` and the mask a packed ``uint8`` buffer, so checkpoints, optimisers, DDP and
``torch.compile`` need to know nothing. Derived values (mask, ternary codes) follow the weight lazily: each use compares
the weight's version counter, which in-place updates increment (not those through ``weight.data``: call
``refresh_mask``), and recomputes only after a change. That makes the layer correct in a bare training loop, and under
gradient accumulation the work is done once an optimiser step.
Some updates do not count a version: a fused optimiser's, and those of FSDP2, which fills the weight that a forward sees
from shards. So weights that train are also taken to have changed with every optimiser step of the process.
:attr:`MaskedLinear.hold_mask` takes the mask out of that rule, for whoever decides about refreshes (``MaskRefresh``).
A mask that was loaded stays as well, until an optimiser steps that holds its weight: it may be an older one, or of the
middle of a ramp, and must not change in a model that is only used.

Inside ``torch.compile`` a version counter cannot be read, so the derived values are traced into the graph and computed
at each forward, unless an owner promises to call :func:`prepare_layers` before (``TernaryTransformer`` does).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from sbn_lightning.backends.reference import REFERENCE, Backend, Keep
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.sparsity.config import Gradient, Kind, MaskSource, SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern, unpack_mask
from sbn_lightning.sparsity.ternary import GammaOver

_GOLDEN_RATIO = (5**0.5 - 1) / 2
_SHARDS = (0, 0)  # no weight has this number

_optimizer_steps = 0
_layers_that_keep: WeakSet[MaskedLinear] = WeakSet()  # their masks, until their weights change
_numbers = WeakIdKeyDictionary()  # of weights; an id is given away again
_next_number = count(1)


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1
    if not _layers_that_keep:
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    stepped, sharded = set(map(id, weights)), any(isinstance(weight, DTensor) for weight in weights)
    for layer in list(_layers_that_keep):
        if sharded if layer._kept_for == _SHARDS else layer._may_have_changed(stepped):
            layer._keep_mask_no_longer()


register_optimizer_step_post_hook(_count_step)


def _number(weight: Tensor) -> int:
    number: int = _numbers.get(weight, 0) or _numbers.setdefault(weight, next(_next_number))
    return number


def _option(name: str) -> Any:
    """An attribute of a layer that stands for a field of its config."""

    def read(layer: MaskedLinear) -> Any:
        return getattr(layer._sparsity, name)

    def write(layer: MaskedLinear, value: Any) -> None:
        layer.sparsity = replace(layer._sparsity, **{name: value})

    return property(read, write, doc=f"The field ``{name}`` of :attr:`MaskedLinear.sparsity`.")


class MaskedLinear(nn.Linear):
    """``nn.Linear`` whose weight carries an N:M mask. Use one of its two subclasses.

    Args:
        in_features: The features of a token; a multiple of the pattern's M.
        out_features: The features of a result.
        bias: Whether the layer adds a bias.
        sparsity: The options of the layer: a :class:`SparsityConfig`, or only a pattern.
        device: The device of the parameters.
        dtype: The dtype of the parameters.
        **options: Single fields of :class:`SparsityConfig`.

    Attributes:
        hold_mask: If True the mask changes only in :meth:`refresh_mask`; otherwise it follows the weight.
        regrow: If False masked positions get no gradient for now, even with ``gradient="dense"``.
        mask_bits: The packed mask, uint8 ``[out_features, ceil(in_features / 8)]``; part of the state dict.
        owner_prepares: Set by an owner that calls :func:`prepare_layers` before each compiled forward.
    """

    kind: ClassVar[Kind]
    pattern: NMPattern = _option("pattern")
    split_sizes: tuple[int, ...] | None = _option("split_sizes")
    activation_bits: int | None = _option("activation_bits")
    mask_source: MaskSource = _option("mask_source")
    gradient: Gradient = _option("gradient")
    gamma_over: GammaOver = _option("gamma_over")
    mask_bits: Tensor
    _sparsity: SparsityConfig

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: SparsityConfig | NMPattern | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        label = f"{type(self).__name__}({in_features}, {out_features})"
        try:
            config = self.own(SparsityConfig.make(sparsity, **options))
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}") from error
        config.check_fits(in_features, out_features, label)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._init_mask(config)

    @classmethod
    def own(cls, sparsity: SparsityConfig) -> SparsityConfig:
        """The options with the kind of this class.

        Raises:
            ConfigError: If the options are explicitly those of the other kind.
        """
        if sparsity.kind == "masked" and cls.kind == "ternary":
            raise ConfigError('kind="masked" is SparseLinear')
        return replace(sparsity, kind=cls.kind)

    def _init_mask(self, sparsity: SparsityConfig) -> None:
        """Makes a plain linear layer one with a mask; the options have been checked."""
        self._sparsity = sparsity
        self.hold_mask = False
        self.regrow = True
        self.owner_prepares = False
        self._keep_n, self._sparse_share = self.pattern.n, 1.0
        self._most_kept = self.pattern.m  # in any group of the present mask
        self._mask_of: tuple[Any, ...] | None = None
        self._kept_for: tuple[int, int] | None = None  # the weight whose mask stays, and its version
        packed = torch.empty(self.out_features, -(-self.in_features // 8), dtype=torch.uint8, device=self.weight.device)
        self.register_buffer("mask_bits", packed)
        self.refresh_mask()

    @property
    def sparsity(self) -> SparsityConfig:
        """The options of the layer. Another config takes effect at once, or is refused."""
        return self._sparsity

    @sparsity.setter
    def sparsity(self, sparsity: SparsityConfig | NMPattern | str) -> None:
        label = f"{type(self).__name__}({self.in_features}, {self.out_features})"
        config = self.own(SparsityConfig.make(sparsity))
        config.check_fits(self.in_features, self.out_features, label)
        self._check_change(config, label)
        other_pattern = config.pattern != self.pattern
        self._sparsity = config
        self._mask_of = None  # the mask was made with the old options
        if other_pattern:
            self._keep_n, self._sparse_share = self.pattern.n, 1.0
        self.refresh_mask()

    def _check_change(self, sparsity: SparsityConfig, label: str) -> None:
        """Raises a :class:`ConfigError` if the layer cannot take other options as it is now."""

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

    def keep_mask(self) -> None:
        """Takes the present mask for that of the present weight: it stays until an optimiser changes the weight."""
        weight = self._parameters["weight"]
        self._mask_of = self._mask_key()
        # FSDP2 shows a forward another parameter than the one that was loaded and that the optimiser has.
        self._kept_for = _SHARDS if isinstance(weight, DTensor) else self._mask_of[:2]  # type: ignore[assignment]
        _layers_that_keep.add(self)

    def _keep_mask_no_longer(self) -> None:
        self._kept_for = None
        _layers_that_keep.discard(self)

    def _may_have_changed(self, stepped: set[int]) -> bool:
        """Whether the weight is among those with the ids ``stepped``, or is not the one whose mask is kept."""
        weight = self._parameters.get("weight")
        return weight is None or id(weight) in stepped or self._kept_for is None or self._kept_for[0] != _number(weight)

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
        device = self.weight.device
        where = "cpu" if device.type == "mps" else device  # which has no float64
        rows = torch.arange(1, self.out_features + 1, dtype=torch.float64, device=where)
        sparse = ((rows * _GOLDEN_RATIO).frac() < self._sparse_share).to(device)
        return torch.where(sparse, self._keep_n, self.pattern.m)

    def _fresh_mask(self) -> Tensor:
        return self.backend.fresh_mask(self._mask_scores(), self.pattern, self._keep())

    def _note_fresh_mask(self) -> None:
        self._mask_of = self._mask_key()
        self._keep_mask_no_longer()
        self._most_kept = self._keep_n if self._sparse_share == 1 else self.pattern.m

    def _weight_key(self) -> tuple[Any, ...]:
        # The parameter itself: a subclass may show another view of it as its weight.
        weight = self._parameters.get("weight")
        if weight is None:
            raise ConfigError(
                f"{type(self).__name__}({self.in_features}, {self.out_features}): its weight is no parameter any more "
                "(parametrize, weight_norm, pruning), and masks are made of latent weights; leave that out, or exclude "
                "the layer from conversion"
            )
        steps = _optimizer_steps if weight.requires_grad else 0
        return _number(weight), weight._version, weight.dtype, steps

    def _mask_key(self) -> tuple[Any, ...]:
        return (*self._weight_key(), self._keep_n, self._sparse_share)

    def _mask_is_stale(self) -> bool:
        key = self._mask_key()
        if key == self._mask_of:
            return False
        density_changed = self._mask_of is None or key[-2:] != self._mask_of[-2:]
        return density_changed or not (self.hold_mask or self._kept_for in (_SHARDS, key[:2]))

    def _sync_mask(self) -> None:
        if self._mask_is_stale():
            self.refresh_mask()

    def _gradient_mask(self, mask_bits: Tensor) -> Tensor | None:
        return None if self.regrow and self.gradient == "dense" else unpack_mask(mask_bits, self.in_features)

    def _graph_mask(self) -> Tensor:
        """The packed mask inside a compiled graph."""
        return self.mask_bits if self._mask_stays() or self.owner_prepares else self._fresh_mask()

    def _mask_stays(self) -> bool:
        """Whether the mask stays what it is for now, as far as a compiled graph can see."""
        return self.hold_mask or self._kept_for is not None

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
            self.keep_mask()
            kept = unpack_mask(self.mask_bits, self.in_features).unflatten(-1, (-1, self.pattern.m)).sum(-1)
            self._most_kept = self.pattern.m if kept.is_meta else int(kept.max())
        elif prefix + "weight" in state_dict:
            if mask_name in missing_keys:
                missing_keys.remove(mask_name)
            self.refresh_mask()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: with the mask as it is to be, which a copy then holds for its own weight."""
        self._sync_mask()
        return vars(self).copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.keep_mask()  # before, it was that of the weight that was copied

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern}"


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
