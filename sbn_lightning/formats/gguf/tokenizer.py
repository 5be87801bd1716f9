"""A byte-level BPE ``tokenizer.json`` as GGUF metadata.

llama.cpp knows ways to cut text into words by name, not by regular expression; only tokenizers whose way it has a name
for are written. Without merges (the byte tokenizer) every way gives the same.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data.tokenizer import find_eos

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
# llama.cpp's name of each way to cut text (its src/llama-vocab.cpp).
PRE_TOKENIZERS = {
    "ByteLevel": "gpt-2",
    _CONTRACTIONS + _WORDS % r"\p{N}": "qwen2",
    _CONTRACTIONS + _WORDS % r"\p{N}{1,3}": "llama-bpe",
}


def check_tokenizer(tokenizer: Tokenizer) -> tuple[dict[str, Any], str]:
    """The contents of a tokenizer, and llama.cpp's name for how it cuts text.

    Raises:
        ConfigError: If llama.cpp has no name for it.
    """
    values = json.loads(tokenizer.to_str())
    if values["model"].get("type") != "BPE" or values["model"].get("byte_fallback"):
        raise ConfigError("--format gguf needs a byte-level BPE tokenizer, as `prepare` trains, Qwen2 or Llama 3 have")
    normalizer = (values["normalizer"] or {}).get("type", "NFC")
    if normalizer != "NFC":  # Qwen2's, which llama.cpp leaves out
        raise ConfigError(f"llama.cpp does not change text before it cuts it, this tokenizer does ({normalizer})")
    start = tokenizer.encode("").ids
    if len(start) > 1 or tokenizer.encode("a").ids[:-1] != start:
        raise ConfigError("llama.cpp adds one token before a text; this tokenizer adds others")
    if not values["model"]["merges"]:
        return values, "gpt-2"
    steps = values["pre_tokenizer"] or {}
    ways = []
    for step in steps.get("pretokenizers", [steps]):
        if step.get("type") == "Split":
            ways.append(step["pattern"].get("Regex", ""))
        elif step.get("type") != "ByteLevel":
            ways.append(str(step.get("type")))
        elif step.get("add_prefix_space"):
            ways.append("ByteLevel with add_prefix_space")
        elif step.get("use_regex", True):
            ways.append("ByteLevel")
    if len(ways) != 1 or ways[0] not in PRE_TOKENIZERS:
        raise ConfigError(
            f"llama.cpp has no known name for how this tokenizer cuts text ({', '.join(ways) or 'not at all'}); known "
            f"are those of {', '.join(PRE_TOKENIZERS.values())}"
        )
    return values, PRE_TOKENIZERS[ways[0]]


def add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Writes the vocabulary, merges and special tokens; rows of the embedding without a token are marked as unused."""
    import gguf

    values, pre = check_tokenizer(tokenizer)
    added = {entry["id"]: entry for entry in values["added_tokens"]}
    text_of = {index: text for text, index in tokenizer.get_vocab(with_added_tokens=True).items()}
    tokens, types = [], []
    for index in range(vocab_size):
        tokens.append(text_of.get(index, f"[UNUSED{index}]"))
        if index not in text_of:
            types.append(gguf.TokenType.UNUSED)
        elif index in added:
            is_control = added[index]["special"]
            types.append(gguf.TokenType.CONTROL if is_control else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in values["model"]["merges"]]
    eos, eos_id = find_eos(tokenizer, None)
    # llama.cpp insists on a list and the writer leaves out an empty one: a merge that no text can call for.
    merges = merges or [f"{eos} {eos}"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(eos_id)
    start = tokenizer.encode("").ids
    writer.add_bos_token_id(start[0] if start else eos_id)  # else llama.cpp takes a number of its own for it
    writer.add_add_bos_token(bool(start))
