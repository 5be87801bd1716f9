"""The linear layers of a mixture of experts: one layer holds the weights of all experts.

The weight is one matrix ``[experts * rows, in_features]``. Masks, schedules, statistics, optimisers and formats
therefore treat the layer like any other. Each expert has a gamma of its own (``split_sizes``).

:class:`Routing` sorts the tokens by expert. A layer gets the sorted tokens and the number of tokens of each expert. It
loops over the experts that got tokens, and gives each group to the same backend as any other layer. The loop needs the
numbers on the host, so it stays outside of compiled graphs. Packed layers can instead hand all groups to one kernel
(``backend="grouped"``), which reads the numbers on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sbn_lightning.layers.options import check_tokens, result_dtype
from sbn_lightning.layers.packed import KERNEL_DTYPES, PackedTernaryLinear, packed_layer
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.layers.sparse_linear import SparseLinear
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import unpack_mask
from sbn_lightning.sparsity.ternary import MaskedLinearFunction, apply_swiglu, ternary_linear

if TYPE_CHECKING:
    from sbn_kernels.gemm.registry import Grouped


class Routing(NamedTuple):
    """Where the tokens of a mixture of experts go.

    A token takes k places, one for each of its experts. Places are sorted by expert, and within an expert by token.

    Attributes:
        order: The places in the order of the experts, int64 ``[tokens * k]``. Places without an expert come last.
        counts: The number of tokens of each expert, int64 ``[experts]``.
        top_k: k, the number of experts of a token.
    """

    order: Tensor
    counts: Tensor
    top_k: int

    @classmethod
    def of(cls, top_k_index: Tensor, experts: int) -> Routing:
        """Sort the places of tokens by expert.

        Args:
            top_k_index: The experts of each token, int64 ``[tokens, k]``. Numbers from ``experts`` on mean no expert.
            experts: The number of experts.
        """
        places = top_k_index.flatten().clamp(max=experts)
        counts = torch.zeros(experts + 1, dtype=torch.int64, device=places.device)
        counts = counts.scatter_add(0, places, torch.ones_like(places))
        return cls(places.argsort(stable=True), counts[:experts], top_k_index.shape[1])

    def gather(self, x: Tensor) -> Tensor:
        """Return the tokens of all places by expert: ``[tokens, width]`` -> ``[tokens * k, width]``."""
        # Each place gets a copy of its token before the sort. The backward then adds the k gradients of a token in a
        # fixed order. An index that names a token k times would add them in any order on a GPU.
        copies = x.unsqueeze(1).expand(-1, self.top_k, -1).reshape(-1, x.shape[-1])
        return copies.index_select(0, self.order)

    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        """Add up the outputs of each token's experts.

        Args:
            y: The outputs of all places by expert, ``[tokens * k, width]``.
            weights: The weights of the outputs, ``[tokens, k]``.

        Returns:
            ``[tokens, width]``, in the dtype that ``y`` and ``weights`` have together.
        """
        back = torch.empty_like(self.order).scatter(0, self.order, torch.arange(len(self.order), device=y.device))
        by_token = y.index_select(0, back).view(len(weights), self.top_k, y.shape[-1])
        return (by_token * weights.unsqueeze(-1)).sum(1)


def multiply_groups(x: Tensor, counts: Tensor, rows: int, multiply: Callable[[slice, int], Tensor]) -> Tensor:
    """Multiply each expert's tokens, expert by expert.

    Args:
        x: The tokens by expert, ``[tokens, width]``. Tokens after the last expert's belong to no expert and give zeros.
        counts: The number of tokens of each expert, ``[experts]``.
        rows: The number of features of a result.
        multiply: A function that takes the place of an expert's tokens in ``x`` and the number of the expert.

    Returns:
        ``[tokens, rows]``.
    """
    parts, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            parts.append(multiply(slice(start, start + count), expert))
            start += count
    if start < len(x) or not parts:
        parts.append(x.new_zeros(len(x) - start, rows, dtype=parts[0].dtype if parts else x.dtype))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class OneExpert(NamedTuple):
    """The shape and the options of one expert's part of a layer. The choice of a kernel depends on them."""

    in_features: int
    out_features: int
    sparsity: SparsityConfig


def _of_one(sparsity: SparsityConfig, experts: int) -> SparsityConfig:
    """The options of one expert: its own part of ``split_sizes``."""
    sizes = sparsity.split_sizes
    own = None if sizes is None or len(sizes) == experts else sizes[: len(sizes) // experts]
    return replace(sparsity, split_sizes=own)


class DenseExperts(nn.Linear):
    """The weights of all experts, dense.

    Args:
        experts: The number of experts.
        in_features: The features of a token.
        rows: The features of a result.

    Attributes:
        active: The number of experts that a token is multiplied with; None if it is not known.
    """

    active: int | None = None

    def __init__(self, experts: int, in_features: int, rows: int) -> None:
        super().__init__(in_features, experts * rows, bias=False)
        self.experts = experts

    def forward(self, input: Tensor, counts: Tensor, swiglu: bool = False) -> Tensor:  # type: ignore[override]
        """Multiply tokens that are sorted by expert; see :meth:`SparseBitExperts.forward`."""
        x = apply_swiglu(input) if swiglu else input
        weights = self.weight.chunk(self.experts)
        rows = self.out_features // self.experts
        return multiply_groups(x, counts, rows, lambda own, e: nn.functional.linear(x[own], weights[e]))


class SparseExpertsLinear(SparseLinear):
    """The weights of all experts with an N:M mask, not quantised.

    Attributes:
        experts: The number of experts.
        active: The number of experts that a token is multiplied with; None if it is not known.
    """

    experts: int
    active: int | None = None

    def __init__(self, experts: int, in_features: int, rows: int, *, sparsity: SparsityConfig) -> None:
        self.experts = experts
        super().__init__(in_features, experts * rows, False, sparsity=sparsity)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor, counts: Tensor, swiglu: bool = False) -> Tensor:  # type: ignore[override]
        """Multiply tokens that are sorted by expert; see :meth:`SparseBitExperts.forward`."""
        dtype = result_dtype(input)
        with torch.autocast(input.device.type, enabled=False):
            x = input.to(dtype)
            x = apply_swiglu(x) if swiglu else x
            bits = self.packed_mask()
            mask, wanted = unpack_mask(bits, self.in_features), self._gradient_mask(bits)
            weights, masks = self.weight.chunk(self.experts), mask.chunk(self.experts)
            gradient_masks = [None] * self.experts if wanted is None else wanted.chunk(self.experts)

            def multiply(own: slice, e: int) -> Tensor:
                y: Tensor = MaskedLinearFunction.apply(x[own], weights[e], masks[e], gradient_masks[e])
                return y

            return multiply_groups(x, counts, self.out_features // self.experts, multiply)


class SparseBitExperts(SparseBitLinear):
    """The ternary N:M-sparse weights of all experts.

    Args:
        experts: The number of experts.
        in_features: The features of a token; a multiple of the pattern's M.
        rows: The features of a result.
        parts: The rows of each part of one expert, for example of gate and of up. Each part gets a gamma.
        sparsity: The options of the layer. Its ``split_sizes`` are those of all experts, and come from ``parts``.

    Attributes:
        active: The number of experts that a token is multiplied with; None if it is not known.
    """

    experts: int
    active: int | None = None
    _by_expert: list[Any] | None = None  # The prepared weight of each expert,
    _experts_of: Any = None  # and what it was made of.
    reads_codes = True  # Each expert's weight is made of its codes.

    def __init__(self, experts: int, in_features: int, parts: tuple[int, ...], *, sparsity: SparsityConfig) -> None:
        self.experts = experts
        sparsity = replace(sparsity, split_sizes=parts * experts if len(parts) * experts > 1 else None)
        super().__init__(in_features, experts * sum(parts), False, sparsity=sparsity)

    @property
    def one_expert(self) -> OneExpert:
        """One expert as the choice of a kernel sees it."""
        return OneExpert(self.in_features, self.out_features // self.experts, _of_one(self.sparsity, self.experts))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Tensor, counts: Tensor, swiglu: bool = False) -> Tensor:  # type: ignore[override]
        """Multiply tokens that are sorted by expert.

        Args:
            input: The tokens, ``[tokens, in_features]``: those of expert 0, then those of expert 1, and so on. Tokens
                after the last expert's belong to no expert. With ``swiglu`` gate and up side by side.
            counts: The number of tokens of each expert, int64 ``[experts]``.
            swiglu: Whether the layer first computes ``silu(gate) * up``, which gives its tokens.

        Returns:
            ``[tokens, rows]``, in the dtype of ``input``, or in autocast's dtype where autocast is on.
        """
        check_tokens(input, f"{type(self).__name__}({self.in_features}, {self.out_features})")
        dtype = result_dtype(input)
        with torch.autocast(input.device.type, enabled=False):
            self.prepare()
            x = input if self.activation_bits is not None else input.to(dtype)
            wanted = self._gradient_mask(self.mask_bits)
            masks = [None] * self.experts if wanted is None else wanted.chunk(self.experts)
            if getattr(self, "_rounding", None) is not None:
                return self._partly_rounded(apply_swiglu(x) if swiglu else x, counts, masks, dtype)
            latents = self._leaf(self._prepared).chunk(self.experts)
            prepared = self._prepared_by_expert()

            def multiply(own: slice, e: int) -> Tensor:
                bits = self.activation_bits
                return self.backend.linear(x[own], latents[e], prepared[e], masks[e], bits, swiglu, dtype)

            return multiply_groups(x, counts, self.out_features // self.experts, multiply).to(dtype)

    def _partly_rounded(self, x: Tensor, counts: Tensor, masks: Any, dtype: torch.dtype) -> Tensor:
        """The product while only a share of the rounding is in effect; see :meth:`SparseBitLinear.set_rounding`."""
        from sbn_lightning.sparsity.partial_rounding import partly_rounded_linear, partly_rounded_weight

        assert self._rounding is not None
        weights, tokens = self._rounding
        mask, whole = unpack_mask(self.mask_bits, self.in_features), self._prepared
        effective = partly_rounded_weight(self.weight, mask, whole.codes, whole.row_scale, weights).chunk(self.experts)
        latents, bits = self._leaf(whole, weights).chunk(self.experts), self.activation_bits

        def multiply(own: slice, e: int) -> Tensor:
            return partly_rounded_linear(x[own], latents[e], effective[e], masks[e], bits, tokens, dtype)

        return multiply_groups(x, counts, self.out_features // self.experts, multiply).to(dtype)

    def _prepared_by_expert(self) -> list[Any]:
        """The prepared weight of each expert. Backends other than the reference may pack each weight, once a step."""
        key = self._prepared_key()
        if self._by_expert is not None and self._experts_of == (key, self.backend):
            return self._by_expert
        whole = self._prepared
        parts = zip(*(part.chunk(self.experts) for part in (whole.codes, whole.row_scale, self.mask_bits)), strict=True)
        own = _of_one(self.sparsity, self.experts)
        with torch.inference_mode(False), torch.no_grad():
            by_expert = [
                self.backend.from_codes(codes, row_scale, mask_bits, self._most_kept, own)
                for codes, row_scale, mask_bits in parts
            ]
        self._by_expert, self._experts_of = by_expert, (key, self.backend)
        return by_expert

    def _forget_prepared(self) -> None:
        super()._forget_prepared()
        self._by_expert = self._experts_of = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_by_expert": None, "_experts_of": None}


class PackedExperts(PackedTernaryLinear):
    """The ternary codes and gammas of all experts, without latent weights.

    Attributes:
        experts: The number of experts.
        active: The number of experts that a token is multiplied with; None if it is not known.
    """

    experts: int
    active: int | None = None
    _packed_by_expert: list[Tensor | None]
    _one_launch: Grouped | None

    def forward(  # type: ignore[override]
        self, x: Tensor, counts: Tensor, swiglu: bool = False, magnitude: Tensor | None = None
    ) -> Tensor:
        """Multiply tokens that are sorted by expert.

        Args:
            x: The tokens; see :meth:`SparseBitExperts.forward`.
            counts: The number of tokens of each expert, int64 ``[experts]``.
            swiglu: Whether the layer first computes ``silu(gate) * up``, which gives its tokens.
            magnitude: The :func:`~sbn_lightning.sparsity.ternary.token_magnitude` of the whole tokens, ``[tokens, 1]``,
                if the layer is given slices of tokens. None means whole tokens.
        """
        check_tokens(x, f"PackedExperts({self.in_features}, {self.out_features})")
        dtype = result_dtype(x)
        if self._settled_for != (self.backend, self.codes.device):
            self._settle()
        with torch.autocast(x.device.type, enabled=False):
            x = apply_swiglu(x) if swiglu else x
            wants_gradient = torch.is_grad_enabled() and x.requires_grad  # The kernels have no backward.
            by_kernels = self._kernel is not None and x.dtype in KERNEL_DTYPES and not wants_gradient
            multiply = self._grouped_kernels if by_kernels else self._grouped_reference
            y: Tensor = multiply(x, counts, dtype, magnitude)
            return y

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _grouped_reference(self, x: Tensor, counts: Tensor, dtype: torch.dtype, magnitude: Tensor | None) -> Tensor:
        codes, scales = self.codes.chunk(self.experts), self.row_scale.chunk(self.experts)
        gammas = self.gamma.chunk(self.experts)
        bits = self.activation_bits

        def multiply(own: slice, e: int) -> Tensor:
            whole = None if magnitude is None else magnitude[own]
            return ternary_linear(x[own], gammas[e], codes[e], scales[e], None, bits, dtype, whole)

        return multiply_groups(x, counts, self.out_features // self.experts, multiply).to(dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _grouped_kernels(self, x: Tensor, counts: Tensor, dtype: torch.dtype, magnitude: Tensor | None) -> Tensor:
        from sbn_lightning.backends.products import multiply as product
        from sbn_lightning.backends.products import quantize

        assert self.activation_bits is not None
        x8, token_scale = quantize(x, self.activation_bits, magnitude)
        if self._one_launch is not None:
            assert self._packed is not None
            return self._one_launch.multiply(x8, token_scale, self._packed, self.row_scale, counts, dtype)
        assert self._kernel is not None
        kernel, packed = self._kernel, self._packed_by_expert
        codes, scales = self.codes.chunk(self.experts), self.row_scale.chunk(self.experts)

        def multiply(own: slice, e: int) -> Tensor:
            return product(x8[own], token_scale[own], codes[e], scales[e], packed[e], self._layout, kernel, dtype)

        return multiply_groups(x8, counts, self.out_features // self.experts, multiply).to(dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _settle(self) -> None:
        """Choose a kernel or the reference for the shape of one expert, and pack each expert's weight."""
        from sbn_lightning.backends.grouped import choose_grouped
        from sbn_lightning.backends.selection import choose_packed, pack_for

        self._packed, self._packed_by_expert = None, [None] * self.experts
        self._layout, self._kernel, self._one_launch = "none", None, None
        device = self.codes.device
        if self.backend == "grouped":
            self._one_launch = choose_grouped(self.activation_bits, device)
            self._kernel, self._packed = self._one_launch.name, self._one_launch.pack(self.codes)
        elif self.backend != "reference":
            n, m = self._held_pattern()
            rows = self.out_features // self.experts
            choice = choose_packed(self.in_features, rows, n, m, self.activation_bits, self.backend, device)
            self._kernel = choice.kernel
            if choice.kernel is not None:
                forms = [pack_for(choice.kernel, codes) for codes in self.codes.chunk(self.experts)]
                self._packed_by_expert, self._layout = [form for form, _ in forms], forms[0][1]
        self._settled_for = (self.backend, device)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, {super().extra_repr()}"


def packed_experts(codes: Tensor, gamma: Tensor, like: Any, *, sparsity: SparsityConfig) -> PackedExperts:
    """Make a packed layer of experts.

    Args:
        codes: The codes of all experts, int8 ``[experts * rows, in_features]``.
        gamma: The gamma of each part of each expert, float32.
        like: A layer of experts that has the same ``experts`` and ``active``.
        sparsity: The options that the weight was trained with.
    """
    layer = PackedExperts(codes, gamma, None, sparsity=sparsity)
    layer.experts, layer.active = like.experts, like.active
    return layer


@packed_layer.register
def _(layer: SparseBitExperts) -> PackedTernaryLinear:
    return packed_experts(*layer.ternary(), like=layer, sparsity=layer.sparsity).train(layer.training)


def active_share(layer: nn.Module) -> float:
    """The share of a layer's weights that multiply a token: 1, or less for experts of which a token takes a few."""
    experts, active = getattr(layer, "experts", None), getattr(layer, "active", None)
    return 1.0 if experts is None or active is None else min(active / experts, 1.0)
