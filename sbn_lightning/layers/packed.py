"""A ternary linear layer without a latent weight: for models that are run, not trained.

The reference path makes the same calls as :class:`SparseBitLinear` in evaluation, so its output has the same bits. The
kernel path keeps the weight packed, 2 bits a weight, and never unpacks it: one copy serves prefill and decode. Which
path is taken is settled before the first forward on a device, outside of any compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sbn_lightning.layers.masked_linear import check_tokens, config_option
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern, nonzeros_per_group
from sbn_lightning.sparsity.ternary import expand_scale, ternary_linear

InferenceBackend = Literal["reference", "kernels", "int8", "auto"]
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class PackedTernaryLinear(nn.Module):
    """``y = (x8 @ T^T) * s * gamma (+ bias)`` from ternary codes and gamma alone.

    Args:
        codes: int8 ``[out_features, in_features]`` in {-1, 0, 1}.
        gamma: Weight scale of each part, float32 ``[parts]``.
        bias: ``[out_features]`` or None.
        sparsity: The options that the weight was trained with: a :class:`SparsityConfig`, or only a pattern.
        **options: Single fields of :class:`SparsityConfig`.

    Attributes:
        backend: ``"reference"``: plain PyTorch, any device. ``"kernels"``: packed weights and the kernels of
            ``sbn_kernels``, on sparse tensor cores where device and pattern allow; an error where no kernel can run.
            ``"int8"``: the same on dense tensor cores. ``"auto"`` (the default): as ``"kernels"`` on a GPU that has
            them, for activations of 8 or 4 bits; the reference elsewhere.

    Shape:
        x ``[..., in_features]`` -> y ``[..., out_features]`` in the dtype of x, or autocast's where autocast is on.
    """

    pattern: NMPattern = config_option("pattern")
    split_sizes: tuple[int, ...] | None = config_option("split_sizes")
    activation_bits: int | None = config_option("activation_bits")
    codes: Tensor
    gamma: Tensor
    row_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        gamma: Tensor,
        bias: Tensor | None = None,
        *,
        sparsity: SparsityConfig | NMPattern | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.sparsity = SparsityConfig.make(sparsity, **options)
        self.sparsity.check_fits(self.in_features, self.out_features, f"PackedTernaryLinear{tuple(codes.shape)[::-1]}")
        self.backend: InferenceBackend = "auto"
        self.register_buffer("codes", codes)
        self.register_buffer("gamma", gamma)
        self.register_buffer(
            "row_scale", expand_scale(gamma, self.split_sizes, self.out_features).clone(), persistent=False
        )
        self.register_buffer("bias", bias)
        self._packed: Tensor | None = None  # what the kernels read; None: the codes, or the reference computes
        self._layout = "none"  # the form of _packed
        self._kernel: str | None = None  # the kernel for many tokens; None: the reference
        self._settled_for: tuple[object, ...] | None = None

    def ternary(self) -> tuple[Tensor, Tensor]:
        """Returns int8 codes ``[out_features, in_features]`` and gamma, one a part, float32."""
        return self.codes, self.gamma

    def effective_weight(self) -> Tensor:
        """``gamma * T``, ``[out_features, in_features]``, float32."""
        return self.codes * self.row_scale.unsqueeze(-1)

    @property
    def mask(self) -> Tensor:
        """Where weights are not zero, bool ``[out_features, in_features]``."""
        return self.codes != 0

    def forward(self, x: Tensor) -> Tensor:
        check_tokens(x, f"PackedTernaryLinear({self.in_features}, {self.out_features})")
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if self._settled_for != (self.backend, self.codes.device):
            self._settle()
        with torch.autocast(device, enabled=False):
            wants_gradient = torch.is_grad_enabled() and x.requires_grad  # which kernels have not
            by_kernels = self._kernel is not None and x.dtype in KERNEL_DTYPES and not wants_gradient
            y = self._by_kernels(x, dtype) if by_kernels else self._by_reference(x, dtype)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def _by_reference(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        # The second argument tells a backward pass the dtype of a latent weight's gradient; there is none here.
        return ternary_linear(x, self.gamma, self.codes, self.row_scale, None, self.activation_bits, dtype)

    def _by_kernels(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        from sbn_lightning.backends.integer import multiply, quantize

        assert self.activation_bits is not None
        assert self._kernel is not None
        x8, scale = quantize(x.reshape(-1, self.in_features), self.activation_bits)
        y = multiply(x8, scale, self.codes, self.row_scale, self._packed, self._layout, self._kernel, dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _settle(self) -> None:
        """Asks for a kernel, or the reference, and packs the weight for the kernels of its device."""
        self._packed, self._layout, self._kernel = None, "none", None
        if self.backend != "reference":
            from sbn_lightning.backends.selection import choose_packed, pack_for

            n, m = (2, 4) if self._fits_24() else (self.pattern.n, self.pattern.m)
            choice = choose_packed(
                self.in_features, self.out_features, n, m, self.activation_bits, self.backend, self.codes.device
            )
            self._kernel = choice.kernel
            if choice.kernel is not None:
                self._packed, self._layout = pack_for(choice.kernel, self.codes)
        self._settled_for = (self.backend, self.codes.device)

    def _fits_24(self) -> bool:
        return self.in_features % 4 == 0 and int(nonzeros_per_group(self.codes, 4).max()) <= 2

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedTernaryLinear:
        """Moves everything; a cast leaves gamma as it is, whose digits are few enough."""
        gamma, row_scale = self.gamma, self.row_scale
        super()._apply(fn, recurse)
        self.gamma, self.row_scale = gamma.to(self.gamma.device), row_scale.to(self.row_scale.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.row_scale = expand_scale(self.gamma, self.split_sizes, self.out_features).clone()
        self._settled_for = None

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pattern={self.pattern}, activation_bits={self.activation_bits}, backend={self.backend}"
        )


def pack_layers(model: nn.Module, backend: InferenceBackend = "auto") -> nn.Module:
    """Replaces every :class:`SparseBitLinear` of a model by what it computes with in evaluation, in place.

    Latent weights are dropped: 4 bytes a weight become 1 and, with kernels, a quarter more.

    Args:
        model: Any model.
        backend: For the new layers; see :class:`PackedTernaryLinear`.

    Returns:
        ``model``.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SparseBitLinear):
            parent, _, child = name.rpartition(".")
            packed = packed_layer(layer)
            packed.backend = backend
            setattr(model.get_submodule(parent), child, packed)
    return model


def packed_layer(layer: SparseBitLinear) -> PackedTernaryLinear:
    """A layer without latent weights that computes what ``layer`` does in evaluation."""
    codes, gamma = layer.ternary()
    bias = None if layer.bias is None else layer.bias.detach()
    return PackedTernaryLinear(
        codes,
        gamma,
        bias,
        sparsity=layer.sparsity,
    ).train(layer.training)
