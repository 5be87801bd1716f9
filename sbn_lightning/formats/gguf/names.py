"""Names and orders in GGUF files: GGUF <-> this project, by way of Hugging Face's names."""

from __future__ import annotations

from torch import Tensor

from sbn_lightning.formats.huggingface.names import norm_names
from sbn_lightning.models.config import TransformerConfig

OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
NORMS = {
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "attention.sub_norm": "attn_sub_norm",
    "mlp.sub_norm": "ffn_sub_norm",
}
"""The norms of a block: name in this project -> name in GGUF."""
POST_NORMS = {"attention_norm": "post_attention_norm", "mlp_norm": "post_ffw_norm"}
"""The names of norms that follow attention and the feed-forward layer."""
LINEAR = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {theirs.rsplit(".", 1)[1]: ours for ours, theirs in LINEAR.items()}  # q_proj -> attn_q
EXPERTS = {"gate_up": ("ffn_gate_exps", "ffn_up_exps"), "down": ("ffn_down_exps",)}
"""The layers of a block's experts: name in this project -> names in GGUF, where gate and up are apart."""
ROUTER = "ffn_gate_inp"
ROPE_DIVISORS = "rope_freqs.weight"


def block_norms(config: TransformerConfig) -> dict[str, str]:
    """The norms that the blocks of a model have: name in this project -> name in GGUF."""
    names = NORMS | POST_NORMS if config.post_norm else NORMS
    return {ours: names[ours] for ours in norm_names(config)}


def interleave_halves(weight: Tensor, head_size: int) -> Tensor:
    """Reorder the rows of ``[heads * head_size, ...]`` so that the two halves of a head alternate."""
    return weight.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)


def restore_halves(weight: Tensor, head_size: int) -> Tensor:
    """The inverse of :func:`interleave_halves`."""
    return weight.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).flatten(0, 2)
