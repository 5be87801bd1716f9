"""SmolLM3: Llama's block, where some blocks (every fourth, as published) have attention without positions."""

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

INTERVAL = 4


def _without_positions(n_layers: int, interval: int = INTERVAL) -> tuple[int, ...]:
    """The numbers of the blocks without positions: every ``interval``-th one."""
    return tuple(range(interval - 1, n_layers, interval))


def _read(values: Values) -> dict[str, Any]:
    count = int(values["num_hidden_layers"])
    if "no_rope_layers" in values:  # The list has 1 for a block with positions, and 0 for a block without.
        without = tuple(i for i, has_positions in enumerate(values["no_rope_layers"][:count]) if not has_positions)
    else:
        without = _without_positions(count, int(values.get("no_rope_layer_interval", INTERVAL)))
    if values.get("use_sliding_window") and "layer_types" not in values:  # Windows are in the blocks without positions.
        kinds = ["sliding_attention" if i in without else "full_attention" for i in range(count)]
        values = {**values, "layer_types": kinds}
    options = {"layers_without_rope": without, "mlp_bias": bool(values.get("mlp_bias", False))}
    return options | read_attention_bias(values) | read_windows({"max_window_layers": count, **values})


def _write(config: TransformerConfig) -> dict[str, Any]:
    windows = write_windows(config)
    windows.pop("max_window_layers", None)  # SmolLM3 has no such field.
    return {
        "no_rope_layers": [int(i not in config.layers_without_rope) for i in range(config.n_layers)],
        "no_rope_layer_interval": INTERVAL,
        "attention_bias": config.o_bias,
        "mlp_bias": config.mlp_bias,
        **windows,
    }


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    _read,
    _write,
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
    },
    gguf=(
        GGUFArchitecture(
            "smollm3",
            reads=("head_dim", "qkv_bias"),
            implies=lambda n_layers: {"layers_without_rope": _without_positions(n_layers)},
            alternates_halves=True,
        ),
    ),
)
