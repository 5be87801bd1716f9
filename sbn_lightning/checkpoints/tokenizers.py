"""Find the tokenizer of a checkpoint, and compare two tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbn_lightning.core.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"


def beside(checkpoint: Path) -> Path:
    """Return the tokenizer file that belongs to a checkpoint file: ``qwen2.5.ckpt`` -> ``qwen2.5.tokenizer.json``."""
    return checkpoint.with_name(f"{checkpoint.name.removesuffix('.ckpt')}.{TOKENIZER}")


def data_folders_of_run(file: Path) -> list[Path]:
    """Return the folders of prepared data that a run's ``config.yaml`` names, as they are written there.

    A relative path is relative to the current folder. URLs are left out.

    Args:
        file: The path of the ``config.yaml``. A file that does not exist names no folder.

    Raises:
        DataError: If the file is not YAML in UTF-8.
    """
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
    """Return the first difference that matters between two tokenizers; None if there is none.

    The vocabularies must be equal. So must the parts that split a text into tokens: the normalizer, the pre-tokenizer,
    and the model's kind, merges, ``ignore_merges`` and ``byte_fallback``.

    Tokens that were added to the vocabulary may differ in two ways. The data's tokenizer may have more of them than the
    weights' tokenizer, and a special token may have another name. Both are harmless, because the only special token
    that ``prepare`` writes is the one that ends a document, and the weights must know this token.

    Nothing else is compared: not the scores of a Unigram model, for example, and not the form of the files.

    Args:
        weights: The tokenizer of the checkpoint.
        data: The tokenizer of the prepared folder.
        eos_id: The id of the token that ends a document in the data.

    Returns:
        The difference, as the text of a message that calls ``weights`` the first and ``data`` the second.
    """
    token = _first_other_token(weights, data, eos_id)
    if token is not None:
        first, second = (tokenizer.id_to_token(token) for tokenizer in (weights, data))
        return f"token {token} is {first!r} in the first, {second!r} in the second"
    ours, theirs = _rules(weights), _rules(data)
    return next((f"the {name} differs" for name in ours if ours[name] != theirs[name]), None)


def _first_other_token(weights: Tokenizer, data: Tokenizer, eos_id: int) -> int | None:
    """Return the lowest token id that has different meanings in the two tokenizers; None if there is none."""
    known, used = ({i: token for token, i in t.get_vocab(with_added_tokens=True).items()} for t in (weights, data))
    ids = {i for t in (weights, data) for i in t.get_vocab(with_added_tokens=False).values()} | {eos_id}
    ids |= {i for i, token in data.get_added_tokens_decoder().items() if i in known and not token.special}
    return min((i for i in ids if known.get(i) != used.get(i)), default=None)


def _rules(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the parts of a tokenizer that split a text into tokens, by the names that a message uses."""
    # Both tokenizers are serialised by the installed library. The files themselves come from several versions of the
    # library: a merge may be "a b" or ["a", "b"], and a default may be left out.
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
    """Return a part of a tokenizer without ``trim_offsets``.

    ``trim_offsets`` changes which positions in the text a token is reported at, and not the tokens themselves.
    """
    if isinstance(part, list):
        return [_without_offsets(item) for item in part]
    if isinstance(part, dict):
        return {key: _without_offsets(value) for key, value in part.items() if key != "trim_offsets"}
    return part
