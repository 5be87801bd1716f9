"""The linear layers of vLLM on 2-bit ternary weights: loading, tensor parallelism and the product.

With tensor parallelism a column-parallel layer (qkv, gate_up) gets whole tokens, and computes some rows of the weight.
A row-parallel layer (o, down) gets a slice of each token on each rank. The scale of a token is that of the whole token,
so the ranks first exchange one number a token. All ranks together then compute the integers that one rank would. Only
the order in which the ranks' outputs are added, in floating point, differs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import PackedvLLMParameter, PerTensorScaleParameter

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.formats.huggingface.sbn import unpack_codes
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.packed_op import run_packed
from sbn_lightning.sparsity.pattern import NMPattern
from sbn_lightning.sparsity.ternary import token_magnitude


def whole_magnitude(x: Tensor, bits: int | None, ranks: int) -> Tensor | None:
    """Return the magnitude of whole tokens, of which each rank has a slice of the same width.

    The exchange is vLLM's own all-gather of one number a token. vLLM has no maximum over ranks. Its all-gather works
    under ``torch.compile`` and in CUDA graphs.

    Args:
        x: This rank's slices, ``[tokens, features]``.
        bits: The number of bits of the quantised tokens; None if they are not quantised.
        ranks: The number of ranks that share a token.

    Returns:
        float32 ``[tokens, 1]``; None if each rank can do without it.
    """
    if bits is None or ranks == 1:
        return None
    of_all: Tensor = tensor_model_parallel_all_gather(token_magnitude(x, bits), dim=-1)
    return token_magnitude(of_all, bits)


def check_slice(own: int, whole: int, pattern: str, what: str = "input features") -> None:
    """Refuse a slice of a row that does not consist of whole groups and whole bytes.

    Args:
        own: The number of this rank's features.
        whole: The number of all ranks' features.
        pattern: The pattern "N:M".
        what: The name of the features, for the message.

    Raises:
        ConfigError: If the slice does not fit.
    """
    m = NMPattern.parse(pattern).m
    if own % m or (own % 4 and own != whole):
        raise ConfigError(
            f"a rank's {own} of {whole} {what} are not whole groups of {m} in whole bytes; use fewer ranks "
            "(--tensor-parallel-size)"
        )


class PartScales(PerTensorScaleParameter):  # type: ignore[misc]
    """One gamma for each part of a fused layer. The folder stores the parts one by one, or fused, as Phi-3 does."""

    def _load_into_shard_id(self, loaded_weight: Tensor, shard_id: str | int, **kwargs: Any) -> None:
        index = self._shard_id_as_int(shard_id)
        if loaded_weight.numel() == self.data.numel():  # vLLM hands over all gammas once for each part.
            loaded_weight = loaded_weight.flatten()[index]
        self.data[index].copy_(loaded_weight.reshape(()))


@register_weight_loader_v2_supported_method
class SBNLinearMethod(LinearMethodBase):
    """Load and compute one linear layer.

    Args:
        pattern: The pattern "N:M".
        activation_bits: The number of bits of activations, or None.
        split_sizes: The rows of each part, for a layer that the folder stores fused.
    """

    def __init__(self, pattern: str, activation_bits: int | None, split_sizes: list[int] | None = None) -> None:
        self.pattern, self.activation_bits, self.split_sizes = pattern, activation_bits, split_sizes

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Make room for this rank's 2-bit codes and one gamma for each part.

        Raises:
            ConfigError: If this rank's share of a row does not consist of whole groups and whole bytes, or the folder
                has other parts than vLLM.
        """
        if self.split_sizes is not None and len(self.split_sizes) != len(output_partition_sizes):
            raise ConfigError(
                f"a fused layer of {output_size} rows has {len(self.split_sizes)} parts in the folder and "
                f"{len(output_partition_sizes)} in vLLM"
            )
        check_slice(input_size_per_partition, input_size, self.pattern)
        loader = extra.get("weight_loader")
        rows, width = sum(output_partition_sizes), -(-input_size_per_partition // 4)
        codes = torch.empty(rows, width, dtype=torch.uint8)
        gamma = torch.empty(len(output_partition_sizes), dtype=torch.float32)
        layer.register_parameter(
            "codes",
            PackedvLLMParameter(
                data=codes, input_dim=1, output_dim=0, packed_dim=1, packed_factor=4, weight_loader=loader
            ),
        )
        layer.register_parameter("gamma", PartScales(data=gamma, weight_loader=loader))
        layer.sbn_shape = (input_size_per_partition, tuple(output_partition_sizes))  # type: ignore[assignment]
        layer.sbn_ranks = input_size // input_size_per_partition  # type: ignore[assignment]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Turn the loaded codes into a packed layer, and choose its kernel before vLLM compiles or captures a graph."""
        in_features, rows = layer.sbn_shape  # type: ignore[misc]
        ternary = PackedTernaryLinear(
            unpack_codes(layer.codes.data, in_features),  # type: ignore[arg-type, union-attr]
            layer.gamma.data.float(),  # type: ignore[union-attr, operator, arg-type]
            pattern=self.pattern,
            split_sizes=rows if len(rows) > 1 else None,
            activation_bits=self.activation_bits,
        )
        ternary._settle()
        del layer.codes, layer.gamma
        layer.ternary = ternary

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [..., in_features]`` -> ``[..., out_features]``."""
        whole = whole_magnitude(x, self.activation_bits, layer.sbn_ranks)  # type: ignore[arg-type]
        y = run_packed(layer.ternary, x, whole)  # type: ignore[arg-type]
        return y if bias is None else y + bias.to(y.dtype)
