"""Write a model of transformers with 2-bit ternary layers to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.formats.huggingface.sbn import PackedContents, model_card, quantization_config, widen_patterns
from sbn_lightning.integrations.folder import sparse_layers, warn_of_partial_rounding
from sbn_lightning.integrations.huggingface.quantizer import SBNConfig, config_of, packed_state


def save_packed(
    model: Any,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    perplexity: float | None = None,
    **options: Any,
) -> None:
    """Write a Hugging Face model with ternary layers to a folder, 2 bits a ternary weight, with a model card.

    If the model is in the middle of a ramp, a warning says so. The folder then names the pattern that its groups keep
    to, and loads like any other.

    Args:
        model: A ``PreTrainedModel`` with converted or packed layers.
        directory: The folder to write to.
        dtype: The dtype of the other weights; None leaves each as it is.
        perplexity: The perplexity for the model card, if it was measured.
        **options: Options of ``save_pretrained``, for example ``max_shard_size="1GB"``.

    Raises:
        ConfigError: If no layer is sparse, or a sparse layer is not ternary. Also for ``push_to_hub``, which would
            replace the model card.
    """
    if options.pop("push_to_hub", False):
        raise ConfigError(
            "save_packed: push_to_hub would replace the model card: save the folder first, then upload it with "
            "huggingface_hub.upload_folder(repo_id=..., folder_path=...)"
        )
    config = config_of(model, "packed")
    layers = sparse_layers(model)
    warn_of_partial_rounding(layers, "save_packed")
    state = packed_state(model)
    if dtype is not None:
        state = {
            name: value.to(dtype) if value.is_floating_point() and not name.endswith(".gamma") else value
            for name, value in state.items()
        }
    contents = PackedContents()
    for name, layer in layers.items():
        contents.add(name, config.of(name), layer.ternary()[0])  # type: ignore[union-attr, operator]
    remark = widen_patterns(contents.modules, contents.most)
    facts = {
        "architecture": type(model).__name__,
        "modules": contents.modules,
        "remark": remark,
        "zeros": contents.zeros,
        "perplexity": perplexity,
    }
    quantizer = getattr(model, "hf_quantizer", None)
    saved = model.config.__dict__.get("quantization_config")
    model.hf_quantizer = None
    model.config.quantization_config = SBNConfig(**quantization_config(contents.modules, "packed"))
    try:
        # transformers would cut fused experts into one tensor for each expert, and our folder holds them fused.
        model.save_pretrained(directory, state_dict=state, save_original_format=False, **options)
    finally:
        model.hf_quantizer = quantizer
        if saved is None:
            del model.config.quantization_config
        else:
            model.config.quantization_config = saved
    if options.get("is_main_process", True):
        (Path(directory) / "README.md").write_text(model_card(facts), encoding="utf-8")
