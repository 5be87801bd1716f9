"""``SparseBitLinear``: the linear layer with ternary, N:M-sparse weights and quantised tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sbn_lightning.backends.base import Backend, Operands
from sbn_lightning.backends.reference import REFERENCE
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.joined import Readers, joined_result
from sbn_lightning.layers.mask_tracker import MaskTracker, trust_weights, version
from sbn_lightning.layers.masked_linear import MaskedLinear, masked_layers
from sbn_lightning.layers.options import config_option
from sbn_lightning.layers.preparation import Asked, forget_recordings
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.learned_scale import ScaledWeight, factor_of_rows
from sbn_lightning.sparsity.partial_rounding import partly_rounded_linear, partly_rounded_weight
from sbn_lightning.sparsity.pattern import unpack_mask
from sbn_lightning.sparsity.ternary import apply_swiglu, expand_scale, ternary_codes, weight_scale


class SparseBitLinear(MaskedLinear):
    """A linear layer with ternary, N:M-sparse weights and quantised tokens (:mod:`sbn_lightning.sparsity.ternary`).

    Args:
        in_features: The features of a token; a multiple of the pattern's M.
        out_features: The features of a result.
        bias: Whether the layer adds a bias, which stays in high precision.
        sparsity: The options of the layer: a :class:`SparsityConfig`, or only a pattern.
        device: The device of the parameters.
        dtype: The dtype of the parameters. float32 keeps small updates that bfloat16 would round away.
        **options: Single fields of :class:`SparsityConfig`, for example ``pattern="2:4"``.

    Attributes:
        log_scale: The logarithm of the learned factor on gamma, a parameter ``[parts]``. Only layers with
            ``learnable_scales`` have one.
        readers: The group of this layer and its siblings that probably read the same tokens
            (:mod:`sbn_lightning.layers.joined`); None: the layer has no group.
        given: Some tokens, and the result of this layer for these tokens. A sibling has computed the result.

    Shape:
        x ``[..., in_features]`` -> y ``[..., out_features]`` in the dtype of x, or in autocast's dtype if autocast is
        on.

    Raises:
        ConfigError: If an option cannot work. The message names the layer.
    """

    kind = "ternary"
    # Models that an earlier version has pickled have no attributes of these names.
    readers: Readers | None = None
    given: tuple[Tensor, Tensor] | None = None
    # Whether each forward of this class reads the codes, and not only packed words.
    reads_codes: ClassVar[bool] = False
    learnable_scales: bool = config_option("learnable_scales")
    log_scale: nn.Parameter
    _scale_tracker: MaskTracker | None = None  # It knows whether log_scale has changed.

    def _init_mask(self, sparsity: SparsityConfig, mask_bits: Tensor | None = None) -> None:
        self._backend: Backend = REFERENCE
        self._wrap_backend: Callable[[Backend], Backend] | None = None
        self._prepared: Any = None
        self._prepared_of: tuple[Any, ...] | None = None
        self._rounding: tuple[Tensor, Tensor] | None = None
        self.readers, self.given = None, None
        self._scale_tracker = MaskTracker() if sparsity.learnable_scales else None
        if sparsity.learnable_scales:
            dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
            zeros = torch.zeros(len(sparsity.split_sizes or (1,)), dtype=dtype, device=self.weight.device)
            self.log_scale = nn.Parameter(zeros, requires_grad=self._weight().requires_grad)
        super()._init_mask(sparsity, mask_bits)

    def forward(self, input: Tensor, swiglu: bool = False, quantized: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if self.readers is not None and swiglu is False and quantized is None:
            y = joined_result(self, input)
            if y is not None:
                return y
        return super().forward(input, swiglu, quantized)

    @property
    def backend(self) -> Backend:
        return self._backend

    @backend.setter
    def backend(self, backend: Backend) -> None:
        self._backend = backend if self._wrap_backend is None else self._wrap_backend(backend)
        self._forget_prepared()

    def wrap_backend(self, wrap: Callable[[Backend], Backend]) -> None:
        """Put a wrapper around the present backend, and around each backend that is assigned later.

        Args:
            wrap: A function that makes a backend from another one, for example a backend for a weight that is sharded
                by rows.
        """
        self._wrap_backend = wrap
        self.backend = self._backend

    def _forget_prepared(self) -> None:
        self._prepared = self._prepared_of = None

    @property
    def rounding(self) -> tuple[float, float]:
        """The shares of the weights' and of the tokens' rounding that are in effect; (1.0, 1.0) in a new layer."""
        return (1.0, 1.0) if self._rounding is None else (float(self._rounding[0]), float(self._rounding[1]))

    def set_rounding(self, weights: float = 1.0, tokens: float = 1.0) -> None:
        """Let only a share of the rounding take effect, as in a warm-up from pretrained weights.

        With shares below 1 the layer computes in plain PyTorch (:mod:`sbn_lightning.sparsity.partial_rounding`), and
        the backend only makes masks and codes. The shares belong to the training and not to the weights: they are not
        in the state dict, and exports and ``effective_weight`` have the whole rounding.

        Args:
            weights: The share for the weights, 0 to 1. At 0 the layer multiplies with masked latent weights.
            tokens: The share for the tokens, 0 to 1.

        Raises:
            ConfigError: If a share is out of range.
        """
        for name, share in (("weights", weights), ("tokens", tokens)):
            if not 0.0 <= share <= 1.0:
                raise ConfigError(f"rounding of {name}={share} is outside 0..1")
        if weights == tokens == 1:
            self._rounding = None
            return
        if self._rounding is None:
            self._forget_prepared()  # A partial rounding reads the codes, and a backend may have dropped them.
        if self._rounding is None or self._rounding[0].device != self.weight.device:
            # Tensors, not numbers: a compiled graph would be compiled again for each new number.
            self._rounding = tuple(torch.zeros((), device=self.weight.device) for _ in range(2))  # type: ignore[assignment]
        assert self._rounding is not None
        for tensor, share in zip(self._rounding, (weights, tokens), strict=True):
            tensor.fill_(share)

    def _check_change(self, sparsity: SparsityConfig, label: str) -> None:
        before, after = (len(it.split_sizes or (1,)) * it.learnable_scales for it in (self.sparsity, sparsity))
        if before != after:
            raise ConfigError(f"{label}: a layer with {before} learned scales cannot have {after}; make a new layer")
        if self._backend is not REFERENCE:
            raise ConfigError(
                f"{label}: the {self._backend.name} backend was chosen for {self.sparsity}; set layer.backend to "
                "sbn_lightning.backends.reference.REFERENCE before you change the options"
            )
        self._forget_prepared()

    def __getstate__(self) -> dict[str, Any]:
        left_out = {"_prepared": None, "_prepared_of": None, "given": None, "readers": None}
        place = None if self.readers is None else (self.readers, self.readers.number(self))
        return super().__getstate__() | left_out | {"place": place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        place = vars(self).pop("place", None)
        if place is not None and place[0].enter(self, place[1]):
            self.readers = place[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseBitLinear:
        before = self.mask_bits.device
        super()._apply(fn, recurse)
        if self.mask_bits.device != before:
            # Prepared weights take memory on the old device.
            self._forget_prepared()
            forget_recordings(self)
        return self

    def ternary(self) -> tuple[Tensor, Tensor]:
        """Return the codes in {-1, 0, 1}, int8 ``[out_features, in_features]``, and gamma of each part, float32."""
        weight = self._whole()
        starts = [0]
        for rows in (self.split_sizes or (self.out_features,))[:-1]:
            starts.append(starts[-1] + rows)
        return weight.codes, weight.row_scale[starts]

    def effective_weight(self) -> Tensor:
        weight = self._whole()
        return (weight.codes * weight.row_scale.unsqueeze(-1)).to(self.weight.dtype)

    def values(self, masked: bool = True) -> Tensor:
        weight = self._whole()
        codes: Tensor = weight.codes
        if masked:
            return codes
        if self.sparsity.gamma_over == "nonzero":
            return self._dense_codes()
        # The factor that is learned does not decide which weights round to zero.
        gamma = weight.row_scale / self._factor() if self.learnable_scales else weight.row_scale
        return ternary_codes(self.latent(), gamma)

    def _whole(self) -> Any:
        """Return the prepared weight, up to date. A backend whose codes are not whole at present makes them whole."""
        self.prepare()
        return self._backend.with_codes(self._prepared, self.in_features)

    def watched(self) -> Iterator[tuple[MaskTracker, Tensor]]:
        yield from super().watched()
        if self._scale_tracker is not None:
            yield self._scale_tracker, self.log_scale

    def prepare(self) -> None:
        # The look comes first, because the mode of the caller says whether fingerprints are compared.
        for tracker, parameter in self.watched():
            tracker.look(parameter, self.training)
        # A validation loop may run in inference mode. Tensors made in that mode could not be used in the next training
        # step.
        with torch.inference_mode(False), torch.no_grad(), trust_weights():
            request = self.due()
            if request is not None:
                self.take(request, self._backend.prepare(*request))

    def due(self) -> Asked | None:
        """Return the arguments of ``Backend.prepare`` if the weight must be prepared anew; otherwise None."""
        stale = self._mask_is_stale()
        if self._scale_tracker is not None:
            self._scale_tracker.look(self.log_scale, self.training)
        if stale and self.sparsity.mask_source != "latent":
            self._make_mask()
            stale = False
        if not stale and self.is_prepared:
            return None
        keep = self._keep() if stale else self._most_kept
        return Asked(self._for_backend(), None if stale else self.mask_bits, keep, self.sparsity)

    def take(self, request: Asked, prepared: Any) -> None:
        """Take over a prepared weight.

        Args:
            request: What :meth:`due` returned.
            prepared: What the backend made of the weight.
        """
        prepared = self._with_learned_scale(prepared)
        if request.mask_bits is None:
            self._set_mask(prepared.mask_bits)
            if hasattr(prepared, "_replace"):
                prepared = prepared._replace(mask_bits=self.mask_bits)  # One copy of the mask is enough.
        if not self.needs_codes:
            prepared = self._backend.without_codes(prepared)
        self._prepared = prepared
        self._prepared_of = self._prepared_key()

    def take_written(self, request: Asked, prepared: Any) -> None:
        """Take over a prepared weight whose tensors, and ``mask_bits``, were written in place.

        Args:
            request: What :meth:`due` returned.
            prepared: What :meth:`take` had made of the weight when the writing was recorded.
        """
        self._prepared = prepared._replace()  # Another object says that the weight has changed.
        if request.mask_bits is None:
            self._mask_is_set()
        self._prepared_of = self._prepared_key()

    @property
    def needs_codes(self) -> bool:
        """Whether a step reads the codes even if the kernels read only packed words."""
        return self.reads_codes or self.is_partly_rounded or self.learnable_scales

    @property
    def is_prepared(self) -> bool:
        """Whether nothing that the prepared weight depends on has changed since the trackers last looked."""
        return self._prepared_key() == self._prepared_of

    def _prepared_key(self) -> tuple[Any, ...]:
        """A key that changes with the weight, its device, the mask and the learned scale.

        The version of the mask's buffer counts mask refreshes.
        """
        scale = 0 if self._scale_tracker is None else self._scale_tracker.changes
        return (self.tracker.changes, self.weight.device, id(self.mask_bits), version(self.mask_bits), scale)

    def operands(self) -> tuple[Any, Tensor]:
        """Return the prepared weight and the packed mask for one forward."""
        if torch.compiler.is_compiling() and not self.owner_prepares:
            fused = self.sparsity.mask_source == "latent" and not self._mask_stays()
            keep = self._keep() if fused else self._most_kept
            given = None if fused else self._graph_mask()
            prepared = self._backend.prepare(self._for_backend(), given, keep, self.sparsity)
            return self._with_learned_scale(prepared), prepared.mask_bits
        if not torch.compiler.is_compiling():
            self.prepare()
        return self._prepared, self.mask_bits

    def for_gradients(self) -> Operands:
        """Return the latent weight, the prepared weight, the mask of the gradient, and the bits of a token."""
        prepared, mask_bits = self.operands()
        return self._leaf(prepared), prepared, self._gradient_mask(mask_bits), self.activation_bits

    def _leaf(self, prepared: Any, share: Tensor | None = None) -> Tensor:
        """Return the tensor that gets the gradient of the latent weight.

        Args:
            prepared: The prepared weight.
            share: The share of the weights' rounding that is in effect; None for the whole.
        """
        # For a sharded weight the backend has leaves. A compiled block that read the weight would compare the whole
        # description of the sharding in each forward.
        leaf = self.weight if self._backend.leaf is None else self._backend.leaf
        if self.learnable_scales and torch.is_grad_enabled():
            scale = self.log_scale if self._backend.scale_leaf is None else self._backend.scale_leaf
            leaf = ScaledWeight.apply(leaf, scale, prepared.codes, prepared.row_scale, self.split_sizes, share)
        return leaf

    def _factor(self) -> Tensor:
        """Return the learned factor on gamma of each row, ``[out_features]``."""
        scale = self.log_scale.detach()
        if isinstance(scale, DTensor):
            # With packed codes every rank has all scales. With gather="latent" FSDP2 cuts them, and all ranks gather.
            whole = all(placement.is_replicate() for placement in scale.placements)
            scale = scale.to_local() if whole else scale.full_tensor()
        return factor_of_rows(scale, self.split_sizes, self.out_features)

    def _with_learned_scale(self, prepared: Any) -> Any:
        """Return a weight that a backend has prepared, with the learned factor in the scale of its rows."""
        if not self.learnable_scales:
            return prepared
        return prepared._replace(row_scale=prepared.row_scale * self._factor())

    @property
    def is_partly_rounded(self) -> bool:
        """Whether only a share of the rounding takes effect."""
        return self._rounding is not None

    def _multiply(
        self, x: Tensor, swiglu: bool, dtype: torch.dtype, quantized: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        prepared, mask_bits = self.operands()
        gradient_mask = self._gradient_mask(mask_bits)
        bits = self.activation_bits
        if self._rounding is not None:
            weights, tokens = self._rounding
            mask = unpack_mask(mask_bits, self.in_features)
            latent = self._backend.whole_latent(self.weight)
            effective = partly_rounded_weight(latent, mask, prepared.codes, prepared.row_scale, weights)
            x = apply_swiglu(x) if swiglu else x
            leaf = self._leaf(prepared, weights)
            return partly_rounded_linear(x, leaf, effective, gradient_mask, bits, tokens, dtype)
        if bits is None:
            x = x.to(dtype)
        # Tokens are quantised in the precision that they come in, because rounding them to bfloat16 first would double
        # the error. Only the product has the dtype of autocast.
        given = {} if quantized is None else {"quantized": quantized}
        return self._backend.linear(x, self._leaf(prepared), prepared, gradient_mask, bits, swiglu, dtype, **given)

    def _mask_scores(self) -> Tensor:
        return self._for_backend(None if self.sparsity.mask_source == "latent" else self._dense_codes())

    def _for_backend(self, whole: Tensor | None = None) -> Tensor:
        """Return the rows that the backend needs: all rows, or this rank's rows if the weight is sharded by rows.

        Args:
            whole: A tensor that has one row for each row of the weight. None takes the latent weight.
        """
        if whole is None:
            # A backend with a leaf takes the rows of a sharded weight, so the weight is not gathered.
            whole = self.latent() if self._backend.leaf is None else self.weight
        return self._backend.rows(whole)

    def _dense_codes(self) -> Tensor:
        """The codes of all weights, as if nothing were masked. A kernel's own gamma may differ in its last bit."""
        weight = self.latent()
        gamma = weight_scale(weight, self.split_sizes)
        return ternary_codes(weight, expand_scale(gamma, self.split_sizes, self.out_features))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation_bits={self.activation_bits}, backend={self._backend.name}"


def ternary_layers(model: torch.nn.Module) -> dict[str, SparseBitLinear]:
    """The ternary layers of a model by name, in the model's order."""
    return {name: layer for name, layer in masked_layers(model) if isinstance(layer, SparseBitLinear)}
