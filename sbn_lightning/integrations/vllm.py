"""A vLLM plugin: ``vllm serve FOLDER`` for a Hugging Face folder with 2-bit ternary weights.

The user has no option to set. vLLM finds :func:`register` by the entry point ``vllm.general_plugins``, and
:class:`SBNConfig` by ``quant_method: "sbn"`` in ``config.json``. vLLM fuses q, k and v into one layer, and gate and up
into another. The 2-bit codes of the parts are loaded into slices of one tensor, and gamma has one entry for each part,
as in a fused layer of this project. After loading, each layer becomes a :class:`PackedTernaryLinear`, which takes its
kernels from the registry that the whole project uses. vLLM calls the layer as one operator
(:mod:`sbn_lightning.layers.packed_op`), which ``torch.compile`` and CUDA graphs take as it is.

With tensor parallelism, a column-parallel layer (qkv, gate_up) computes exactly what one process would. A row-parallel
layer (o, down) sees a slice of each token, and quantises the slice by the slice's own maximum. The result is as
accurate as on one process, but differs in its rounding.

vLLM is imported with this file, and nothing else in this project imports this file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.parameter import PackedvLLMParameter, PerTensorScaleParameter

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.formats.huggingface.sbn import METHOD, VERSION, unpack_codes
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.packed_op import run_packed

# The parts of vLLM's fused layers, for models that do not name the parts themselves.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class SBNConfig(QuantizationConfig):
    """Tell vLLM which layers of a folder are ternary.

    Args:
        modules: The options of each ternary layer, by its name in the folder.
    """

    def __init__(self, modules: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.modules = modules

    def __repr__(self) -> str:
        return f"SBNConfig({len(self.modules)} ternary layers)"

    @classmethod
    def get_name(cls) -> str:
        """Return the name of the method."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes that activations may have."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest compute capability that our portable kernels run on: 80, for sm_80."""
        return 80

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """Return an empty list, because ``config.json`` holds everything."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SBNConfig:
        """Read ``quantization_config``.

        Raises:
            ConfigError: If the folder was written by a later version, or does not hold packed weights.
        """
        if config.get("version", VERSION) > VERSION:
            raise ConfigError(f"the folder has version {config['version']} of {METHOD!r}, this plugin reads {VERSION}")
        if config.get("form") != "packed":
            raise ConfigError("vLLM serves packed weights, and this folder holds latent ones: write it by save_packed")
        common = {"pattern": config["pattern"], "activation_bits": config.get("activation_bits", 8)}
        return cls({name: common | own for name, own in config["modules"].items()})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Return the method that computes a layer: ours for a ternary layer, vLLM's own for another linear layer.

        Args:
            layer: The layer of vLLM.
            prefix: The name of the layer in the model.

        Returns:
            The method; None for a layer that is not linear.

        Raises:
            ConfigError: If the parts of a fused layer differ, or the layer holds fused experts.
        """
        if not isinstance(layer, LinearBase):
            if any(name.startswith(f"{prefix}.") for name in self.modules):
                raise ConfigError(f"{prefix} holds the fused experts of a {type(layer).__name__}, which are not served")
            return None
        if (fused := self.modules.get(prefix)) is not None:
            return SBNLinearMethod(**fused)
        parent, _, last = prefix.rpartition(".")
        parts = (self.packed_modules_mapping or {}).get(last) or FUSED.get(last, (last,))
        found = [self.modules.get(f"{parent}.{part}") for part in parts]
        options = [one for one in found if one is not None]
        if not options:
            return UnquantizedLinearMethod()
        if len(options) < len(parts) or any(one != options[0] for one in options):
            raise ConfigError(f"the parts {', '.join(parts)} of {prefix} differ, and vLLM computes them as one layer")
        return SBNLinearMethod(**options[0])


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
        m = int(self.pattern.split(":")[1])
        if input_size_per_partition % m or (input_size_per_partition % 4 and input_size_per_partition != input_size):
            raise ConfigError(
                f"a rank's {input_size_per_partition} of {input_size} input features are not whole groups of {m} in "
                "whole bytes; use fewer ranks (--tensor-parallel-size)"
            )
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
        y = run_packed(layer.ternary, x)  # type: ignore[arg-type]
        return y if bias is None else y + bias.to(y.dtype)


def register() -> None:
    """Make the method known to vLLM; called by vLLM in each of its processes."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(SBNConfig)
