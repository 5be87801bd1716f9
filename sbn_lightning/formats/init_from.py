"""Start a new run from existing weights: ``init_from`` of :class:`SparseBitNet`.

The weights may be in any format that :func:`~sbn_lightning.formats.load.load_model` reads. Only weights are taken: the
optimiser, the step and the masks start anew. Masks of another run may have another pattern, or may have been saved in
the middle of a ramp.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sbn_lightning.checkpoints.text_files import TextFiles
from sbn_lightning.checkpoints.tokenizers import beside, difference
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.formats.load import load_model, read_text
from sbn_lightning.layers.conv1d import SparseBitConv1D
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear, ternary_layers
from sbn_lightning.models.config import family_options
from sbn_lightning.models.transformer import TernaryTransformer
from sbn_lightning.sparsity.learned_scale import factor_of_rows

# These fields say what the weights mean, so they come with the weights. The other fields (pattern, quantisation,
# sequence length, loss) are for the new run to choose.
FIXED = (
    "vocab_size",
    "d_model",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "d_ffn",
    "rope_theta",
    "rope_scaling",
    "norm_eps",
    "qkv_bias",
    "tie_embeddings",
    *family_options(),
)
# A run that continues may change these fields: tensors keep their shapes.
_CHANGEABLE = ("rope_theta", "rope_scaling", "norm_eps", "sliding_window", "sliding_layers", "layers_without_rope")
# The fields that decide which tensors exist and what the model computes.
SHAPE = tuple(name for name in FIXED if name not in _CHANGEABLE)


def load_weights(model: TernaryTransformer, path: str) -> TextFiles:
    """Copy the weights of another model, and make masks from the copied weights.

    A packed model has lost its latent weights. ``gamma * codes`` takes their place, and a warning says so.

    Args:
        model: The model to fill. Its dtypes and its device stay.
        path: A checkpoint of ``import-hf`` or of an earlier run, the folder of a run, a packed or a Hugging Face
            folder, or a GGUF file.

    Returns:
        The text files that came with the weights.

    Raises:
        DataError: If there is no model at ``path``, or it is damaged.
        ConfigError: If the two models differ in shape or positions; the message names the fields.
    """
    place = Path(path)
    if not place.exists() and not place.is_symlink():
        raise DataError(f"init_from: {path} does not exist; write it with: sbn import-hf --input MODEL --output {path}")
    loaded = load_model(place)
    config = loaded.config
    differing = [name for name in FIXED if getattr(config, name) != getattr(model.config, name)]
    inserted = inserts_sub_norms(config.sub_norms, model.config.sub_norms)
    if inserted:
        differing.remove("sub_norms")
    if differing:
        values = config.to_dict()
        wanted = ", ".join(f"{name}: {values[name]}" for name in differing)
        raise ConfigError(f"init_from: {path} does not fit the model; set model.config to {wanted}")
    state = without_masks(loaded.model.state_dict())
    packed = {name: layer for name, layer in loaded.model.named_modules() if isinstance(layer, PackedTernaryLinear)}
    for name, layer in packed.items():
        state = _with_latent_weight(state, name, layer)
    if packed:
        warnings.warn(
            f"init_from: {path} holds packed weights without the latent ones: training starts from gamma * codes",
            stacklevel=2,
        )
    own = model.state_dict().keys()
    scaled = {name: one for name, one in ternary_layers(loaded.model).items() if f"{name}.log_scale" not in own}
    state = without_learned_scales(state, scaled)
    missing, unexpected = model.load_state_dict(state, strict=False)
    # Masks are made from the weights. Norms that are inserted and learned factors on gamma start at 1.
    made = [".mask_bits"] + [".sub_norm.weight"] * inserted + [".log_scale"] * model.config.learnable_scales
    missing = [name for name in missing if not name.endswith(tuple(made))]
    if missing or unexpected:
        raise DataError(f"init_from: {path} does not fit its own configuration: {[*missing, *unexpected][0]}")
    return loaded.text


def inserts_sub_norms(given: bool, wanted: bool) -> bool:
    """Whether norms are inserted into weights: the weights are ``given`` without them, and the model has them."""
    return wanted and not given


def without_masks(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict from which layers make masks anew."""
    return {name: value for name, value in state.items() if not name.endswith(".mask_bits")}


def _with_latent_weight(state: dict[str, Tensor], name: str, layer: PackedTernaryLinear) -> dict[str, Tensor]:
    """The state dict with a weight in the place of a packed layer's codes and gamma."""
    rest = {key: value for key, value in state.items() if key not in (f"{name}.codes", f"{name}.gamma")}
    return rest | {f"{name}.weight": layer.effective_weight()}


def without_learned_scales(state: dict[str, Any], layers: Mapping[str, SparseBitLinear]) -> dict[str, Any]:
    """A state dict whose latent weights have taken in the learned factors on gamma: gamma grows, and codes stay.

    Args:
        state: A state dict.
        layers: The layers by their names in the state dict. Layers without learned factors stay as they are.
    """
    state = dict(state)
    for name, layer in layers.items():
        log_scale = state.pop(f"{name}.log_scale", None)
        if log_scale is not None:
            factor = factor_of_rows(log_scale, layer.split_sizes, layer.out_features)
            weight = state[f"{name}.weight"]
            factor = factor if isinstance(layer, SparseBitConv1D) else factor.unsqueeze(-1)
            state[f"{name}.weight"] = (weight * factor).to(weight.dtype)
    return state


def check_tokenizer(path: str, data: Any, option: str = "init_from") -> None:
    """Check with :func:`difference` that the data were prepared with the tokenizer of the weights.

    Nothing is checked if the weights come without a tokenizer, or if ``data`` is not prepared tokens.

    Args:
        path: The model with the weights, as for :func:`load_weights`.
        data: The data of the run; a :class:`~sbn_lightning.data.TokenDataModule` is checked.
        option: The option that names the model, for messages.

    Raises:
        ConfigError: If the tokenizers differ; the message names both and what differs.
        DataError: If the tokenizer of the weights is damaged.
    """
    if not all(hasattr(data, name) for name in ("sources", "eos_id")):
        return
    place = Path(path)
    if not place.exists():  # `load_weights` raises the error.
        return
    text = read_text(place)
    if text.tokenizer is None:
        return
    folder = next(iter(data.sources))
    try:
        theirs = data.tokenizer
    except DataError as error:  # Prepared tokens can be read without their tokenizer.
        warnings.warn(f"{option}: cannot compare the tokenizer of {path} with that of {folder}: {error}", stacklevel=2)
        return
    found = difference(text.tokenizer, theirs, data.eos_id)
    if found is None:
        return
    file = beside(place) if beside(place).is_file() else text.source
    is_file = file is not None and file.suffix == ".json"
    wanted = file if is_file else f"FILE (the tokenizer.json that `sbn export --checkpoint {path}` writes)"
    raise ConfigError(
        f"{option}: {path} has the tokenizer {file}, data.path {folder} was prepared with another one ({found}): "
        f"prepare the data again with sbn prepare --tokenizer {wanted} --input FILES --output FOLDER"
    )
