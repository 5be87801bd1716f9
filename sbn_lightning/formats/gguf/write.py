"""GGUF for llama.cpp: ternary tensors as TQ2_0, TQ1_0 or Q4_0, written by the ``gguf`` package.

The first two store blocks of 256 weights of a row with a float16 scale ``d`` each, the block's largest magnitude. Given
``gamma * T`` that is gamma itself, so codes survive exactly and a dequantised weight is ``float16(gamma) * T``. Q4_0 is
for rows that 256 does not divide: blocks of 32, at 4.5 bits a weight. It can hold the same numbers, but its usual
quantiser maps the largest magnitude to -8 and would not give them: its blocks are put together here, with ``d = gamma``
and codes on both sides of its zero.

A model with q/k/v biases becomes architecture ``qwen2``, one without ``llama``, whose rotary positions turn neighbours
among the rows of a head: q and k are reordered for it, and scaled positions come as ``rope_freqs.weight``, one divisor
for each frequency. llama.cpp quantises activations in its own way, by block and not by token, so its logits are close
to ours and not the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.formats.gguf.tokenizer import add_tokenizer, check_tokenizer
from sbn_lightning.formats.huggingface.names import linear_parts
from sbn_lightning.formats.huggingface.write import check_ternary
from sbn_lightning.formats.packed import ternary_layers
from sbn_lightning.models.rope import rope_frequencies, rope_stretch

if TYPE_CHECKING:
    from sbn_lightning.formats.load import LoadedModel
    from sbn_lightning.models.config import TransformerConfig

BLOCKS = {"TQ2_0": 256, "TQ1_0": 256, "Q4_0": 32}
SMALLEST_NORMAL_HALF = 2.0**-14
NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def write_gguf(loaded: LoadedModel, folder: Path, quantization: str) -> str:
    """Writes ``model-QUANTIZATION.gguf``.

    Args:
        loaded: A ternary model and its tokenizer.
        folder: Where.
        quantization: ``"TQ2_0"``, ``"TQ1_0"`` or ``"Q4_0"``.

    Raises:
        ConfigError: If the model or its tokenizer has no home in the format; the message names the layer or feature.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            'writing GGUF needs the package gguf: pip install "sbn-lightning[export]" or pip install gguf'
        ) from error
    check_gguf(loaded, BLOCKS[quantization])
    config = loaded.config
    architecture = "qwen2" if config.qkv_bias else "llama"
    target = folder / f"model-{quantization}.gguf"
    writer = gguf.GGUFWriter(target, architecture)
    _add_config(writer, config, gguf.LlamaFileType[f"MOSTLY_{quantization}"])
    add_tokenizer(writer, loaded.need_tokenizer(), config.vocab_size)
    _add_other_tensors(writer, loaded)
    layers = ternary_layers(loaded.model)
    kind = gguf.GGMLQuantizationType[quantization]
    for part in tqdm(list(linear_parts(config)), desc="quantising", unit="layer", disable=None):
        layer = layers[part.ours]
        codes, gamma = layer.ternary()
        rows = part.rows or (layer.out_features,)
        biases = (None,) * len(rows) if layer.bias is None else layer.bias.detach().split(rows)
        for name, piece, scale, bias in zip(part.theirs, codes.split(rows), gamma, biases, strict=True):
            i, module = name.split(".")[2], name.rsplit(".", 1)[1]
            if architecture == "llama" and module in ("q_proj", "k_proj"):
                piece = interleave_halves(piece, config.head_size)
            if quantization == "Q4_0":
                data = q4_0_blocks(piece, scale).numpy()
            else:
                data = gguf.quants.quantize((piece * scale).float().numpy(), kind)
            writer.add_tensor(f"blk.{i}.{NAMES[module]}.weight", data, raw_dtype=kind)
            if bias is not None:
                writer.add_tensor(f"blk.{i}.{NAMES[module]}.bias", bias.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return f"architecture {architecture}, {quantization}, {target.stat().st_size / 1e6:.2f} MB in {target.name}"


def check_gguf(loaded: LoadedModel, block: int) -> None:
    """Checks a model before anything is written.

    Args:
        loaded: The model.
        block: Weights of a row that share a scale.

    Raises:
        ConfigError: If something of it has no home in the format.
    """
    check_ternary(loaded, "gguf")
    if loaded.config.rope_scaling is not None and loaded.config.qkv_bias:
        raise ConfigError(
            "llama.cpp scales rotary positions (rope_scaling) of Llama only, and q/k/v biases make this a Qwen2; use "
            "--format packed or hf-bitnet"
        )
    layers = ternary_layers(loaded.model)
    for name, layer in layers.items():
        if layer.in_features % block:
            smaller = "--quantization Q4_0 (blocks of 32, 4.5 bits a weight), " if layer.in_features % 32 == 0 else ""
            raise ConfigError(
                f"{name}: in_features={layer.in_features} is not a multiple of {block}, the block of this "
                f"quantisation; use {smaller}--format packed or hf-bitnet"
            )
    check_tokenizer(loaded.need_tokenizer())
    for name, layer in layers.items():
        smallest = float(layer.ternary()[1].min())
        if smallest < SMALLEST_NORMAL_HALF:
            raise ConfigError(
                f"{name}: gamma={smallest:.3g} is below {SMALLEST_NORMAL_HALF:.3g}, where float16, the scale of a "
                "block, loses digits; use --format packed or hf-bitnet"
            )


def q4_0_blocks(codes: Tensor, gamma: Tensor) -> Tensor:
    """int8 ``[out, in]`` in {-1, 0, 1} and a scale -> uint8 ``[out, in / 32 * 18]``.

    A block is the scale in float16 and 16 bytes; byte ``j`` holds weights ``j`` and ``j + 16``, low 4 bits first, as
    code + 8 (ggml's ``block_q4_0``).
    """
    low, high = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2, 16)).unbind(-2)
    scale = gamma.half().reshape(1).view(torch.uint8).expand(*low.shape[:-1], 2)
    return torch.cat((scale, low | high << 4), -1).flatten(-2)


def interleave_halves(weight: Tensor, head_size: int) -> Tensor:
    """Reorders rows ``[heads * E, in]``: the two halves of a head, turned against each other, become neighbours."""
    return weight.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)


def _add_config(writer: Any, config: TransformerConfig, file_type: int) -> None:
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_sequence_length)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ffn)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(file_type)


def _add_other_tensors(writer: Any, loaded: LoadedModel) -> None:
    """Embedding and head in the dtype they have, norms in float32, as llama.cpp wants them; divisors of frequencies."""
    import gguf

    state = loaded.model.state_dict()
    large = {"embed.weight": "token_embd.weight"}
    if not loaded.config.tie_embeddings:
        large["lm_head.weight"] = "output.weight"
    for ours, theirs in large.items():
        tensor = state[ours]
        if tensor.dtype == torch.bfloat16:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(theirs, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, tensor.numpy())
    if (scaling := loaded.config.rope_scaling) is not None:
        divisors = rope_stretch(scaling, rope_frequencies(loaded.config))
        writer.add_tensor("rope_freqs.weight", divisors.float().numpy())
    writer.add_tensor("output_norm.weight", state["norm.weight"].float().numpy())
    for i in range(loaded.config.n_layers):
        for ours, theirs in (("attention_norm", "attn_norm"), ("mlp_norm", "ffn_norm")):
            writer.add_tensor(f"blk.{i}.{theirs}.weight", state[f"blocks.{i}.{ours}.weight"].float().numpy())
