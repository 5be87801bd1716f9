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

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.sparse_linear import SparseBitLinear
from sbn_lightning.sparsity.pattern import NMPattern, nonzeros_per_group
from sbn_lightning.sparsity.ternary import TernaryLinearFunction, expand_scale, quantize_activations

InferenceBackend = Literal["reference", "kernels", "int8", "auto"]
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class PackedTernaryLinear(nn.Module):
    """``y = (x8 @ T^T) * s * gamma (+ bias)`` from ternary codes and gamma alone.

    Args:
        codes: int8 ``[out_features, in_features]`` in {-1, 0, 1}.
        gamma: Weight scale of each part, float32 ``[parts]``.
        bias: ``[out_features]`` or None.
        pattern: The pattern the weight was trained with.
        split_sizes: Rows of each part of a fused weight; None: one part.
        activation_bits: 8, 4, or None to leave activations as they are.

    Attributes:
        backend: ``"reference"``: plain PyTorch, any device. ``"kernels"``: packed weights and the kernels of
            ``sbn_kernels``, on sparse tensor cores where device and pattern allow; an error where no kernel can run.
            ``"int8"``: the same on dense tensor cores. ``"auto"`` (the default): as ``"kernels"`` on a GPU that has
            them, for activations of 8 or 4 bits; the reference elsewhere.

    Shape:
        x ``[..., in_features]`` -> y ``[..., out_features]`` in the dtype of x, or autocast's where autocast is on.
    """

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
        pattern: NMPattern | str,
        split_sizes: tuple[int, ...] | None = None,
        activation_bits: int | None = 8,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.pattern = NMPattern.parse(pattern)
        self.split_sizes = split_sizes
        self.activation_bits = activation_bits
        self.backend: InferenceBackend = "auto"
        self.register_buffer("codes", codes)
        self.register_buffer("gamma", gamma)
        self.register_buffer("row_scale", expand_scale(gamma, split_sizes, self.out_features).clone(), persistent=False)
        self.register_buffer("bias", bias)
        self._packed: Tensor | None = None  # what the kernels read; None: the reference
        self._layout = "none"
        self._on_hopper = False
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
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if self._settled_for != (self.backend, self.codes.device):
            self._settle()
        with torch.autocast(device, enabled=False):
            wants_gradient = torch.is_grad_enabled() and x.requires_grad  # which kernels have not
            by_kernels = self._packed is not None and x.dtype in KERNEL_DTYPES and not wants_gradient
            y = self._by_kernels(x) if by_kernels else self._by_reference(x)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def _by_reference(self, x: Tensor) -> Tensor:
        # The second argument tells a backward pass the dtype of a latent weight's gradient; there is none here.
        y: Tensor = TernaryLinearFunction.apply(x, self.gamma, self.codes, self.row_scale, None, self.activation_bits)
        return y

    def _by_kernels(self, x: Tensor) -> Tensor:
        import sbn_kernels
        from sbn_kernels.decode.gemv import MAX_TOKENS

        from sbn_lightning.backends.integer import multiply

        assert self.activation_bits is not None
        tokens = x.reshape(-1, self.in_features)
        if torch.compiler.is_compiling():  # plain PyTorch, for the compiler to fuse
            x8, scale = quantize_activations(tokens, self.activation_bits)
            scale = scale.squeeze(-1)
        else:
            x8, scale = sbn_kernels.quantize_tokens(tokens, self.activation_bits)
        # Elsewhere than on Hopper the packed words are for few tokens only.
        packed = self._packed if self._on_hopper or len(tokens) <= MAX_TOKENS else None
        y = multiply(x8, scale, self.codes, self.row_scale, packed, self._layout, x.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _settle(self) -> None:
        """Decides between kernels and reference, and packs the weight for the kernels of its device."""
        reason = None if self.backend == "reference" else self._why_no_kernels()
        if reason and self.backend != "auto":
            raise ConfigError(
                f"backend={self.backend!r} cannot run a packed layer here: {reason}; use 'auto' or 'reference'"
            )
        self._packed, self._layout = None, "none"
        if self.backend != "reference" and reason is None:
            from sbn_kernels import capabilities, pack_dense, pack_sparse24

            can = capabilities(self.codes.device)
            self._on_hopper = can.can("ternary_gemm")
            sparse = self.backend != "int8" and can.can("sparse_gemm") and self._fits_24()
            self._layout = "sparse24" if sparse else "dense"
            self._packed = pack_sparse24(self.codes, self.mask) if sparse else pack_dense(self.codes)
        self._settled_for = (self.backend, self.codes.device)

    def _fits_24(self) -> bool:
        return self.in_features % 4 == 0 and int(nonzeros_per_group(self.codes, 4).max()) <= 2

    def _why_no_kernels(self) -> str | None:
        if self.activation_bits is None:
            return "activation_bits is null, and the kernels multiply integers"
        from sbn_kernels.runtime.capability import capabilities, interpreting

        if not (self.codes.is_cuda or interpreting() or not torch.cuda.is_available()):
            return f"the layer is on the {self.codes.device.type}"
        return capabilities(self.codes.device).reasons.get("decode")

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
        pattern=layer.pattern,
        split_sizes=layer.split_sizes,
        activation_bits=layer.activation_bits,
    ).train(layer.training)
