"""Write a GGUF file for llama.cpp: ternary tensors as TQ2_0, TQ1_0, Q2_0 or Q4_0.

The format gives each tensor a type of its own. A layer whose width the chosen type does not divide gets Q4_0, and the
other layers keep the chosen type; :mod:`~sbn_lightning.formats.gguf.blocks` has the layouts.

The options of a model decide its architecture in llama.cpp (:func:`~sbn_lightning.models.families.registry.gguf_of`).
For some architectures the rows of q and k are reordered, because llama.cpp's rotary positions pair neighbouring rows of
a head there. Linear and YaRN positions are written as metadata. The positions of Llama 3.1 to 3.3 are written as
``rope_freqs.weight``, one divisor for each frequency. llama.cpp quantises activations by block and not by token, so its
logits are close to ours and not equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.core.install import how_to_install
from sbn_lightning.formats.gguf.blocks import BLOCKS, FALLBACK, TYPES, blocks, type_for
from sbn_lightning.formats.gguf.names import EXPERTS, NAMES, ROPE_DIVISORS, ROUTER, block_norms, interleave_halves
from sbn_lightning.formats.gguf.tokenizer import add_tokenizer, check_tokenizer
from sbn_lightning.formats.huggingface.names import Part, fused_name, linear_parts
from sbn_lightning.formats.huggingface.write import check_ternary
from sbn_lightning.formats.packed import in_16_bits, ternary_layers
from sbn_lightning.formats.sizes import Sizes
from sbn_lightning.models.families.registry import gguf_of
from sbn_lightning.models.rope import rope_frequencies, rope_stretch
from sbn_lightning.models.rope_scaling import yarn_magnitude

if TYPE_CHECKING:
    from sbn_lightning.formats.loaded import LoadedModel
    from sbn_lightning.models.config import TransformerConfig
    from sbn_lightning.models.rope_scaling import RopeScaling

SMALLEST_NORMAL_HALF = 2.0**-14

__all__ = ["check_gguf", "interleave_halves", "write_gguf"]


def write_gguf(loaded: LoadedModel, folder: Path, quantization: str, embedding_bits: int = 16) -> str:
    """Write ``model-QUANTIZATION.gguf``.

    Args:
        loaded: A ternary model and its text files.
        folder: The folder to write to.
        quantization: The type of ternary tensors, where their widths fit it; a key of ``TYPES``.
        embedding_bits: Bits for each weight of embedding and head: 8 (Q8_0), 16 (bfloat16 where the model holds more
            bits) or 32 (as in the model).

    Returns:
        What was written, for the user.

    Raises:
        ConfigError: If the format cannot hold the model or its tokenizer; the message names the layer or the feature.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            f"writing GGUF needs the package gguf: {how_to_install('export')}, or pip install gguf"
        ) from error
    check_gguf(loaded, quantization)
    config = loaded.config
    architecture = gguf_of(config)
    target = folder / f"model-{quantization}.gguf"
    sizes = Sizes()
    writer = gguf.GGUFWriter(target, architecture.name)
    _add_config(writer, config, TYPES[quantization].file_type)
    add_tokenizer(writer, loaded.text, config.vocab_size)
    _add_other_tensors(writer, loaded, embedding_bits, sizes)
    layers = ternary_layers(loaded.model)
    others: dict[str, int] = {}  # Width -> number of tensors that got the fallback type.
    for part in tqdm(list(linear_parts(config)), desc="quantising", unit="layer", disable=None):
        layer = layers[part.ours]
        codes, gamma = layer.ternary()
        rows = part.rows or (layer.out_features,)
        biases = (None,) * len(rows) if layer.bias is None else layer.bias.detach().split(rows)
        kind = type_for(layer.in_features, quantization)
        assert kind is not None  # check_gguf has refused a width that no type fits.
        if kind != quantization:
            others[str(layer.in_features)] = others.get(str(layer.in_features), 0) + len(rows)
        if fused_name(part) is not None:
            _add_experts(writer, part, codes, gamma, kind, sizes)
            continue
        for name, piece, scale, bias in zip(part.theirs, codes.split(rows), gamma, biases, strict=True):
            i, module = name.split(".")[2], name.rsplit(".", 1)[1]
            if architecture.alternates_halves and module in ("q_proj", "k_proj"):
                piece = interleave_halves(piece, config.head_size)
                bias = None if bias is None else interleave_halves(bias, config.head_size)
            data = blocks(piece, scale, kind)
            # The data are passed as int8, so that the writer takes the shape that is given. An older gguf package may
            # not know the type.
            writer.add_tensor(
                f"blk.{i}.{NAMES[module]}.weight",
                data.view(np.int8),
                raw_shape=tuple(piece.shape),
                raw_dtype=cast(Any, TYPES[kind].id),
            )
            sizes.add(f"ternary layers, {kind}", piece.numel(), data.nbytes)
            if bias is not None:
                writer.add_tensor(f"blk.{i}.{NAMES[module]}.bias", bias.float().numpy())
                sizes.add("norms and biases", bias.numel(), 4 * bias.numel())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (
        f"architecture {architecture.name}, {quantization}, {target.stat().st_size / 1e6:.2f} MB in {target.name}\n"
        f"{sizes.table()}{_note(others, quantization)}"
    )


def _add_experts(writer: Any, part: Part, codes: Tensor, gamma: Tensor, kind: str, sizes: Sizes) -> None:
    """Add the weights of a block's experts: one tensor ``[experts, out, in]`` for gate, up and down each."""
    _, block, _, layer = part.ours.split(".")
    assert part.rows is not None
    scaled = list(zip(codes.split(part.rows), gamma, strict=True))
    for j, name in enumerate(names := EXPERTS[layer]):
        experts = scaled[j :: len(names)]
        data = np.stack([blocks(piece, scale, kind) for piece, scale in experts])
        writer.add_tensor(
            f"blk.{block}.{name}.weight",
            data.view(np.int8),
            raw_shape=(len(experts), *experts[0][0].shape),
            raw_dtype=cast(Any, TYPES[kind].id),
        )
        sizes.add(f"ternary layers, {kind}", sum(piece.numel() for piece, _ in experts), data.nbytes)


def _note(others: dict[str, int], quantization: str) -> str:
    """Say which widths got the fallback type, and which type would fit them."""
    if not others:
        return ""
    told = ", ".join(f"{count} tensors of width {width}" for width, count in others.items())
    would = [
        name
        for name, kind in TYPES.items()
        if name not in (quantization, FALLBACK) and all(int(width) % kind.weights == 0 for width in others)
    ]
    hint = f"; --quantization {would[0]} fits them at {TYPES[would[0]].bits:g} bits" if would else ""
    return (
        f"\nnote: {told} are {FALLBACK}, because the blocks of {quantization} hold {TYPES[quantization].weights} "
        f"weights of a row{hint}"
    )


def check_gguf(loaded: LoadedModel, quantization: str) -> None:
    """Check a model before anything is written.

    Args:
        loaded: The model and its text files.
        quantization: The type of ternary tensors.

    Raises:
        ConfigError: If the format cannot hold the model or its tokenizer.
    """
    check_ternary(loaded, "gguf")
    gguf_of(loaded.config)
    layers = ternary_layers(loaded.model)
    for name, layer in layers.items():
        if type_for(layer.in_features, quantization) is None:
            shortest = TYPES[FALLBACK].weights
            fitting = -(-layer.in_features // shortest) * shortest
            raise ConfigError(
                f"{name}: in_features={layer.in_features} fits no ternary type of GGUF: their blocks are of "
                f"{', '.join(map(str, BLOCKS.values()))} weights; use --format packed or hf-bitnet, "
                f"or train with a width of {fitting}"
            )
    check_tokenizer(loaded.need_tokenizer())
    for name, layer in layers.items():
        smallest = float(layer.ternary()[1].min())
        if smallest < SMALLEST_NORMAL_HALF:
            raise ConfigError(
                f"{name}: gamma={smallest:.3g} is below {SMALLEST_NORMAL_HALF:.3g}, where float16, the scale of a "
                "block, loses digits; use --format packed or hf-bitnet"
            )


def _add_config(writer: Any, config: TransformerConfig, file_type: int) -> None:
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_sequence_length)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_expert if config.n_experts else config.d_ffn)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_size)
    if config.attention_width != config.d_model:
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
    if config.n_experts:
        writer.add_expert_count(config.n_experts)
        writer.add_expert_used_count(config.n_experts_per_token)
        writer.add_expert_feed_forward_length(config.d_expert)
    if config.activation != "silu":
        writer.add_string(f"{writer.arch}.hidden_activation", config.activation)
    _add_rope_scaling(writer, config.rope_scaling)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(file_type)


def _add_rope_scaling(writer: Any, scaling: RopeScaling | None) -> None:
    """Add linear and YaRN positions. Dynamic ones change nothing in the context of the model."""
    from gguf import RopeScalingType

    if scaling is None or scaling.rope_type not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(RopeScalingType(scaling.rope_type))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.rope_type == "linear":
        return
    writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
    if scaling.attention_factor is not None:
        # llama.cpp multiplies its own factor by this one.
        writer.add_rope_scaling_attn_factors(scaling.attention_factor / yarn_magnitude(scaling.factor))


def _add_other_tensors(writer: Any, loaded: LoadedModel, embedding_bits: int, sizes: Sizes) -> None:
    """Add embedding and head, the norms, the routers of experts, and the divisors of frequencies.

    llama.cpp wants norms and routers in float32.
    """
    state = loaded.model.state_dict()
    large = {"embed.weight": ("token_embd.weight", "embeddings")}
    if not loaded.config.tie_embeddings:
        large["lm_head.weight"] = ("output.weight", "head")
    for ours, (theirs, part) in large.items():
        sizes.add(part, state[ours].numel(), _add_large(writer, theirs, state[ours], embedding_bits))
    if (scaling := loaded.config.rope_scaling) is not None and scaling.rope_type == "llama3":
        divisors = rope_stretch(scaling, rope_frequencies(loaded.config))
        writer.add_tensor(ROPE_DIVISORS, divisors.float().numpy())
    names = block_norms(loaded.config)
    norms = {"output_norm.weight": "norm.weight"}
    for i in range(loaded.config.n_layers):
        norms |= {f"blk.{i}.{theirs}.weight": f"blocks.{i}.{ours}.weight" for ours, theirs in names.items()}
        if loaded.config.n_experts:
            norms[f"blk.{i}.{ROUTER}.weight"] = f"blocks.{i}.mlp.router.weight"
    for theirs, ours in norms.items():
        writer.add_tensor(theirs, state[ours].float().numpy())
        sizes.add("norms and biases", state[ours].numel(), 4 * state[ours].numel())


def _add_large(writer: Any, name: str, tensor: Tensor, bits: int) -> int:
    """Add embedding or head; return how many bytes it takes."""
    import gguf

    if bits == 8:
        kind = gguf.GGMLQuantizationType.Q8_0
        if tensor.shape[1] % 32:
            raise ConfigError(f"8-bit embeddings need a d_model that is a multiple of 32, and {tensor.shape[1]} is not")
    else:
        tensor = in_16_bits(tensor) if bits == 16 else tensor
        if tensor.dtype != torch.bfloat16:
            writer.add_tensor(name, tensor.numpy())
            return tensor.numel() * tensor.element_size()
        kind = gguf.GGMLQuantizationType.BF16
    data = gguf.quants.quantize(tensor.float().numpy(), kind)
    writer.add_tensor(name, data, raw_dtype=kind)
    return int(data.nbytes)
