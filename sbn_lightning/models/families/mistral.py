"""Mistral: Llama's block without biases, with one sliding window in all blocks or none."""

from __future__ import annotations

from typing import Any

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.families import llama
from sbn_lightning.models.families.family import Family, Values, layers_of_type


def _read(values: Values) -> dict[str, Any]:
    window = values.get("sliding_window")
    # transformers ignores layer_types of a Mistral. A file whose list contradicts its window means another model.
    if layers_of_type(values.get("layer_types", ()), "full_attention" if window else "sliding_attention"):
        raise ConfigError("layer_types of a mistral contradicts its sliding_window; its blocks are all alike")
    return {"sliding_window": int(window)} if window else {}


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    _read,
    _write,
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    gguf=(llama.GGUF,),
)
