"""Names and orders in GGUF files of Llama and Qwen2: GGUF <-> Hugging Face."""

from __future__ import annotations

from torch import Tensor

OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
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
ROPE_DIVISORS = "rope_freqs.weight"


def interleave_halves(weight: Tensor, head_size: int) -> Tensor:
    """Reorder the rows of ``[heads * head_size, ...]`` so that the two halves of a head alternate."""
    return weight.unflatten(0, (-1, 2, head_size // 2)).transpose(1, 2).flatten(0, 2)


def restore_halves(weight: Tensor, head_size: int) -> Tensor:
    """The inverse of :func:`interleave_halves`."""
    return weight.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).flatten(0, 2)
