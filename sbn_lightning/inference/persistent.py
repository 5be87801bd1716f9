"""Connect a model of ours to the persistent decode step of the kernels.

The kernel (:mod:`sbn_kernels.decode.step`) takes plain tensors and knows no modules. This file says whether a model can
use the kernel, collects the tensors of the model, and makes the step on the caches of a decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.inference.head import Int8Head
from sbn_lightning.models.config import FAMILY_OPTION, TransformerConfig
from sbn_lightning.models.mlp import GatedMLP
from sbn_lightning.models.transformer import TernaryTransformer

if TYPE_CHECKING:
    from sbn_kernels.decode.step import DecodeStep, Layer, Shape, Ternary, Weights


def shape_of(config: TransformerConfig) -> Shape:
    """The shape of a model, as the kernel wants it."""
    from sbn_kernels.decode.step import Shape

    return Shape(
        config.n_layers,
        config.d_model,
        config.d_ffn,
        config.n_heads,
        config.n_kv_heads,
        config.head_size,
        config.vocab_size,
        config.norm_eps,
    )


def refusal(model: TernaryTransformer, batch_size: int) -> str | None:
    """Say in one line why the persistent step cannot continue ``batch_size`` sequences of a model; None if it can."""
    from sbn_kernels.decode.step import supports

    config = model.config
    if not isinstance(model.lm_head, torch.nn.Linear | Int8Head):
        return f"does not know a head of the type {type(model.lm_head).__name__}"
    reason = outside_of_the_family(model)
    if reason is not None:
        return reason
    return supports(shape_of(config), batch_size, model.embed.weight.device, config.activation_bits)


def outside_of_the_family(model: TernaryTransformer) -> str | None:
    """Say in one line why a model is none of ternary layers alone, computed as Qwen2.5 and Llama are; None if it is."""
    config = model.config
    if config.linear != "ternary":
        return f"needs ternary layers, not linear={config.linear!r}"
    if config.layers:
        return "needs every layer to be ternary, and model.config.layers has rules"
    # The kernels know Qwen2.5 and Llama. The size of a head is part of the shape, which the kernel checks itself.
    for option in dataclasses.fields(config):
        value = getattr(config, option.name)
        if option.metadata == FAMILY_OPTION and option.name != "head_dim" and value != option.default:
            return f"does not compute {option.name}={value!r}"
    if not all(isinstance(block.mlp, GatedMLP) for block in model.blocks):
        return "computes one feed-forward layer a block, and no experts"
    return None


def _ternary(layer: Any) -> Ternary:
    """The codes and scales of a layer with latent weights, or of a layer that was loaded packed."""
    from sbn_kernels.decode.step import Ternary

    if hasattr(layer, "prepare"):
        weight = layer._whole()
        return Ternary(weight.codes, weight.row_scale, layer.bias)
    return Ternary(layer.codes, layer.row_scale, layer.bias)


def _layers(model: TernaryTransformer) -> Iterator[Layer]:
    from sbn_kernels.decode.step import Layer

    block: Any
    for block in model.blocks:
        yield Layer(
            block.attention_norm.weight,
            _ternary(block.attention.qkv),
            _ternary(block.attention.o),
            block.mlp_norm.weight,
            _ternary(block.mlp.gate_up),
            _ternary(block.mlp.down),
        )


@torch.no_grad()
def gather_weights(model: TernaryTransformer) -> Weights:
    """Collect the tensors of a model with ternary layers; the layers are prepared one by one as they are read."""
    from sbn_kernels.decode.step import Weights

    head: Any = model.lm_head
    weight, scale = (head.codes, head.scale) if isinstance(head, Int8Head) else (head.weight, None)
    return Weights(
        shape_of(model.config),
        _layers(model),
        model.norm.weight,
        model.embed.weight,
        weight,
        model.cos,
        model.sin,
        scale,
    )


def persistent_step(
    model: TernaryTransformer,
    caches: Sequence[tuple[Tensor, Tensor]],
    max_length: int,
    lengths: Tensor,
) -> DecodeStep:
    """Pack a model's weights and make the step on a decoder's caches. The decoder captures the step in a CUDA graph.

    Args:
        model: The model. Changes of its weights after this call do not reach the step.
        caches: The keys and values of each layer, ``[B, K, slots, E]``.
        max_length: The number of tokens that a sequence can have.
        lengths: The number of tokens of each sequence, int64 ``[B]``. The step counts up in place.

    Raises:
        ConfigError: If the model computes in another dtype than bfloat16, or the device refuses the launch.
    """
    from sbn_kernels.decode.step import DecodeStep, StepUnavailableError, pack

    dtype = caches[0][0].dtype
    if dtype != torch.bfloat16:
        raise ConfigError(
            f'step="persistent" computes in bfloat16, and this model\'s keys and values are {dtype}: cast the model to '
            'bfloat16, or use step="graph"'
        )
    try:
        return DecodeStep(pack(gather_weights(model)), caches, max_length, lengths=lengths, cuda_graph=False)
    except StepUnavailableError as error:
        raise ConfigError(f'step="persistent" cannot be used: {error}; use step="graph"') from error
