"""torchao's convention: ``quantize_(model, TernarySparseConfig("2:4"))``, in two steps.

``step="prepare"`` turns linear layers into trainable ones (:class:`SparseBitLinear`); train as usual. Then
``step="convert"`` turns these into packed layers to run (:class:`PackedTernaryLinear`). This is how torchao's own
``QATConfig`` works. torchao passes a layer without its name, so layers to leave alone are named by a filter::

    quantize_(model, TernarySparseConfig("2:4"), filter_fn=linear_except("lm_head"))

torchao is imported with this file, and nothing else in this project imports this file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.integrations.pytorch import convert_by_name
from sbn_lightning.layers.candidates import name_matches
from sbn_lightning.layers.packed import pack_layers
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear


@dataclass
class TernarySparseConfig(AOBaseConfig):
    """Ternary N:M linear layers, for ``torchao.quantization.quantize_``.

    Args:
        pattern: The pattern "N:M".
        step: ``"prepare"`` for layers to train, ``"convert"`` for packed layers to run.
        activation_bits: The number of bits of activations: 8, 4, or None for no quantisation.
        gradient: The straight-through gradient, for all positions (``"dense"``) or kept ones only (``"masked"``).

    Raises:
        ConfigError: If ``step`` is neither.
    """

    pattern: str = "6:8"
    step: Literal["prepare", "convert"] = "prepare"
    activation_bits: int | None = 8
    gradient: Literal["dense", "masked"] = "dense"

    def __post_init__(self) -> None:
        if self.step not in ("prepare", "convert"):
            raise ConfigError(f"TernarySparseConfig: step={self.step!r} is not 'prepare' or 'convert'")


def linear_except(*patterns: str) -> Callable[[nn.Module, str], bool]:
    """Return a ``filter_fn`` that takes linear layers, except those whose name matches one of ``patterns``."""

    def wanted(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not name_matches(name, patterns)

    return wanted


@register_quantize_module_handler(TernarySparseConfig)  # type: ignore[untyped-decorator]
def _transform(module: nn.Module, config: TernarySparseConfig) -> nn.Module:
    holder = nn.Module()
    holder.layer = module
    if config.step == "convert":
        return pack_layers(holder).get_submodule("layer") if isinstance(module, SparseBitLinear) else module
    if type(module) is nn.Linear:
        options = {"pattern": config.pattern, "activation_bits": config.activation_bits, "gradient": config.gradient}
        convert_by_name(holder, {"layer": options})
    return module
