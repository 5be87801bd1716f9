"""Translate between the ``config.json`` of Hugging Face models and :class:`TransformerConfig`.

:mod:`sbn_lightning.models.families` has what is special to each family. This file has what all of them share: widths,
positions, norms and the head. Everything else that a ``config.json`` can ask for is refused by name, because a model
that loads must compute what its authors meant.
"""

from __future__ import annotations

from typing import Any

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.families.family import read_shared, write_shared
from sbn_lightning.models.families.registry import FAMILIES, family_of
from sbn_lightning.models.rope_scaling import RopeScaling, yarn_magnitude

# The same facts under the names of version 0.1.0.
DEFAULTS = {name: dict(family.defaults) for name, family in FAMILIES.items()}
ARCHITECTURES = {name: family.architecture for name, family in FAMILIES.items()}
ROPE_TYPES = ("default", "llama3", "linear", "yarn", "dynamic")


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
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise ConfigError(
            f"{source}: model_type {kind!r} is not one of {', '.join(FAMILIES)}; a model of any other type trains in "
            "its own classes: see recipes/from_hugging_face.yaml, or load it with transformers and add the callback "
            "TernarySparseConversion to the Trainer"
        )
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(
            f"{source}: weights are quantised ({method}); give the model they were made of, or its packed folder"
        )
    # A field that is missing has the default of transformers. A field that is null has no value.
    values = {key: value for key, value in {**family.defaults, **values}.items() if value is not None}
    try:
        theta, scaling = _rope(values)
        for option in ("num_experts", "num_local_experts"):
            if values.get(option) and "num_experts_per_tok" not in family.defaults:
                raise ConfigError(f"mixture of experts ({option}={values[option]}) is not supported for {kind}")
        return TransformerConfig(
            vocab_size=int(values["vocab_size"]),
            d_model=int(values["hidden_size"]),
            n_layers=int(values["num_hidden_layers"]),
            n_heads=int(values["num_attention_heads"]),
            n_kv_heads=int(values.get("num_key_value_heads", values["num_attention_heads"])),
            d_ffn=int(values["intermediate_size"]),
            max_sequence_length=int(values["max_position_embeddings"]),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
            linear="dense",
            **read_shared(family, values),
        )
    except KeyError as error:
        raise ConfigError(f"{source} lacks {error.args[0]}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{source} holds a value of the wrong kind: {error}") from error


def _rope(values: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Read the base of the rotary frequencies and their scaling; transformers 5 keeps both in ``rope_parameters``."""
    # rope_scaling is the older name of the same dictionary. Where a file has both, transformers takes rope_scaling.
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_parameters={rope!r} is not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ConfigError(
            f"rotary positions are scaled (rope_type {kind!r}), only {', '.join(ROPE_TYPES[1:])} are supported"
        )
    if float(rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))) != 1.0:
        raise ConfigError("partial_rotary_factor is not supported, only whole heads turn")
    theta = float(rope.get("rope_theta", values.get("rope_theta", 10000.0)))
    context = int(values["max_position_embeddings"])
    # transformers looks for the original context in the model's fields, then in the scaling's fields, and otherwise
    # takes the present context.
    name = "original_max_position_embeddings"
    original = int(values[name] if name in values else rope.get(name, context))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(float(rope["factor"]), rope_type="linear")
    if kind == "dynamic":
        # transformers stretches frequencies from max_position_embeddings on, wherever the model was trained first.
        return theta, RopeScaling(float(rope["factor"]), original_max_position_embeddings=context, rope_type="dynamic")
    if kind == "llama3":
        factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        return theta, RopeScaling(factor, low, high, original)
    return theta, _yarn({key: value for key, value in rope.items() if value is not None}, context, original)


def _yarn(rope: dict[str, Any], context: int, original: int) -> RopeScaling:
    factor = float(rope.get("factor", context / original))
    magnitude = rope.get("attention_factor")
    scale, scale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if magnitude is None and scale and scale_all:
        magnitude = yarn_magnitude(factor, float(scale)) / yarn_magnitude(factor, float(scale_all))
    return RopeScaling(
        factor,
        original_max_position_embeddings=original,
        rope_type="yarn",
        attention_factor=None if magnitude is None else float(magnitude),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=bool(rope.get("truncate", True)),
    )


def architecture(config: TransformerConfig) -> str:
    """The class of transformers for a model.

    Raises:
        ConfigError: If no class of transformers has all options of the model.
    """
    return family_of(config).architecture


def to_hf(config: TransformerConfig, dtype: str) -> dict[str, Any]:
    """Write the contents of a ``config.json``; the ids of special tokens are left empty.

    Args:
        config: The configuration of the model.
        dtype: The dtype of the weights, as torch names it: ``"float32"``.

    Raises:
        ConfigError: If no class of transformers has all options of the model.
    """
    family = family_of(config)
    rope: dict[str, Any] = {"rope_type": "default"}
    context = config.max_sequence_length
    if (scaling := config.rope_scaling) is not None:
        rope = {"rope_type": scaling.rope_type, **scaling.to_dict()}
        if scaling.rope_type == "dynamic":  # Here transformers knows the original context by another name.
            context = rope.pop("original_max_position_embeddings")
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": config.vocab_size,
        "intermediate_size": config.d_ffn,
        **write_shared(config),
        "num_key_value_heads": config.n_kv_heads,
        "max_position_embeddings": context,
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
        **family.write(config),
    }
