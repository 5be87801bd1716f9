"""Qwen3: norms of queries and keys over each head, a head size of its own, and Qwen2's sliding windows."""

from __future__ import annotations

from typing import Any

from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.families.family import (
    Family,
    GGUFArchitecture,
    Values,
    read_attention_bias,
    read_windows,
    write_windows,
)


def _read(values: Values) -> dict[str, Any]:
    return {"qk_norm": "head"} | read_attention_bias(values) | read_windows(values)


def _write(config: TransformerConfig) -> dict[str, Any]:
    # The head size is always written, because transformers takes 128 where a file has none.
    return {"head_dim": config.head_size, "attention_bias": config.o_bias} | write_windows(config)


QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _read,
    _write,
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    gguf=(GGUFArchitecture("qwen3", reads=("head_dim", "qkv_bias"), implies=lambda n_layers: {"qk_norm": "head"}),),
)
