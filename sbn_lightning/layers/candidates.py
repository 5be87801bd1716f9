"""Which layers of a model a conversion takes by default, and which rows of a fused layer belong together.

The method is for the linear layers inside a network's blocks. A few linear layers are better left alone, and models
from elsewhere contain them under well-known names: output heads, routers of experts, gates with one row, the matrices
of a LoRA. They are skipped with a reason unless the caller names them.

A fused layer multiplies with several matrices at once (q, k and v; gate and up). The method has one gamma for each of
them, so a conversion has to know the rows of each part. They are guessed only for classes whose layout is known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn

from sbn_lightning.layers.conv1d import is_conv1d

# Names of layers that turn features into answers: logits, class scores, shared embedding spaces.
_HEADS = {
    "lm_head", "head", "heads", "head_dist", "classifier", "classification_head", "score", "scores", "qa_outputs",
    "embed_out", "output_projection", "proj_out", "prediction_head", "to_logits", "value_head", "v_head",
    "visual_projection", "text_projection", "class_labels_classifier", "bbox_predictor",
}  # fmt: skip
# No other layer has these names, so they are output heads at any place, also in a list of several models.
_ALWAYS_HEADS = {"lm_head", "embed_out"}
_ROUTERS = {"gate", "gating", "gate_network", "wg"}
# A layer called "gate" is taken for a router if it has this many times fewer rows than input features. The gate of a
# gated MLP has more rows.
_ROUTER_RATIO = 8
_LORA = {"lora_A", "lora_B", "lora_down", "lora_up", "lora_magnitude_vector"}


def name_matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted module name, or one of its parents, matches a shell-style pattern.

    ``"h.1"`` matches ``h.1`` and ``h.1.mlp`` but not ``h.10``; ``"lm_head"`` also matches ``model.lm_head``.
    """
    parts = name.split(".")
    spans = [".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]
    return any(fnmatchcase(span, pattern) for pattern in patterns for span in spans)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """The number of input and of output features of a linear layer or a ``Conv1D``."""
    if is_conv1d(module):
        return cast(int, module.nx), cast(int, module.nf)
    return cast(int, module.in_features), cast(int, module.out_features)


def left_alone(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why a conversion leaves a linear layer alone by default; None if the conversion takes the layer.

    Args:
        model: The whole model.
        name: The name of the layer in the model.
        module: The layer.
    """
    parts = name.split(".")
    in_features, out_features = shape_of(module)
    if _LORA & set(parts):
        return "a LoRA's own matrix, which stays in high precision"
    if out_features == 1:
        return "a gate or score with one row"
    last = parts[-1]
    chooses = last in _ROUTERS and (out_features * _ROUTER_RATIO <= in_features or _has_experts(model, parts))
    if "router" in last or chooses:
        return "a router, which chooses experts"
    return "an output head" if is_output_head(name) else None


def is_output_head(name: str) -> bool:
    """Whether a layer of this name is taken for an output head.

    Args:
        name: The name of the layer in the model.
    """
    parts = name.split(".")
    if _ALWAYS_HEADS & set(parts):
        return True
    # Only outside of the numbered blocks is a "head" an output head. Within a block it is an attention head.
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    outside = parts[:numbered]
    return bool((_HEADS - {"heads"}) & set(outside)) or (outside == parts and parts[-1] in _HEADS)


def _has_experts(model: nn.Module, parts: list[str]) -> bool:
    """Whether the module that holds a layer holds experts too."""
    children: Any = model.get_submodule(".".join(parts[:-1])).named_children()
    return any("expert" in child and child != parts[-1] for child, _ in children)


def guess_split_sizes(model: nn.Module, name: str, module: nn.Module) -> tuple[int, ...] | None:
    """The rows of each part of a fused layer, if the class that holds the layer is known; None otherwise.

    The known layouts are q, k and v side by side (timm, litgpt, GPT-2, and Phi-3 and its relatives in transformers),
    and gate and up side by side (transformers). Some models mix the rows of q, k and v head by head (GPT-NeoX, BLOOM,
    Falcon). Their layers cannot be split into such parts.

    Args:
        model: The whole model.
        name: The name of the layer in the model.
        module: The layer.
    """
    parent_name, _, last = name.rpartition(".")
    parent: Any = model.get_submodule(parent_name)
    origin = type(parent).__module__.partition(".")[0]
    rows = shape_of(module)[1]
    if last in ("gate_up_proj", "gate_up") and origin == "transformers" and rows % 2 == 0:
        return rows // 2, rows // 2
    if last == "c_attn" and is_conv1d(module) and rows == 3 * shape_of(module)[0]:
        return rows // 3, rows // 3, rows // 3
    if last == "qkv" and origin == "timm" and rows % 3 == 0:
        return rows // 3, rows // 3, rows // 3
    if last == "qkv" and origin == "litgpt":
        config = getattr(parent, "config", None)
        groups = getattr(config, "n_query_groups", None)
        return _query_key_value(rows, groups, getattr(config, "head_size", None))
    if last == "qkv_proj" and origin == "transformers":
        config = getattr(parent, "config", None)
        groups = getattr(parent, "num_key_value_heads", None) or getattr(config, "num_key_value_heads", None)
        return _query_key_value(rows, groups, getattr(parent, "head_dim", None))
    return None


def _query_key_value(rows: int, groups: object, head_size: object) -> tuple[int, ...] | None:
    if not isinstance(groups, int) or not isinstance(head_size, int):
        return None
    query = rows - 2 * groups * head_size
    return (query, groups * head_size, groups * head_size) if query > 0 else None


def not_linear(name: str, module: nn.Module) -> dict[str, str]:
    """Why the matrices of a module that is not a linear layer stay dense. Vectors and embeddings need no reason.

    Args:
        name: The name of the module in the model.
        module: The module.

    Returns:
        The reasons by name. For a convolution the name is that of the module, and otherwise that of the parameter.
    """
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {}
    kind = type(module).__name__
    if isinstance(module, nn.modules.conv._ConvNd):
        if all(size == 1 for size in module.kernel_size):
            return {
                name: f"a {kind} with a 1x1 kernel, which is a linear layer over channels: write it as an nn.Linear"
            }
        return {name: f"{kind} has no tokens to quantise: one pixel is part of many windows"}
    use = "packed q, k and v are" if isinstance(module, nn.MultiheadAttention) else "it is"
    return {
        f"{name}.{parameter}".lstrip("."): f"{use} a bare parameter of {kind}, not an nn.Linear"
        for parameter, value in module.named_parameters(recurse=False)
        if value.ndim >= 2
    }
