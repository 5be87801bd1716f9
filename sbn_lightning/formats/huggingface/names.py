"""Translate the names of tensors between Hugging Face's models and :class:`TernaryTransformer`.

q, k and v are separate tensors in transformers and one fused tensor here, and so are gate and up. The rows of a head
keep their order, because both projects rotate the two halves of a head against each other. The names depend on the
options of a model only: a norm has one name in all families that have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sbn_lightning.core.errors import DataError
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.families.mixture import expert_names

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # fp8 and int8 weights would need their scales.


class Part(NamedTuple):
    """A tensor of this project, and the tensors of transformers whose rows it is made of.

    Attributes:
        ours: The name in this project.
        theirs: The names in transformers.
        rows: The number of rows of each of ``theirs``; None if there is only one tensor and its rows are not checked.
    """

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...] | None


def linear_parts(config: TransformerConfig) -> Iterator[Part]:
    """The linear layers of all blocks. Names come without ``.weight``, like ``blocks.0.attention.qkv``."""
    kv = config.n_kv_heads * config.head_size
    for i in range(config.n_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        qkv = tuple(f"{theirs}.self_attn.{name}_proj" for name in "qkv")
        yield Part(f"{ours}.attention.qkv", qkv, (config.attention_width, kv, kv))
        yield Part(f"{ours}.attention.o", (f"{theirs}.self_attn.o_proj",), None)
        if config.n_experts:
            yield from _expert_parts(config, ours, theirs)
            continue
        gate_up = (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj")
        yield Part(f"{ours}.mlp.gate_up", gate_up, (config.d_ffn, config.d_ffn))
        yield Part(f"{ours}.mlp.down", (f"{theirs}.mlp.down_proj",), None)


def _expert_parts(config: TransformerConfig, ours: str, theirs: str) -> Iterator[Part]:
    """The two layers of a block's experts; each holds the rows of all experts."""
    assert config.d_expert is not None
    names = [expert_names(config)[1](e) for e in range(config.n_experts)]
    gate_up = tuple(f"{theirs}.{name}" for gate, up, _ in names for name in (gate, up))
    yield Part(f"{ours}.mlp.gate_up", gate_up, (config.d_expert,) * len(gate_up))
    yield Part(f"{ours}.mlp.down", tuple(f"{theirs}.{down}" for *_, down in names), (config.d_model,) * len(names))


def fused_name(part: Part) -> str | None:
    """The name in transformers 5 of a layer of experts, which is one tensor there; None for other layers."""
    _, block, _, ours = part.ours.split(".")
    if ".experts." not in part.theirs[0]:
        return None
    return f"model.layers.{block}.mlp.experts.{'gate_up_proj' if ours == 'gate_up' else 'down_proj'}"


def other_parts(config: TransformerConfig) -> Iterator[Part]:
    """The embedding, the norms, the routers of experts, and the head if it is not tied. Names are complete."""
    yield Part("embed.weight", ("model.embed_tokens.weight",), None)
    for i in range(config.n_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        for norm, name in norm_names(config).items():
            yield Part(f"{ours}.{norm}.weight", (f"{theirs}.{name}.weight",), None)
        if config.n_experts:
            yield Part(f"{ours}.mlp.router.weight", (f"{theirs}.{expert_names(config)[0]}.weight",), None)
    yield Part("norm.weight", ("model.norm.weight",), None)
    if not config.tie_embeddings:
        yield Part("lm_head.weight", ("lm_head.weight",), None)


def norm_names(config: TransformerConfig) -> dict[str, str]:
    """The norms of a block: name in this project -> name in transformers."""
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norm:
        names = {"attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"}
    if config.qk_norm is not None:
        names |= {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
    if config.sub_norms:
        names |= {"attention.sub_norm": "self_attn.attn_sub_norm", "mlp.sub_norm": "mlp.ffn_sub_norm"}
    return names


def all_parts(config: TransformerConfig) -> Iterator[Part]:
    """Every tensor of a dense model. Names are complete."""
    yield from other_parts(config)
    has_bias = {"qkv": config.qkv_bias, "o": config.o_bias, "gate_up": config.mlp_bias, "down": config.mlp_bias}
    for part in linear_parts(config):
        for kind in ("weight", "bias") if has_bias[part.ours.rpartition(".")[2]] else ("weight",):
            yield Part(f"{part.ours}.{kind}", tuple(f"{name}.{kind}" for name in part.theirs), part.rows)


def from_hf_state(
    config: TransformerConfig, read: Callable[[str], Tensor], names: set[str], source: str
) -> dict[str, Tensor]:
    """Collect the state dict of a dense :class:`TernaryTransformer`.

    Args:
        config: The configuration of the model.
        read: A function that returns a tensor of the other model by its name.
        names: The names of all tensors of the other model.
        source: The file or folder of the tensors, for messages.

    Raises:
        DataError: If a tensor is missing, has another shape or does not hold floating-point numbers, or if a tensor is
            left over: the model then has a part that would be lost.
    """
    left = set(names)
    state: dict[str, Tensor] = {}
    for part in all_parts(config):
        tensors = []
        for name, rows in zip(part.theirs, part.rows or (None,), strict=True):
            if name not in names:
                raise DataError(f"{source} lacks the tensor {name}")
            tensor = read(name)
            if tensor.dtype not in DTYPES:
                raise DataError(f"{source}: {name} is of {tensor.dtype}, which needs more than itself to be read")
            if rows is not None and tensor.shape[:1] != (rows,):
                raise DataError(
                    f"{source}: {name} has the shape {list(tensor.shape)}, its config.json says {rows} rows"
                )
            tensors.append(tensor)
            left.discard(name)
        try:
            state[part.ours] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        except RuntimeError as error:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
            raise DataError(f"{source}: {', '.join(part.theirs)} do not go together: {shapes}") from error
    if config.tie_embeddings and "lm_head.weight" in left:
        if not torch.equal(read("lm_head.weight"), state["embed.weight"]):
            raise DataError(
                f"{source}: its config.json ties the head to the embeddings, and lm_head.weight is another tensor; "
                "set tie_word_embeddings to false there to use it"
            )
        left.discard("lm_head.weight")
    # The frequencies of rotary positions are computed from the configuration.
    left = {name for name in left if not name.endswith("rotary_emb.inv_freq")}
    if left:
        raise DataError(f"{source} has {len(left)} tensors that no part of the model takes, such as {min(left)}")
    return state
