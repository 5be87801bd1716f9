"""``MaskedLinear``: what linear layers with an N:M mask share.

State lives here, time does not. A layer knows its latent weight, its mask and how many weights a group keeps at the
moment. The callbacks decide *when* any of these change.

The weight is a plain ``nn.Parameter`` and the mask a packed ``uint8`` buffer, so checkpoints, optimisers, DDP and
``torch.compile`` need to know nothing. The mask and everything else that is derived from the weight is computed again
after the weight has changed, and only then: :class:`~sbn_lightning.layers.mask_tracker.MaskTracker` tells. That makes
the layer correct in any training loop, and under gradient accumulation the work is done once an optimiser step.

Inside ``torch.compile`` nobody can ask whether a weight has changed. There the derived values are part of the graph and
computed at each forward, unless an owner promises to call :func:`prepare_layers` before each forward
(``TernaryTransformer`` does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sbn_lightning.backends.reference import REFERENCE, Backend, Keep
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.mask_tracker import MaskTracker, fingerprint, look_at_all, trust_weights
from sbn_lightning.sparsity.config import Gradient, Kind, MaskSource, SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern, unpack_mask
from sbn_lightning.sparsity.ternary import GammaOver

_GOLDEN_RATIO = (5**0.5 - 1) / 2


def config_option(name: str) -> Any:
    """An attribute of a layer that stands for a field of ``layer.sparsity``."""

    def read(layer: Any) -> Any:
        return getattr(layer.sparsity, name)

    def write(layer: Any, value: Any) -> None:
        layer.sparsity = replace(layer.sparsity, **{name: value})

    return property(read, write, doc=f"The field ``{name}`` of ``sparsity``.")


def check_tokens(x: Tensor, layer: str) -> None:
    """Refuses tokens that are no floating-point numbers, as ``nn.Linear`` does.

    Raises:
        ConfigError: Naming the layer and the dtype.
    """
    if not x.is_floating_point():
        raise ConfigError(
            f"{layer}: the tokens are {x.dtype}, not floating-point numbers: pass x.float(), or embed ids"
        )


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
        tracker: What knows whether the mask still belongs to the weight.
        regrow: If False masked positions get no gradient for now, even with ``gradient="dense"``.
        mask_bits: The packed mask, uint8 ``[out_features, ceil(in_features / 8)]``; part of the state dict.
        owner_prepares: Set by an owner that calls :func:`prepare_layers` before each compiled forward.
    """

    kind: ClassVar[Kind]
    pattern: NMPattern = config_option("pattern")
    split_sizes: tuple[int, ...] | None = config_option("split_sizes")
    activation_bits: int | None = config_option("activation_bits")
    mask_source: MaskSource = config_option("mask_source")
    gradient: Gradient = config_option("gradient")
    gamma_over: GammaOver = config_option("gamma_over")
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

    def _init_mask(self, sparsity: SparsityConfig, mask_bits: Tensor | None = None) -> None:
        """Makes a plain linear layer one with a mask.

        Args:
            sparsity: The options, which have been checked.
            mask_bits: The mask of the present weight, if it is known already.
        """
        self._sparsity = sparsity
        self.tracker = MaskTracker()
        self.regrow = True
        self.owner_prepares = False
        self._keep_n, self._sparse_share = self.pattern.n, 1.0
        self._most_kept = self.pattern.m  # in any group of the present mask
        if mask_bits is not None:
            self.register_buffer("mask_bits", mask_bits)
            self.tracker.look(self._weight(), self.training)
            self._set_mask(mask_bits)
            return
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
        if config.pattern != self.pattern:
            self._keep_n, self._sparse_share = config.nm.n, 1.0
        self._sparsity = config
        self.refresh_mask()

    def _check_change(self, sparsity: SparsityConfig, label: str) -> None:
        """Raises a :class:`ConfigError` if the layer cannot take other options as it is now."""

    @property
    def hold_mask(self) -> bool:
        """If True the mask changes only in :meth:`refresh_mask`; otherwise the mask follows the weight."""
        return self.tracker.hold

    @hold_mask.setter
    def hold_mask(self, hold: bool) -> None:
        self.tracker.hold = hold

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
            self.tracker.mask_has(self.density)
        elif self.hold_mask:  # a compiled graph reads a held mask as it is
            self._sync_mask()

    def refresh_mask(self) -> None:
        """Recomputes the mask from the weight as it is now."""
        # Everything is made anew, so nobody asks whether the weight has changed: on a GPU the host would wait for the
        # answer, here or in the next forward.
        self.tracker.weight_is_new(self._weight(), self.training)
        self._make_mask()

    def keep_mask(self) -> None:
        """Lets the present mask stay with the present weight until the weight changes, as after loading both."""
        self.tracker.mask_is_loaded(self._weight(), self.training, self.density)

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
        if not input.is_floating_point():
            check_tokens(input, f"{type(self).__name__}({self.in_features}, {self.out_features})")
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        with torch.autocast(device, enabled=False):
            y = self._multiply(input, swiglu, dtype)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def _multiply(self, x: Tensor, swiglu: bool, dtype: torch.dtype) -> Tensor:
        """``forward`` without the bias; the result has ``dtype``."""
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

    @torch.no_grad()
    def _make_mask(self) -> None:
        """Computes the mask from the weight as the tracker last saw it."""
        self._set_mask(self._fresh_mask())

    def _set_mask(self, bits: Tensor) -> None:
        """Takes over a mask that was computed from the weight as the tracker last saw it."""
        if self.mask_bits.is_inference() and not torch.is_inference_mode_enabled():
            self.mask_bits = bits  # a tensor of inference mode cannot be written outside of it
        elif bits is not self.mask_bits:
            self.mask_bits.copy_(bits)
        self.tracker.mask_is_fresh(self.density)
        self._most_kept = self._keep_n if self._sparse_share == 1 else self.pattern.m

    def _weight(self) -> Tensor:
        """The parameter itself: a subclass may show another view of it as its weight."""
        weight = self._parameters.get("weight")
        if weight is None:
            raise ConfigError(
                f"{type(self).__name__}({self.in_features}, {self.out_features}): its weight is no parameter any more "
                "(parametrize, weight_norm, pruning), and masks are made of latent weights; leave that out, or exclude "
                "the layer from conversion"
            )
        return weight

    def _mask_is_stale(self) -> bool:
        return self.tracker.is_stale(self._weight(), self.training, self.density)

    def _sync_mask(self) -> None:
        if self._mask_is_stale():
            self._make_mask()

    def _gradient_mask(self, mask_bits: Tensor) -> Tensor | None:
        return None if self.regrow and self.gradient == "dense" else unpack_mask(mask_bits, self.in_features)

    def _graph_mask(self) -> Tensor:
        """The packed mask inside a compiled graph, which cannot ask the tracker."""
        if self.hold_mask or self.owner_prepares:
            return self.mask_bits
        expected = self.tracker.fingerprint
        if not self.tracker.loaded or expected is None:
            return self.mask_bits if self.tracker.loaded else self._fresh_mask()
        same = (fingerprint(self._weight()) == expected).all()
        return torch.where(same, self.mask_bits, self._fresh_mask())

    def _mask_stays(self) -> bool:
        """Whether the mask stays what it is for now, as far as a compiled graph can see."""
        return self.tracker.hold or self.tracker.loaded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedLinear:
        weight = self._parameters.get("weight")
        if weight is not None and self.tracker.loaded:
            self._sync_mask()  # before the move, which would hide a change from the tracker
        super()._apply(fn, recurse)
        weight = self._parameters.get("weight")
        if weight is not None:
            self.tracker.weight_moved(weight, self.training)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._sync_mask()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):  # beside torch's own version number; the keys stay what they are
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
        """Takes the saved mask as it is. A dense checkpoint has none: its weights get a fresh mask.

        A mask of another pattern is refused, and the layer stays as it was.
        """
        mask_name = prefix + "mask_bits"
        if (reason := self._unfit(state_dict.get(mask_name), local_metadata)) is not None:
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
            kept = self._kept_in_groups(self.mask_bits)
            self._most_kept = self.pattern.m if kept.is_meta else int(kept.max())
        elif prefix + "weight" in state_dict:
            if mask_name in missing_keys:
                missing_keys.remove(mask_name)
            self.refresh_mask()

    def _kept_in_groups(self, mask_bits: Tensor) -> Tensor:
        """How many weights a packed mask keeps in each group, ``[out_features, in_features / M]``."""
        return unpack_mask(mask_bits, self.in_features).unflatten(-1, (-1, self.pattern.m)).sum(-1)

    def _unfit(self, mask_bits: Any, metadata: dict[str, Any]) -> str | None:
        """Why a saved mask is not one of this layer's pattern; None if it is, or if nothing tells."""
        if not isinstance(mask_bits, Tensor) or mask_bits.shape != self.mask_bits.shape or mask_bits.is_meta:
            return None  # torch reports other shapes by itself
        saved = metadata.get("sparsity", {}).get("pattern")
        if saved is not None and saved != str(self.pattern):
            return f"the saved mask is of the pattern {saved}, and the layer has {self.pattern}"
        if isinstance(mask_bits, DTensor) or self.pattern.is_dense:
            return None
        # Also in the middle of a ramp every group of a row keeps the same number of weights.
        kept = self._kept_in_groups(mask_bits)
        fewest, most = kept.amin(-1), kept.amax(-1)
        if bool((fewest == most).all()) and int(fewest.min()) >= self.pattern.n:
            return None
        return (
            f"the saved mask keeps {int(kept.min())} to {int(kept.max())} of {self.pattern.m} weights, which no mask "
            f"of the layer's pattern {self.pattern} does"
        )

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
    with weights_stay(model):
        for _, layer in masked_layers(model):
            layer.prepare()


@contextmanager
def weights_stay(model: nn.Module) -> Iterator[None]:
    """Looks once whether weights of ``model`` have changed; within the block its layers do not look again.

    On a GPU this saves waiting: outside of such a block each layer of a model that is evaluated compares a fingerprint
    of its weight by itself. Nobody may write into a weight within the block.

    Args:
        model: The model whose masked layers are looked at.
    """
    look_at_all(
        (layer.tracker, layer._weight(), layer.training)
        for _, layer in masked_layers(model)
        if not isinstance(layer._weight(), DTensor)
    )
    with trust_weights():
        yield
