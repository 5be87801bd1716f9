"""Llama 1 to 3.3: the plain block, with biases and a head size of its own where the file names them."""

from __future__ import annotations

from typing import Any

from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.families.family import (
    Family,
    GGUFArchitecture,
    Values,
    only_full_attention,
    read_attention_bias,
)


def _read(values: Values) -> dict[str, Any]:
    only_full_attention(values)
    return read_attention_bias(values) | {"mlp_bias": bool(values.get("mlp_bias", False))}


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {"attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}


GGUF = GGUFArchitecture(
    "llama",
    reads=("head_dim", "qkv_bias", "o_bias", "mlp_bias"),
    alternates_halves=True,
    reads_rope_divisors=True,
)
LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    _read,
    _write,
    defaults={"max_position_embeddings": 2048},
    gguf=(GGUF,),
)
