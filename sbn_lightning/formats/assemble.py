"""Build a model around tensors that exist already: the last step of every reader."""

from __future__ import annotations

from typing import Any

import torch

from sbn_lightning.core.errors import DataError
from sbn_lightning.layers.masked_linear import masked_layers
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.sparse_linear import SparseBitLinear
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.moe import Router
from sbn_lightning.models.rope import rope_tables
from sbn_lightning.models.transformer import TernaryTransformer


def build_model(config: TransformerConfig, state: dict[str, Any], source: str) -> TernaryTransformer:
    """Build a model around tensors that exist already; nothing is initialised or copied.

    Args:
        config: The configuration of the model.
        state: The state dict of the model. Masks may be missing, as in a dense checkpoint.
        source: The file or folder of the tensors, for messages.

    Raises:
        DataError: If a tensor is missing, is left over, or has another shape than the configuration says.
    """
    model = empty_model(config)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise DataError(f"{source} does not fit its own configuration: {_first_mismatch(error)}") from error
    if config.tie_embeddings:
        missing = [name for name in missing if name != "lm_head.weight"]
    return finish_model(model, missing, unexpected, source)


def empty_model(config: TransformerConfig) -> TernaryTransformer:
    """Build a model without storage, for ``load_state_dict(assign=True)`` to fill."""
    with torch.device("meta"):
        return TernaryTransformer(config)


def finish_model(
    model: TernaryTransformer, missing: list[str], unexpected: list[str], source: str
) -> TernaryTransformer:
    """Complete a model whose state dict was loaded: tie the head, make the rotary tables, and hold the masks.

    Args:
        model: A model whose state dict was loaded.
        missing: The names that the state dict lacked.
        unexpected: The names that the model does not have.
        source: The file or folder of the tensors, for messages.

    Raises:
        DataError: If a name is missing or unexpected.
    """
    for names, what in ((missing, "lacks"), (unexpected, "has unknown")):
        if names:
            raise DataError(f"{source} {what} {len(names)} tensors, the first is {names[0]}")
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed.weight
    model.cos, model.sin = rope_tables(model.config)
    for _, layer in masked_layers(model):
        layer.hold_mask = True  # The saved mask stays, even if it is from the middle of a ramp.
    return model


def cast_model(model: TernaryTransformer, dtype: torch.dtype) -> None:
    """Cast a model in place. Latent weights and scales of ternary layers, routers and rotary tables keep their dtypes.

    Args:
        model: The model.
        dtype: The dtype of all other parameters.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            latent = isinstance(module, SparseBitLinear) and name in ("weight", "log_scale")
            if parameter.is_floating_point() and not latent and not isinstance(module, Router):
                parameter.data = parameter.data.to(dtype)
        if isinstance(module, PackedTernaryLinear) and module.bias is not None:
            module.bias = module.bias.to(dtype)


def _first_mismatch(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
    return lines[0] if lines else str(error).splitlines()[0]
