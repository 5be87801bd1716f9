"""Mixtures of experts: Mixtral (Mistral's attention), Qwen3-MoE (Qwen3's) and OLMoE (Llama's with OLMo-2's norms).

All blocks must be mixtures. Qwen2-MoE is not here: it has an expert that every token goes to, which our block lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.families import llama
from sbn_lightning.models.families.family import Family, GGUFArchitecture, Values, read_attention_bias

# llama.cpp reads these, and always divides the weights of a token's experts by their sum.
_EXPERT_OPTIONS = ("n_experts", "n_experts_per_token", "d_expert")


def _experts(values: Values, number: str, width: str, normalise: bool) -> dict[str, Any]:
    """The options of a mixture of experts.

    Args:
        values: The contents of a ``config.json``.
        number: The name of the field with the number of experts.
        width: The name of the field with the width of an expert.
        normalise: Whether the weights of a token's experts add up to 1.
    """
    # transformers 5 writes the number of Qwen3-MoE's experts under Mixtral's name, and reads both.
    experts = int(values.get("num_local_experts", values[number]))
    if not experts:
        raise ConfigError(f"{number}=0 means no experts, which this model_type does not have")
    return {
        "n_experts": experts,
        "n_experts_per_token": int(values["num_experts_per_tok"]),
        "d_expert": int(values[width]),
        "normalise_experts": normalise,
    }


def _fields(config: TransformerConfig, number: str, width: str) -> dict[str, Any]:
    """The inverse of :func:`_experts`."""
    return {
        number: config.n_experts,
        "num_experts_per_tok": config.n_experts_per_token,
        width: config.d_expert,
        "router_aux_loss_coef": config.load_balance,
        "output_router_logits": False,
    }


def _read_mixtral(values: Values) -> dict[str, Any]:
    if values.get("router_jitter_noise"):
        raise ConfigError(f"router_jitter_noise={values['router_jitter_noise']} is not supported")
    window = values.get("sliding_window")
    windows = {"sliding_window": int(window)} if window else {}
    return windows | _experts(values, "num_local_experts", "intermediate_size", normalise=True)


def _write_mixtral(config: TransformerConfig) -> dict[str, Any]:
    own = {"sliding_window": config.sliding_window, "router_jitter_noise": 0.0}
    return own | _fields(config, "num_local_experts", "intermediate_size")


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    _read_mixtral,
    _write_mixtral,
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    gguf=(replace(llama.GGUF, reads=(*llama.GGUF.reads, *_EXPERT_OPTIONS)),),
)


def _read_qwen3(values: Values) -> dict[str, Any]:
    if values.get("mlp_only_layers") or int(values["decoder_sparse_step"]) != 1:
        raise ConfigError("mlp_only_layers and decoder_sparse_step make some blocks dense, which is not supported")
    if values.get("use_sliding_window"):
        raise ConfigError("use_sliding_window is not supported for qwen3_moe")
    own = {"qk_norm": "head"} | read_attention_bias(values)
    return own | _experts(values, "num_experts", "moe_intermediate_size", bool(values["norm_topk_prob"]))


def _write_qwen3(config: TransformerConfig) -> dict[str, Any]:
    own: dict[str, Any] = {"head_dim": config.head_size, "attention_bias": config.o_bias, "decoder_sparse_step": 1}
    own |= {"mlp_only_layers": [], "norm_topk_prob": config.normalise_experts, "use_sliding_window": False}
    return own | _fields(config, "num_experts", "moe_intermediate_size")


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _read_qwen3,
    _write_qwen3,
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "decoder_sparse_step": 1,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    },
    gguf=(
        GGUFArchitecture(
            "qwen3moe",
            reads=("head_dim", "qkv_bias", *_EXPERT_OPTIONS),
            implies=lambda n_layers: {"qk_norm": "head"},
        ),
    ),
)


def _read_olmoe(values: Values) -> dict[str, Any]:
    if values.get("clip_qkv") is not None:
        raise ConfigError(f"clip_qkv={values['clip_qkv']} is not supported")
    own = {"qk_norm": "projection"} | read_attention_bias(values)
    return own | _experts(values, "num_experts", "intermediate_size", bool(values["norm_topk_prob"]))


def _write_olmoe(config: TransformerConfig) -> dict[str, Any]:
    own: dict[str, Any] = {"attention_bias": config.o_bias, "norm_topk_prob": config.normalise_experts}
    return own | {"clip_qkv": None} | _fields(config, "num_experts", "intermediate_size")


OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    _read_olmoe,
    _write_olmoe,
    defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
)

Names = tuple[str, Callable[[int], tuple[str, str, str]]]


def expert_names(config: TransformerConfig) -> Names:
    """The names of a block's router, and of an expert's gate, up and down projection, in folders of transformers.

    Mixtral has names of its own. The two families with norms of queries and keys share theirs.

    Returns:
        The name of the router, and a function of the number of an expert. Names come without the block's own and
        without ``.weight``.
    """
    if config.qk_norm is None:
        moe = "block_sparse_moe"
        return f"{moe}.gate", lambda e: (f"{moe}.experts.{e}.w1", f"{moe}.experts.{e}.w3", f"{moe}.experts.{e}.w2")
    own = "mlp.experts"
    return "mlp.gate", lambda e: (f"{own}.{e}.gate_proj", f"{own}.{e}.up_proj", f"{own}.{e}.down_proj")
