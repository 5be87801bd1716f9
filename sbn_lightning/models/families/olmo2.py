"""OLMo-2: norms after attention and the feed-forward layer, and norms of queries and keys over the whole projection."""

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

BLOCK = {"qk_norm": "projection", "post_norm": True}


def _read(values: Values) -> dict[str, Any]:
    only_full_attention(values)
    return BLOCK | read_attention_bias(values)


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {"attention_bias": config.o_bias}


OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    _read,
    _write,
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    gguf=(GGUFArchitecture("olmo2", reads=("qkv_bias",), implies=lambda n_layers: BLOCK, head="own"),),
)
