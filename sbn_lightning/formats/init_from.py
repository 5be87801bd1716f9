"""Weights for a new run: ``init_from`` of :class:`SparseBitNet`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from sbn_lightning.checkpoints import lightning_file
from sbn_lightning.checkpoints.tokenizers import difference, find_tokenizer
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.models.transformer import TernaryTransformer

# What weights mean depends on these; the rest (pattern, quantisation, sequence length, loss) is the new run's choice.
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
)
SHAPE = tuple(name for name in FIXED if name not in ("rope_theta", "rope_scaling", "norm_eps"))  # of tensors


def load_weights(model: TernaryTransformer, path: str) -> None:
    """Copies a checkpoint's weights into a model; masks are made from them.

    Args:
        model: Already built; its dtypes and device stay.
        path: A ``.ckpt`` of ``import-hf`` or of an earlier run, dense or sparse.

    Raises:
        DataError: If the checkpoint is missing or damaged, or does not fit its own configuration.
        ConfigError: If the model differs from it in shape or positions; the message names the fields.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"init_from: {path} does not exist; write it with: python cli.py import-hf --output {path}")
    config, state = lightning_file.read(file)
    differing = [name for name in FIXED if getattr(config, name) != getattr(model.config, name)]
    if differing:
        values = config.to_dict()
        wanted = ", ".join(f"{name}: {values[name]}" for name in differing)
        raise ConfigError(f"init_from: {path} does not fit the model; set model.config to {wanted}")
    # Masks are made anew from the weights: those of another run may be of another pattern, or of the middle of a ramp.
    missing, unexpected = model.load_state_dict(without_masks(state), strict=False)
    if missing or unexpected:
        raise DataError(f"init_from: {path} does not fit its own configuration: {[*missing, *unexpected][0]}")


def without_masks(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict from which layers make masks anew."""
    return {name: value for name, value in state.items() if not name.endswith(".mask_bits")}


def check_tokenizer(path: str, data: Any) -> None:
    """Checks that data were prepared with the tokenizer of a checkpoint's weights, as far as :func:`difference` tells.

    Nothing is checked if the checkpoint has no tokenizer with it, or ``data`` is no
    :class:`~sbn_lightning.data.TokenDataModule`.

    Args:
        path: As of :func:`load_weights`.
        data: The run's data.

    Raises:
        ConfigError: If not; the message names both tokenizers and what differs.
        DataError: If the checkpoint's tokenizer is damaged.
    """
    from sbn_lightning.data import TokenDataModule

    if not isinstance(data, TokenDataModule):
        return
    file, ours = find_tokenizer(Path(path), None)
    if ours is None:
        return
    folder = next(iter(data.sources))
    try:
        theirs = data.tokenizer
    except DataError as error:  # shards can be read without it
        rank_zero_warn(f"init_from: cannot compare {file} with the tokenizer of {folder}: {error}")
        return
    found = difference(ours, theirs, data.eos_id)
    if found is not None:
        raise ConfigError(
            f"init_from: {path} has the tokenizer {file}, data.path {folder} was prepared with another one ({found}): "
            f"prepare the data again with python cli.py prepare --tokenizer {file} --input FILES --output FOLDER"
        )
