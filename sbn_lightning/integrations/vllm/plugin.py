"""What vLLM finds: the quantisation method ``"sbn"`` and the function that makes it known."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.formats.huggingface.sbn import METHOD, VERSION
from sbn_lightning.integrations.vllm.experts import DOWN, GATE_UP, SBNExpertsMethod
from sbn_lightning.integrations.vllm.linear import SBNLinearMethod

# The parts of vLLM's fused layers, for models that do not name the parts themselves.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Blocks that vLLM names differently from transformers 5: Mixtral's. vLLM's name -> the name in the folder.
RENAMED_BLOCKS = {".block_sparse_moe": ".mlp"}


class SBNConfig(QuantizationConfig):
    """Tell vLLM which layers of a folder are ternary.

    Args:
        modules: The options of each ternary layer, by its name in the folder.
    """

    def __init__(self, modules: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.modules = modules
        self._renamed: dict[str, str] = {}  # Parts of names in the folder, and what vLLM calls them.

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
            ConfigError: If the parts of a fused layer differ, or the layer is of a kind that is not served.
        """
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            if any(name.startswith(f"{prefix}.") for name in self.modules):
                raise ConfigError(f"{prefix} is a {type(layer).__name__}, which is not served with ternary weights")
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

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> SBNExpertsMethod | None:
        """Return the method of fused experts; None if the folder holds them dense."""
        in_folder = prefix
        for theirs, ours in RENAMED_BLOCKS.items():
            if theirs in prefix:
                in_folder = prefix.replace(theirs, ours)
                self._renamed[f"{ours}."] = f"{theirs}."
        up, down = (self.modules.get(f"{in_folder}.{name}") for name in (GATE_UP, DOWN))
        if up != down:
            raise ConfigError(f"{GATE_UP} and {DOWN} of {in_folder} differ, and vLLM computes them as one layer")
        return None if up is None else SBNExpertsMethod(layer.moe_config, prefix, **up)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:  # type: ignore[override]
        """Return the names of the folder's tensors that vLLM has other names for."""
        return WeightsMapper(orig_to_new_substr=self._renamed)


def register() -> None:
    """Make the method known to vLLM; called by vLLM in each of its processes."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(SBNConfig)
