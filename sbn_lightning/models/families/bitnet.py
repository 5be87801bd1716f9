"""BitNet b1.58 2B4T: squared ReLU, and norms before the output projection and the down projection.

Two programs read such a model as GGUF. llama.cpp itself has the architecture ``bitnet``, whose gate is SiLU whatever
the file says, so only a model with SiLU goes there. bitnet.cpp (Microsoft's program on a copy of llama.cpp) has
``bitnet-b1.58``, whose gate is squared ReLU.
"""

from __future__ import annotations

from typing import Any

from sbn_lightning.core.errors import ConfigError
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
    heads, d_model = int(values["num_attention_heads"]), int(values["hidden_size"])
    if int(values.get("head_dim", d_model // heads)) * heads != d_model:
        raise ConfigError(
            f"head_dim={values['head_dim']} times num_attention_heads={heads} is not hidden_size={d_model}"
        )
    return {"sub_norms": True} | read_attention_bias(values)


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {"attention_bias": config.o_bias}


BITNET = Family(
    "bitnet",
    "BitNetForCausalLM",
    _read,
    _write,
    defaults={
        "max_position_embeddings": 2048,
        "num_key_value_heads": 5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "hidden_act": "relu2",
    },
    gguf=(
        GGUFArchitecture(
            "bitnet-b1.58", implies=lambda n_layers: {"sub_norms": True, "activation": "relu2"}, head="tied"
        ),
        GGUFArchitecture("bitnet", implies=lambda n_layers: {"sub_norms": True, "activation": "silu"}, head="tied"),
    ),
)
