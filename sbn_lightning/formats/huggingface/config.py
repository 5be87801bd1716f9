"""Translate between the ``config.json`` of Hugging Face's Qwen2 and Llama and :class:`TransformerConfig`.

Both are the transformer of this project: Qwen2 with biases on q, k and v, Llama without any bias. Everything else that
a ``config.json`` can ask for is refused by name, because a model that loads must compute what its authors meant.
"""

from __future__ import annotations

from typing import Any

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models.config import RopeScaling, TransformerConfig

# The values that transformers assumes for fields that a config.json leaves out: its Qwen2Config and LlamaConfig.
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "llama": {"max_position_embeddings": 2048},
}
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}


def from_hf(values: dict[str, Any], source: str) -> TransformerConfig:
    """Read a ``config.json``.

    Args:
        values: The contents of the file.
        source: The path of the file, for messages.

    Returns:
        A dense configuration (``linear="dense"``).

    Raises:
        ConfigError: If the file asks for a feature that :class:`TernaryTransformer` does not have; the message
            names the feature.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ConfigError(
            f"{source}: model_type {kind!r} is not one of qwen2, llama; a model of any other type trains in its own "
            "classes: load it with transformers and add the callback TernarySparseConversion to the Trainer"
        )
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(
            f"{source}: weights are quantised ({method}); give the model they were made of, or its packed folder"
        )
    values = DEFAULTS[kind] | {key: value for key, value in values.items() if value is not None}
    try:
        heads, d_model = int(values["num_attention_heads"]), int(values["hidden_size"])
        theta, scaling = _rope(values, source)
        _refuse_unsupported(values, kind, heads, d_model, source)
        return TransformerConfig(
            vocab_size=int(values["vocab_size"]),
            d_model=d_model,
            n_layers=int(values["num_hidden_layers"]),
            n_heads=heads,
            n_kv_heads=int(values.get("num_key_value_heads", heads)),
            d_ffn=int(values["intermediate_size"]),
            max_sequence_length=int(values["max_position_embeddings"]),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            qkv_bias=kind == "qwen2",
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
            linear="dense",
        )
    except KeyError as error:
        raise ConfigError(f"{source} lacks {error.args[0]}") from error
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source} holds a value of the wrong kind: {error}") from error


def _rope(values: dict[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """Read the base of the rotary frequencies and their scaling; transformers 5 keeps both in ``rope_parameters``."""
    # rope_scaling is the older name of the same dictionary. Where a file has both, transformers takes rope_scaling.
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"{source}: rope_parameters={rope!r} is not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ConfigError(f"{source}: rotary positions are scaled (rope_type {kind!r}), only llama3 is supported")
    if float(rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ConfigError(f"{source}: partial_rotary_factor is not supported, only whole heads turn")
    theta = float(rope.get("rope_theta", values.get("rope_theta", 10000.0)))
    if kind == "default":
        return theta, None
    # transformers looks for the original context in the model's fields, then in the scaling's fields, and otherwise
    # takes the present context.
    name = "original_max_position_embeddings"
    original = values.get(name, rope.get(name, values["max_position_embeddings"]))
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    try:
        return theta, RopeScaling(factor, low, high, int(original))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _refuse_unsupported(values: dict[str, Any], kind: str, heads: int, d_model: int, source: str) -> None:
    # transformers ignores sliding_window unless use_sliding_window is set; newer files list the kind of each layer.
    sliding = values.get("use_sliding_window", False) and values.get("sliding_window")
    others = sorted(set(values.get("layer_types", [])) - {"full_attention"})
    if others or (sliding and "layer_types" not in values):
        what = f" (layers of type {', '.join(others)})" if others else ""
        raise ConfigError(f"{source}: sliding-window attention{what} is not supported")
    head_size = int(values.get("head_dim", d_model // heads))
    if head_size * heads != d_model:
        raise ConfigError(
            f"{source}: head_dim={head_size} times num_attention_heads={heads} is not hidden_size={d_model}"
        )
    if values.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{source}: hidden_act {values['hidden_act']!r} is not supported, only silu")
    for option in ("attention_bias", "mlp_bias") if kind == "llama" else ():
        if values.get(option):
            raise ConfigError(f"{source}: {option} of Llama is not supported: o, gate, up and down have no bias here")
    for option in ("num_experts", "num_local_experts"):
        if values.get(option):
            raise ConfigError(f"{source}: mixture of experts ({option}={values[option]}) is not supported")


def architecture(config: TransformerConfig) -> str:
    """The class of transformers for a model: Qwen2 if q, k and v have biases, else Llama."""
    return ARCHITECTURES["qwen2" if config.qkv_bias else "llama"]


def to_hf(config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """Write the contents of a ``config.json``; the ids of special tokens are left empty.

    Args:
        config: The configuration of the model.
        dtype: The dtype of the weights, as torch names it: ``"float32"``.
    """
    kind = "qwen2" if config.qkv_bias else "llama"
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {"rope_type": "llama3", **config.rope_scaling.to_dict()}
    return {
        "architectures": [architecture(config)],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ffn,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "max_position_embeddings": config.max_sequence_length,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        # transformers 5 reads rope_parameters, transformers 4 the two older names.
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        **({} if config.rope_scaling is None else {"rope_scaling": rope}),
        "torch_dtype": dtype,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **({"use_sliding_window": False} if kind == "qwen2" else {"attention_bias": False, "mlp_bias": False}),
    }
