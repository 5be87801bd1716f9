"""Weights for a new run: ``init_from`` of :class:`SparseBitNet`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from sbn_lightning.checkpoint import lightning_file
from sbn_lightning.checkpoint.tokenizers import find_tokenizer
from sbn_lightning.errors import ConfigError, DataError
from sbn_lightning.transformer import TernaryTransformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".mask_bits")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise DataError(f"init_from: {path} does not fit its own configuration: {[*missing, *unexpected][0]}")


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


def difference(weights: Tokenizer, data: Tokenizer, eos_id: int) -> str | None:
    """What tells two tokenizers apart; None if nothing of what follows does.

    Vocabularies must be equal, and so must what splits a text into them: normalizer, pre-tokenizer, and the model's
    kind, merges, ``ignore_merges`` and ``byte_fallback``. Of tokens added to a vocabulary, the data may have more than
    the weights know, and may name special ones otherwise: ``prepare`` writes no special token but the one that ends a
    document, which the weights must know. Nothing else is compared, such as scores of a Unigram model, or how files
    are written.

    Args:
        weights: Of the checkpoint.
        data: Of the prepared folder.
        eos_id: What ends a document in the data.
    """
    token = _first_other_token(weights, data, eos_id)
    if token is not None:
        first, second = (tokenizer.id_to_token(token) for tokenizer in (weights, data))
        return f"token {token} is {first!r} in the first, {second!r} in the second"
    ours, theirs = _rules(weights), _rules(data)
    return next((f"the {name} differs" for name in ours if ours[name] != theirs[name]), None)


def _first_other_token(weights: Tokenizer, data: Tokenizer, eos_id: int) -> int | None:
    """The lowest token id that does not mean the same in both."""
    known, used = ({i: token for token, i in t.get_vocab(with_added_tokens=True).items()} for t in (weights, data))
    ids = {i for t in (weights, data) for i in t.get_vocab(with_added_tokens=False).values()} | {eos_id}
    ids |= {i for i, token in data.get_added_tokens_decoder().items() if i in known and not token.special}
    return min((i for i in ids if known.get(i) != used.get(i)), default=None)


def _rules(tokenizer: Tokenizer) -> dict[str, Any]:
    """What splits a text into tokens, by its name for a user."""
    # Written by one version of the library: in files, merges are "a b" or ["a", "b"], and defaults may be left out.
    contents = json.loads(tokenizer.to_str())
    model = contents["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    return {
        "kind of the model": model.get("type"),
        "list of merges": merges,
        "model's ignore_merges": model.get("ignore_merges", False),
        "model's byte_fallback": model.get("byte_fallback", False),
        "normalizer": contents["normalizer"],
        "pre_tokenizer": _without_offsets(contents["pre_tokenizer"]),
    }


def _without_offsets(part: Any) -> Any:
    """A part of a tokenizer without ``trim_offsets``, which says where tokens lie in the text, not which they are."""
    if isinstance(part, list):
        return [_without_offsets(item) for item in part]
    if isinstance(part, dict):
        return {key: _without_offsets(value) for key, value in part.items() if key != "trim_offsets"}
    return part
