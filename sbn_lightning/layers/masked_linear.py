"""``MaskedLinear``: the base class of linear layers with an N:M mask.

State lives here, time does not. A layer knows its latent weight, its mask and how many weights a group keeps at the
moment. The callbacks decide *when* any of these change.

The weight is a plain ``nn.Parameter`` and the mask is a packed ``uint8`` buffer, so checkpoints, optimisers, DDP and
``torch.compile`` treat the layer like any other. The mask and all other values that are derived from the weight are
computed again after the weight has changed, and only then.
:class:`~sbn_lightning.layers.mask_tracker.MaskTracker` says when the weight has changed. So the layer is correct in any
training loop, and under gradient accumulation the work is done once in an optimiser step.

A graph of ``torch.compile`` cannot ask whether a weight has changed. There the derived values are part of the graph and
are computed in each forward. An owner of layers can avoid this if it calls :func:`prepare_layers` before each forward,
as ``TernaryTransformer`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sbn_lightning.backends.base import Backend, Keep
from sbn_lightning.backends.reference import REFERENCE
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.density import check_density, kept_in_rows
from sbn_lightning.layers.mask_tracker import (
    MaskTracker,
    fingerprint,
    look_at_all,
    trust_weights,
    weights_are_trusted,
)
from sbn_lightning.layers.options import check_tokens, config_option, result_dtype
from sbn_lightning.layers.preparation import prepare_all
from sbn_lightning.layers.saved_masks import SavedMask
from sbn_lightning.sparsity.config import Gradient, Kind, MaskSource, SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern, unpack_mask
from sbn_lightning.sparsity.ternary import GammaOver


class MaskedLinear(SavedMask):
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
        tracker: The object that knows whether the mask still belongs to the weight.
        regrow: If False, masked positions get no gradient for now, even with ``gradient="dense"``.
        mask_bits: The packed mask, uint8 ``[out_features, ceil(in_features / 8)]``; part of the state dict.
        owner_prepares: Whether an owner of the layer calls :func:`prepare_layers` before each compiled forward. The
            owner sets this attribute.
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
        """Return the options with the kind of this class.

        Args:
            sparsity: The options. The default kind, ``"ternary"``, fits every class.

        Raises:
            ConfigError: If the options say ``"masked"`` and this class is ternary.
        """
        if sparsity.kind == "masked" and cls.kind == "ternary":
            raise ConfigError('kind="masked" is SparseLinear')
        return replace(sparsity, kind=cls.kind)

    def _init_mask(self, sparsity: SparsityConfig, mask_bits: Tensor | None = None) -> None:
        """Add a mask to a plain linear layer.

        Args:
            sparsity: The options, which have been checked.
            mask_bits: The mask of the present weight, if it is known already.
        """
        self._sparsity = sparsity
        self.tracker = MaskTracker()
        self.regrow = True
        self.owner_prepares = False
        self._keep_n, self._sparse_share = self.pattern.n, 1.0
        self._most_kept = self.pattern.m  # The most weights that a group of the present mask keeps.
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
        """The options of the layer. Other options can be assigned; they take effect at once or are refused."""
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
        """Raise a :class:`ConfigError` if the layer cannot take other options as it is now."""

    @property
    def hold_mask(self) -> bool:
        """Whether the mask is held. A held mask changes only in :meth:`refresh_mask` and at another density."""
        return self.tracker.hold

    @hold_mask.setter
    def hold_mask(self, hold: bool) -> None:
        self.tracker.hold = hold

    @property
    def mask(self) -> Tensor:
        """The mask, bool ``[out_features, in_features]``."""
        return unpack_mask(self.packed_mask(), self.in_features)

    def packed_mask(self) -> Tensor:
        """Bring ``mask_bits`` up to date, and return them."""
        self._sync_mask()
        return self.mask_bits

    @property
    def density(self) -> tuple[int, float]:
        """The last arguments of :meth:`set_density`, ``(keep_n, sparse_share)``. A new layer has ``(N, 1.0)``."""
        return self._keep_n, self._sparse_share

    def set_density(self, keep_n: int, sparse_share: float = 1.0, *, refresh: bool = True) -> None:
        """Change how much the mask keeps. The mask changes at its next use, even while it is held.

        Args:
            keep_n: The number of weights that each group of a sparse row keeps, from ``pattern.n`` to ``pattern.m``.
            sparse_share: The share of rows that are sparse, 0 to 1. The other rows keep all weights. Rows become sparse
                in a fixed order that spreads evenly (multiples of the golden ratio). While the share grows, no row
                turns dense again.
            refresh: Whether the mask has to change. False means that the present mask has this density already, as in
                a run that resumes.

        Raises:
            ConfigError: If a value is out of range.
        """
        check_density(self.pattern, keep_n, sparse_share)
        self._keep_n, self._sparse_share = keep_n, float(sparse_share)
        if not refresh:
            self.tracker.mask_has(self.density)
        elif self.hold_mask:
            # A compiled graph reads a held mask as it is, so the mask must be right before the next forward.
            self._sync_mask()

    def refresh_mask(self) -> None:
        """Recompute the mask from the weight as it is now."""
        # The mask is computed in any case, so there is no need to find out whether the weight has changed. On a GPU the
        # host would wait for the answer, here or in the next forward.
        self.tracker.weight_is_new(self._weight(), self.training)
        self._make_mask()

    def keep_mask(self) -> None:
        """Let the present mask stay with the present weight until the weight changes, as after loading both."""
        self.tracker.mask_is_loaded(self._weight(), self.training, self.density)

    def values(self, masked: bool = True) -> Tensor:
        """The values that the layer multiplies with, up to a scale: ternary codes, or the weight of a masked layer.

        Args:
            masked: Whether the mask is applied. Without the mask, zeros of quantisation can be told from zeros of the
                mask.

        Returns:
            The values, ``[out_features, in_features]``.
        """
        raise NotImplementedError

    def effective_weight(self) -> Tensor:
        """The weight of the equivalent plain linear layer, ``[out_features, in_features]``, in the weight's dtype."""
        raise NotImplementedError

    def watched(self) -> Iterator[tuple[MaskTracker, Tensor]]:
        """The parameters that derived values come from, each with the tracker that knows whether it has changed."""
        yield self.tracker, self._weight()

    def prepare(self) -> None:
        """Bring all derived values up to date. Nothing is computed if the weight has not changed."""
        self._sync_mask()

    def forward(self, input: Tensor, swiglu: bool = False, quantized: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Multiply tokens with the sparse weight, and add the bias.

        Args:
            input: The tokens, ``[..., in_features]``; with ``swiglu`` gate and up side by side,
                ``[..., 2 in_features]``.
            swiglu: Whether the layer first computes ``silu(gate) * up``, which gives its tokens.
            quantized: The int8 codes of the tokens and their scales, if somebody has made them already and the
                layer's backend has ``takes_quantized``.

        Returns:
            ``[..., out_features]``, in the dtype of ``input``, or in autocast's dtype where autocast is on.

        Raises:
            ConfigError: If the tokens are not floating-point numbers.
        """
        if not input.is_floating_point():
            check_tokens(input, f"{type(self).__name__}({self.in_features}, {self.out_features})")
        dtype = result_dtype(input)
        with torch.autocast(input.device.type, enabled=False):
            y = self._multiply(input, swiglu, dtype, quantized)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def _multiply(
        self, x: Tensor, swiglu: bool, dtype: torch.dtype, quantized: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Compute the forward without the bias, in ``dtype``."""
        raise NotImplementedError

    def latent(self) -> Tensor:
        """The whole latent weight. If FSDP2 has sharded the weight, all ranks must call this together."""
        weight = self.weight.detach()
        return weight.full_tensor() if isinstance(weight, DTensor) else weight

    @property
    def backend(self) -> Backend:
        """The backend that computes the product. A :class:`SparseBitLinear` takes another one by assignment."""
        return REFERENCE

    def _mask_scores(self) -> Tensor:
        return self.latent()

    def _keep(self) -> Keep:
        """How many weights a fresh mask keeps in a group: one number, or an integer tensor with one for each row."""
        return kept_in_rows(self.pattern, self._keep_n, self._sparse_share, self.out_features, self.weight.device)

    def _fresh_mask(self) -> Tensor:
        return self.backend.fresh_mask(self._mask_scores(), self.pattern, self._keep())

    @torch.no_grad()
    def _make_mask(self) -> None:
        """Compute the mask from the weight as the tracker last saw it."""
        self._set_mask(self._fresh_mask())

    def _set_mask(self, bits: Tensor) -> None:
        """Take over a mask that was computed from the weight as the tracker last saw it."""
        if self.mask_bits.is_inference() and not torch.is_inference_mode_enabled():
            self.mask_bits = bits  # Outside of inference mode, a tensor made in it cannot be written to.
        elif bits is not self.mask_bits:
            self.mask_bits.copy_(bits)
        self._mask_is_set()

    def _mask_is_set(self) -> None:
        """Note that ``mask_bits`` hold a mask that was computed from the weight as the tracker last saw it."""
        self.tracker.mask_is_fresh(self.density)
        self._most_kept = self._keep_n if self._sparse_share == 1 else self.pattern.m

    def _weight(self) -> Tensor:
        """The parameter itself. The attribute ``weight`` of a subclass may be a view of the parameter."""
        weight = self._parameters.get("weight")
        if weight is None:
            reason = (
                "nn.DataParallel copies layers in each forward, and a copy has no latent weight; use one process for "
                "each GPU (torchrun and DistributedDataParallel), or one GPU (CUDA_VISIBLE_DEVICES=0)"
                if getattr(self, "_is_replica", False)
                else "its weight is no parameter any more (parametrize, weight_norm, pruning), and masks are made of "
                "latent weights; leave that out, or exclude the layer from conversion"
            )
            raise ConfigError(f"{type(self).__name__}({self.in_features}, {self.out_features}): {reason}")
        return weight

    def _mask_is_stale(self) -> bool:
        return self.tracker.is_stale(self._weight(), self.training, self.density)

    def _sync_mask(self) -> None:
        if self._mask_is_stale():
            self._make_mask()

    def _gradient_mask(self, mask_bits: Tensor) -> Tensor | None:
        return None if self.regrow and self.gradient == "dense" else unpack_mask(mask_bits, self.in_features)

    def _graph_mask(self) -> Tensor:
        """The packed mask for a compiled graph. The graph cannot ask the tracker whether the mask is stale."""
        if self.hold_mask or self.owner_prepares:
            return self.mask_bits
        expected = self.tracker.fingerprint
        if not self.tracker.loaded or expected is None:
            return self.mask_bits if self.tracker.loaded else self._fresh_mask()
        same = (fingerprint(self._weight()) == expected).all()
        return torch.where(same, self.mask_bits, self._fresh_mask())

    def _mask_stays(self) -> bool:
        """Whether the mask was held or loaded when the graph was compiled, so that the graph may not make a new one."""
        return self.tracker.hold or self.tracker.loaded

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedLinear:
        weight = self._parameters.get("weight")
        if weight is not None and self.tracker.loaded:
            self._sync_mask()  # This comes before the move, because the move would hide a change from the tracker.
        super()._apply(fn, recurse)
        weight = self._parameters.get("weight")
        if weight is not None:
            self.tracker.weight_moved(weight, self.training)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern}"


def masked_layers(model: nn.Module) -> Iterator[tuple[str, MaskedLinear]]:
    """The layers of a model that have a mask, with their names, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, MaskedLinear):
            # The wrapper of torch.compile adds "_orig_mod" to every name below it.
            yield name.replace("_orig_mod.", ""), module


def prepare_layers(model: nn.Module, layers: Sequence[MaskedLinear] | None = None) -> None:
    """Call :meth:`MaskedLinear.prepare` on every layer of ``model``.

    :mod:`sbn_lightning.layers.preparation` prepares many layers at once where that is possible.

    Args:
        model: The model with the masked layers.
        layers: The masked layers of the model, if the caller knows them. Searching a large model takes the host
            milliseconds.
    """
    found = [layer for _, layer in masked_layers(model)] if layers is None else list(layers)
    with _stay(found):
        prepare_all(model, found)


@contextmanager
def weights_stay(model: nn.Module) -> Iterator[None]:
    """A context that looks once whether weights have changed. Inside, the layers do not look again.

    On a GPU this saves waiting. In evaluation each layer would otherwise compare the fingerprint of its own weight, and
    the host would wait for each comparison. Nobody may write to a weight inside the context.

    Args:
        model: The model with the masked layers.
    """
    with _stay(layer for _, layer in masked_layers(model)):
        yield


@contextmanager
def _stay(layers: Iterable[MaskedLinear]) -> Iterator[None]:
    """Do what :func:`weights_stay` does, for some layers."""
    if not weights_are_trusted():
        look_at_all(
            (tracker, parameter, layer.training)
            for layer in layers
            for tracker, parameter in layer.watched()
            if not isinstance(parameter, DTensor)
        )
    with trust_weights():
        yield
