"""A ternary linear layer without a latent weight, for models that are run and not trained.

The layer has two paths. The reference path makes the same calls as :class:`SparseBitLinear` in evaluation, so its
output has the same bits. The kernel path packs the weight at 2 bits for each weight and never unpacks it, so prefill
and decode share one copy. The layer chooses its path before its first forward on a device, outside of any compiled
graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.instance_forward import carry_hooks, why_class_stays
from sbn_lightning.layers.options import check_tokens, config_option, result_dtype
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern, nonzeros_per_group
from sbn_lightning.sparsity.ternary import expand_scale, ternary_linear

InferenceBackend = Literal["reference", "kernels", "int8", "auto", "grouped"]
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class PackedTernaryLinear(nn.Module):
    """``y = (x8 @ T^T) * s * gamma (+ bias)`` from ternary codes and gamma alone.

    Args:
        codes: The ternary codes in {-1, 0, 1}, int8 ``[out_features, in_features]``.
        gamma: The weight scale of each part, float32 ``[parts]``.
        bias: The bias, ``[out_features]``, or None.
        sparsity: The options that the weight was trained with: a :class:`SparsityConfig`, or only a pattern.
        **options: Single fields of :class:`SparsityConfig`.

    Attributes:
        backend: What computes the product. ``"reference"`` is plain PyTorch on any device. ``"kernels"`` takes packed
            weights and the kernels of ``sbn_kernels``, on sparse tensor cores where device and pattern allow, and
            raises an error where no kernel can run. ``"int8"`` takes the kernels for dense tensor cores. ``"auto"``
            (the default) takes kernels if the GPU has them and tokens have 8 or 4 bits, and otherwise the reference.
            ``"grouped"`` is ``"kernels"``, except in layers of experts, which take one launch for all experts.
        plain_class: The class of the plain layer that a reversion makes: ``nn.Linear``, or ``Conv1D`` of transformers.

    Shape:
        x ``[..., in_features]`` -> y ``[..., out_features]`` in the dtype of x, or autocast's where autocast is on.
    """

    pattern: NMPattern = config_option("pattern")
    split_sizes: tuple[int, ...] | None = config_option("split_sizes")
    activation_bits: int | None = config_option("activation_bits")
    plain_class: type[nn.Module] = nn.Linear
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
        # The weight in the form that the kernel reads. None if the kernel reads the codes, or there is no kernel.
        self._packed: Tensor | None = None
        self._layout = "none"  # The form of the packed weight.
        self._kernel: str | None = None  # The kernel for many tokens; None for the reference.
        self._settled_for: tuple[object, ...] | None = None

    def ternary(self) -> tuple[Tensor, Tensor]:
        """Return the codes, int8 ``[out_features, in_features]``, and gamma of each part, float32 ``[parts]``."""
        return self.codes, self.gamma

    def effective_weight(self) -> Tensor:
        """The effective weight ``gamma * T``, float32 ``[out_features, in_features]``."""
        return self.codes * self.row_scale.unsqueeze(-1)

    @property
    def mask(self) -> Tensor:
        """The positions of the weights that are not zero, bool ``[out_features, in_features]``."""
        return self.codes != 0

    def forward(self, x: Tensor) -> Tensor:
        check_tokens(x, f"PackedTernaryLinear({self.in_features}, {self.out_features})")
        dtype = result_dtype(x)
        if self._settled_for != (self.backend, self.codes.device):
            self._settle()
        with torch.autocast(x.device.type, enabled=False):
            wants_gradient = torch.is_grad_enabled() and x.requires_grad  # The kernels have no backward.
            by_kernels = self._kernel is not None and x.dtype in KERNEL_DTYPES and not wants_gradient
            y = self._by_kernels(x, dtype) if by_kernels else self._by_reference(x, dtype)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def _by_reference(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        # The second argument is for the latent weight, of which only the dtype is read. This layer has none.
        return ternary_linear(x, self.gamma, self.codes, self.row_scale, None, self.activation_bits, dtype)

    def _by_kernels(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        from sbn_lightning.backends.products import multiply, quantize

        assert self.activation_bits is not None
        assert self._kernel is not None
        x8, scale = quantize(x.reshape(-1, self.in_features), self.activation_bits)
        y = multiply(x8, scale, self.codes, self.row_scale, self._packed, self._layout, self._kernel, dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _settle(self) -> None:
        """Choose a kernel or the reference, and pack the weight for the kernel."""
        self._packed, self._layout, self._kernel = None, "none", None
        if self.backend != "reference":
            from sbn_lightning.backends.selection import choose_packed, pack_for

            n, m = self._held_pattern()
            choice = choose_packed(
                self.in_features, self.out_features, n, m, self.activation_bits, self.backend, self.codes.device
            )
            self._kernel = choice.kernel
            if choice.kernel is not None:
                self._packed, self._layout = pack_for(choice.kernel, self.codes)
        self._settled_for = (self.backend, self.codes.device)

    def _held_pattern(self) -> tuple[int, int]:
        """N and M that the codes keep to: 2:4 where it fits, or else the pattern, or else M:M (within a ramp)."""
        if self.in_features % 4 == 0 and int(nonzeros_per_group(self.codes, 4).max()) <= 2:
            return 2, 4
        n, m = self.pattern.n, self.pattern.m
        return (n, m) if n == m or int(nonzeros_per_group(self.codes, m).max()) <= n else (m, m)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedTernaryLinear:
        """Move all tensors to another device. A cast to another dtype leaves gamma in float32."""
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
    """Replace every :class:`SparseBitLinear` of a model by a :class:`PackedTernaryLinear`, in place.

    Latent weights are dropped, so a weight takes 1 byte in place of 4. With kernels it takes a quarter of a byte more.

    Args:
        model: Any model.
        backend: The backend of the new layers; see :class:`PackedTernaryLinear`.

    Returns:
        ``model``.

    Raises:
        ConfigError: If the ``forward`` of a layer was replaced, or its weights are offloaded. The model is unchanged
            then.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseBitLinear)}
    for name, layer in layers.items():
        if (reason := why_class_stays(layer)) is not None:
            raise ConfigError(f"{name} cannot be packed: {reason}")
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        packed = packed_layer(layer)
        packed.backend = backend
        carry_hooks(layer, packed)
        setattr(model.get_submodule(parent), child, packed)
    return model


@singledispatch
def packed_layer(layer: SparseBitLinear) -> PackedTernaryLinear:
    """Make a layer without latent weights that computes what ``layer`` computes in evaluation.

    A subclass whose forward differs registers a function of its own.
    """
    codes, gamma = layer.ternary()
    bias = None if layer.bias is None else layer.bias.detach()
    packed = PackedTernaryLinear(codes, gamma, bias, sparsity=layer.sparsity).train(layer.training)
    packed.plain_class = vars(layer).get("converted_from", nn.Linear)
    return packed
