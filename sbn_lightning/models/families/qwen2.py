"""Qwen2 and Qwen2.5: the plain block with biases of q, k and v, and sliding windows in some blocks if asked for."""

from __future__ import annotations

from typing import Any

from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.families import llama
from sbn_lightning.models.families.family import Family, GGUFArchitecture, Values, read_windows, write_windows


def _read(values: Values) -> dict[str, Any]:
    return {"qkv_bias": True} | read_windows(values)


def _write(config: TransformerConfig) -> dict[str, Any]:
    return write_windows(config)


QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    _read,
    _write,
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    # llama.cpp's llama reads biases of q, k and v as well, and some options that its qwen2 does not read.
    gguf=(GGUFArchitecture("qwen2", reads=("qkv_bias",)), llama.GGUF),
)
