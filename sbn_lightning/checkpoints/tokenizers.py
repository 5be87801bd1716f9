"""The names of tokenizer files, and whether two tokenizers are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbn_lightning.core.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"


def beside(checkpoint: Path) -> Path:
    """The tokenizer that belongs to one checkpoint file: ``qwen2.5.ckpt`` -> ``qwen2.5.tokenizer.json``."""
    return checkpoint.with_name(f"{checkpoint.name.removesuffix('.ckpt')}.{TOKENIZER}")


def data_folders_of_run(file: Path) -> list[Path]:
    """The folders of prepared data that a run's ``config.yaml`` names, relative to the current folder."""
    if not file.is_file():
        return []
    import yaml

    try:
        values: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is damaged: {str(error).splitlines()[0]}") from error
    data = values.get("data") if isinstance(values, dict) else None
    if not isinstance(data, dict):
        return []
    folders = [*(data.get("paths") or {}), data.get("path")]
    return [Path(folder) for folder in folders if isinstance(folder, str) and "://" not in folder]


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
