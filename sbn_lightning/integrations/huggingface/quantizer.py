"""The quantisation method ``"sbn"`` for transformers: ternary N:M layers in any architecture.

There are three ways in:

* a folder with packed layers (``form="packed"``): 2 bits a weight, to run, and to train LoRA adapters on;
* a folder with latent weights and masks (``form="latent"``): ``Trainer`` trains it further;
* a dense folder, loaded with ``quantization_config=SBNConfig("2:4")``: its layers are converted after loading.

``save_pretrained`` writes the form that the model has. ``save_packed`` writes packed layers from either form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.formats.huggingface.sbn import METHOD, OPTIONS, VERSION, pack_codes, quantization_config
from sbn_lightning.integrations.folder import describe, sparse_layers
from sbn_lightning.integrations.huggingface.packed_linear import TernaryExperts2Bit, TernaryLinear2Bit
from sbn_lightning.integrations.pytorch import convert, convert_by_name
from sbn_lightning.layers.conv1d import is_conv1d
from sbn_lightning.layers.experts import (
    MASK_BUFFER,
    SCALE_PARAMETER,
    FusedWeight,
    fused_block,
    fused_shape,
    put_packed,
)
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.reversion import dtype_of, revert_layers
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear

Form = Literal["packed", "latent"]
SCALES = "learnable_scales"  # An option of training that changes which parameters a layer has.


class SBNConfig(QuantizationConfigMixin):
    """The sparse layers of a model and their options.

    Args:
        pattern: The pattern "N:M".
        activation_bits: The number of bits of activations: 8, 4, or None for no quantisation.
        include: Name patterns of the layers to convert, when a dense model is loaded.
        exclude: Name patterns of the layers to leave alone, when a dense model is loaded.
        form: ``"latent"`` for latent weights and masks, ``"packed"`` for 2-bit codes.
        modules: The sparse layers of a folder by name, each with the options in which it differs from the others.
        version: The version of the format.
        options: Further options of a layer: ``kind``, ``mask_source``, ``gradient``, ``gamma_over``, and
            ``learnable_scales`` with latent weights.

    Raises:
        DataError: If the folder was written by a later version of the format.
    """

    def __init__(
        self,
        pattern: str = "6:8",
        activation_bits: int | None = 8,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        form: Form = "latent",
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        version: int = VERSION,
        quant_method: str = METHOD,
        **options: Any,
    ) -> None:
        if version > VERSION:
            raise DataError(f"the folder has version {version} of the format {METHOD!r}; this program reads {VERSION}")
        if unknown := sorted(set(options) - {*OPTIONS, SCALES}):
            raise ConfigError(f"SBNConfig has no option {unknown[0]!r}; it has {', '.join((*OPTIONS, SCALES))}")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.pattern, self.activation_bits = str(pattern), activation_bits
        self.include, self.exclude = list(include), list(exclude)
        self.form, self.version = form, version
        self.modules = {name: dict(own) for name, own in (modules or {}).items()}
        self.options = options

    def of(self, name: str) -> dict[str, Any]:
        """Return the options of one layer."""
        return {"pattern": self.pattern, "activation_bits": self.activation_bits} | self.options | self.modules[name]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as ``config.json`` holds them."""
        values = {"pattern": self.pattern, "activation_bits": self.activation_bits, **self.options}
        values |= {"quant_method": METHOD, "version": self.version, "form": self.form, "modules": self.modules}
        return values if self.modules else values | {"include": self.include, "exclude": self.exclude}


class SBNQuantizer(HfQuantizer):
    """Loads, saves and trains models whose ``quant_method`` is ``"sbn"``."""

    quantization_config: SBNConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            return model
        config = self.quantization_config
        fused = {name: found for name in config.modules if (found := fused_block(model, name)) is not None}
        exact = {"gamma", "log_scale"}
        # The blocks change their classes, so every place is looked up before the first change.
        for name, (block, child) in fused.items():
            if config.form == "packed":
                put_packed(block, child, TernaryExperts2Bit.empty(block, child, name, config.of(name)))
            else:
                experts, rows, width = fused_shape(block, child)
                mask_bits = torch.empty(experts * rows, -(-width // 8), dtype=torch.uint8, device="meta")
                block.register_buffer(f"{child}{MASK_BUFFER}", mask_bits)
                if config.of(name).get(SCALES):
                    parts = experts * (2 if child == "gate_up_proj" else 1)
                    scale = nn.Parameter(torch.empty(parts, device="meta"))
                    block.register_parameter(f"{child}{SCALE_PARAMETER}", scale)
                    exact.add(f"{child}{SCALE_PARAMETER}")
        for name in config.modules.keys() - fused.keys():
            layer = _linear(model, name)
            if config.form == "packed":
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, TernaryLinear2Bit.empty(layer, name, config.of(name)))
            else:  # A mask and scales are loaded with the weight, and the layer is converted after that.
                shape, options = _shape_of(layer), config.of(name)
                mask_bits = torch.empty(shape[0], -(-shape[1] // 8), dtype=torch.uint8, device="meta")
                layer.register_buffer("mask_bits", mask_bits)
                if options.get(SCALES):
                    parts = len(options.get("split_sizes") or (shape[0],))
                    layer.register_parameter("log_scale", nn.Parameter(torch.empty(parts, device="meta")))
        # transformers casts floating-point tensors to the model's dtype; gamma and its factor have to stay exact.
        model._keep_in_fp32_modules_strict = set(model._keep_in_fp32_modules_strict or ()) | exact
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if not self.pre_quantized:
            if config.form == "packed":
                raise ConfigError("a dense model becomes form='latent'; train it, then call save_packed")
            convert(
                model,
                config.pattern,
                include=config.include,
                exclude=config.exclude,
                activation_bits=config.activation_bits,
                **config.options,
            )
            self.quantization_config = config_of(model, "latent")
            model.config.quantization_config = self.quantization_config
            _save_experts_fused(model)
            return model
        modules = dict(model.named_modules())
        latent = []
        for name in config.modules:
            layer = modules.get(name)
            if isinstance(layer, TernaryLinear2Bit | TernaryExperts2Bit):
                layer.finish()
            else:
                latent.append(name)
        _convert_with_masks(model, {name: config.of(name) for name in latent})
        _save_experts_fused(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Return packed tensors where the configuration asks for the packed form, and latent ones otherwise."""
        if self.quantization_config.form != "packed":
            return latent_state(model), {}
        return packed_state(model), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Return True: ``save_pretrained`` writes what ``from_pretrained`` reads."""
        return True

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Do what ``model.dequantize()`` promises. Without ``dtype``, plain layers get the dtype of the other weights.

        transformers would take the dtype of the configuration, which stays as it was when a model is cast.
        """
        return super().dequantize(model, dtype or dtype_of(model))

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Turn sparse layers into plain ones for ``model.dequantize()``, in place; see ``revert_linears``."""
        revert_layers(model, dtype)
        return model

    @property
    def is_trainable(self) -> bool:
        """Whether something of the model can be trained: latent weights, or adapters on packed ones."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the weights themselves can be trained."""
        return self.quantization_config.form == "latent"

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` works on the model."""
        return True


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # Registering twice, after a reload, is an error.
    register_quantization_config(METHOD)(SBNConfig)
    register_quantizer(METHOD)(SBNQuantizer)


def config_of(model: nn.Module, form: Form) -> SBNConfig:
    """Describe a model whose layers were converted.

    Raises:
        ConfigError: If no layer is sparse.
    """
    modules = {}
    for name, layer in sparse_layers(model).items():
        if form == "packed" and not isinstance(layer, SparseBitLinear | PackedTernaryLinear):
            raise ConfigError(f"{name} is sparse, but not ternary: it has no codes; save form='latent' instead")
        modules[name] = {option: value for option, value in describe(layer).items() if option in OPTIONS}
        if isinstance(layer, SparseBitLinear) and layer.learnable_scales:
            modules[name][SCALES] = True
        if form == "packed":  # The other options matter for training only.
            modules[name] = {key: modules[name][key] for key in ("pattern", "activation_bits", "split_sizes")}
        if modules[name].get("split_sizes") is None or fused_block(model, name) is not None:
            modules[name].pop("split_sizes", None)  # The parts of fused experts follow from their shape.
    if not modules:
        raise ConfigError(f"{type(model).__name__} has no sparse layer; call convert(model) first")
    return SBNConfig(**quantization_config(modules, form))


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a model whose sparse layers are all ternary, with these layers as 2-bit codes."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, layer in sparse_layers(model).items():
        if isinstance(layer, TernaryLinear2Bit | TernaryExperts2Bit):
            continue
        codes, gamma = layer.ternary()  # type: ignore[union-attr, operator]
        own = [key for key in state if key == name or (key.startswith(f"{name}.") and key != f"{name}.bias")]
        for key in own:
            del state[key]
        state[f"{name}.codes"], state[f"{name}.gamma"] = pack_codes(codes), gamma.float().clone()
    return state


def latent_state(model: nn.Module) -> dict[str, Tensor] | None:
    """Return the state dict of a model, with the names by which transformers loads masks and scales of fused experts.

    Returns:
        None if the model has no sparse fused experts: its own state dict will do.
    """
    names = [name for name, layer in sparse_layers(model).items() if isinstance(layer, FusedWeight)]
    if not names:
        return None
    state: dict[str, Tensor] = dict(model.state_dict())
    for ours, theirs in ((".mask_bits", MASK_BUFFER), (".log_scale", SCALE_PARAMETER)):
        state |= {f"{name}{theirs}": state.pop(name + ours) for name in names if name + ours in state}
    return state


def _save_experts_fused(model: Any) -> None:
    """Tell ``save_pretrained`` to leave sparse fused experts as they are.

    transformers remembers how it fused the tensors of a folder, and undoes this when it saves. Our codes and masks are
    those of fused weights.
    """
    if any(hasattr(layer, "experts") for layer in sparse_layers(model).values()):
        model._weight_conversions = []


def _linear(model: nn.Module, name: str) -> nn.Module:
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise DataError(f"config.json names the sparse layer {name}, {type(model).__name__} has not") from error
    if not isinstance(layer, nn.Linear) and not is_conv1d(layer):
        raise DataError(f"config.json names the sparse layer {name}, which is a {type(layer).__name__}")
    return layer


def _shape_of(layer: nn.Module) -> tuple[int, int]:
    """Return the output and input features of an ``nn.Linear`` or a ``Conv1D``."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.nf, layer.nx  # type: ignore[return-value]


def _convert_with_masks(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Convert layers whose weights were loaded, and keep the masks and scales that were loaded with the weights.

    Args:
        model: The model.
        layers: The options of each layer, by name.
    """
    fused = {name: found for name in layers if (found := fused_block(model, name)) is not None}
    masks, scales = {}, {}
    for name in layers:
        if name in fused:
            block, child = fused[name]
            masks[name] = block._buffers.pop(f"{child}{MASK_BUFFER}")
            if f"{child}{SCALE_PARAMETER}" in block._parameters:
                scales[name] = block._parameters.pop(f"{child}{SCALE_PARAMETER}")
        else:
            layer = model.get_submodule(name)
            masks[name] = layer._buffers.pop("mask_bits")
            if "log_scale" in layer._parameters:
                scales[name] = layer._parameters.pop("log_scale")
    convert_by_name(model, layers)
    for name, log_scale in scales.items():
        if getattr(log_scale, "_is_hf_initialized", False):  # Otherwise the folder has none, and they begin at zero.
            model.get_submodule(name)._parameters["log_scale"] = log_scale
    for name, mask_bits in masks.items():
        if not getattr(mask_bits, "_is_hf_initialized", False):
            continue
        if name in fused:
            block, child = fused[name]
            own = {f"{child}": block.get_submodule(child)._parameters["weight"], f"{child}.mask_bits": mask_bits}
            block.load_state_dict(own, strict=False)  # type: ignore[arg-type]
        else:
            layer = model.get_submodule(name)
            own = {key: value for key, value in layer._parameters.items() if value is not None}
            layer.load_state_dict(own | {"mask_bits": mask_bits})  # type: ignore[arg-type]
