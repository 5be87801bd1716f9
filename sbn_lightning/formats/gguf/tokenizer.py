"""A ``tokenizer.json`` as the metadata of a GGUF file, and back.

A ``tokenizer.json`` can become one of two kinds of tokenizers in llama.cpp.

* ``gpt2`` is a byte-level BPE. A name says how llama.cpp cuts text into words; see
  :mod:`~sbn_lightning.formats.gguf.pre_tokenizers`. If the tokenizer has no merges, every cut gives the same tokens.
* ``llama`` is a BPE model of SentencePiece, as Llama 2 and Mistral have. Spaces become ``▁``, and bytes stand for
  unknown characters. The pair of neighbours with the highest score merges first. A ``tokenizer.json`` ranks its merges
  and has no scores, so a token's score is minus the rank of its first merge.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sbn_lightning.checkpoints.text_files import CHAT_TEMPLATE, CONFIG, TOKENIZER_CONFIG, TextFiles
from sbn_lightning.checkpoints.tokenizers import TOKENIZER
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.data.tokenizer import find_eos
from sbn_lightning.formats.gguf.pre_tokenizers import name_of, pre_tokenizer_of, way_named

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

UNDERLINE = "\u2581"  # SentencePiece writes it for a space
# The types of tokens in llama.cpp (``gguf.TokenType``).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
KEYS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}  # tokenizer.ggml.NAME_token_id


def check_tokenizer(tokenizer: Tokenizer) -> tuple[dict[str, Any], str]:
    """Check that llama.cpp can make the tokens of a tokenizer.

    Returns:
        The contents of the ``tokenizer.json``, and llama.cpp's name for how it cuts text; ``"spm"`` for SentencePiece.

    Raises:
        ConfigError: If llama.cpp would make other tokens.
    """
    values = json.loads(tokenizer.to_str())
    model = values["model"]
    if model.get("type") != "BPE":
        raise ConfigError(
            "--format gguf needs a byte-level BPE tokenizer, as `prepare` trains and Qwen2 or Llama 3 have, or the "
            f"BPE of SentencePiece, as Llama 2 has; this one is {model.get('type')}"
        )
    if model.get("byte_fallback"):
        _scores(values)
        return values, "spm"
    normalizer = (values["normalizer"] or {}).get("type", "NFC")
    if normalizer != "NFC":  # Qwen2 has the normalizer NFC, and llama.cpp leaves it out.
        raise ConfigError(f"llama.cpp does not change text before it cuts it, this tokenizer does ({normalizer})")
    _check_start(tokenizer)
    return values, name_of(tokenizer, bool(model.get("ignore_merges"))) if model["merges"] else "gpt-2"


def _check_start(tokenizer: Tokenizer) -> list[int]:
    start: list[int] = tokenizer.encode("").ids
    if len(start) > 1 or tokenizer.encode("a").ids[: len(start)] != start:
        raise ConfigError("llama.cpp adds one token before a text; this tokenizer adds others")
    if len(tokenizer.encode("a").ids) != len(start) + len(tokenizer.encode("a", add_special_tokens=False).ids):
        raise ConfigError("llama.cpp adds one token before a text; this tokenizer adds others")
    return start


def _scores(values: dict[str, Any]) -> dict[str, float]:
    """The score of each merged token of a SentencePiece model.

    Raises:
        ConfigError: If no scores give the merges in their order.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, merge in enumerate(values["model"]["merges"]):
        token = "".join(merge if isinstance(merge, list) else merge.split(" "))
        first.setdefault(token, rank)
        last[token] = rank
    ordered = sorted(first, key=first.__getitem__)
    for before, after in pairwise(ordered):
        if last[before] > first[after]:
            raise ConfigError(
                f"llama.cpp orders the merges of SentencePiece by the token they make; this tokenizer makes {before!r} "
                f"both before and after {after!r}; use --format packed or hf-bitnet"
            )
    return {token: float(-position) for position, token in enumerate(ordered)}


def add_tokenizer(writer: Any, text: TextFiles, vocab_size: int) -> None:
    """Write the vocabulary, the merges or scores, the special tokens and the chat template.

    Args:
        writer: A ``gguf.GGUFWriter``.
        text: The model's text files, with a tokenizer that :func:`check_tokenizer` accepts.
        vocab_size: Rows of the embedding. Rows without a token are marked as unused.
    """
    tokenizer = text.tokenizer
    assert tokenizer is not None
    values, pre = check_tokenizer(tokenizer)
    is_spm = pre == "spm"
    tokens, types = _vocabulary(tokenizer, values, vocab_size)
    writer.add_tokenizer_model("llama" if is_spm else "gpt2")
    writer.add_tokenizer_pre("default" if is_spm else pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    stops = text.stop_ids or [find_eos(tokenizer, None)[1]]
    if is_spm:
        scores = _scores(values)
        lowest = -float(len(scores) + 1)  # The score of a single character, which no merge makes.
        writer.add_token_scores([scores.get(token, lowest) for token in tokens])
        writer.add_add_space_prefix(tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith(UNDERLINE))
    else:
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in values["model"]["merges"]]
        # llama.cpp needs a list of merges, and the writer leaves out an empty list. So an empty list becomes one merge
        # that no text can cause.
        end = tokenizer.id_to_token(stops[0])
        writer.add_token_merges(merges or [f"{end} {end}"])
    # llama.cpp stops at the end of a text, of a turn and of a message; each is one token.
    ends = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, token in zip(ends, stops, strict=False):
        add(token)
    start = _check_start(tokenizer)
    bos = start[0] if start else text.bos_id
    writer.add_bos_token_id(stops[0] if bos is None else bos)  # Otherwise llama.cpp takes a default.
    writer.add_add_bos_token(bool(start))
    if text.pad_id is not None:
        writer.add_pad_token_id(text.pad_id)
    if (unknown := tokenizer.token_to_id(values["model"].get("unk_token") or "")) is not None:
        writer.add_unk_token_id(unknown)
    if text.chat_template is not None:
        writer.add_chat_template(text.chat_template)


def _vocabulary(tokenizer: Tokenizer, values: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The text and the type of each token."""
    added = {entry["id"]: entry for entry in values["added_tokens"]}
    text_of = {index: text for text, index in tokenizer.get_vocab(with_added_tokens=True).items()}
    is_spm = values["model"].get("byte_fallback")
    tokens, types = [], []
    for index in range(vocab_size):
        token = text_of.get(index, f"[UNUSED{index}]")
        tokens.append(token)
        if index not in text_of:
            types.append(UNUSED)
        elif is_spm and token == values["model"].get("unk_token"):
            types.append(UNKNOWN)
        elif index in added:
            types.append(CONTROL if added[index]["special"] else USER_DEFINED)
        else:
            types.append(BYTE if is_spm and _is_byte(token) else NORMAL)
    return tokens, types


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def read_tokenizer(fields: dict[str, Any], source: Path) -> TextFiles:
    """Make the text files of a model from the metadata of its GGUF file.

    Args:
        fields: The metadata by name.
        source: The GGUF file.

    Raises:
        DataError: If the file holds a tokenizer of another kind, or one that cuts text in a way unknown here.
    """
    if "tokenizer.ggml.tokens" not in fields:
        return TextFiles()
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise DataError(f"{source}: a tokenizer of the kind {kind!r} cannot be read; known are gpt2 and llama")
    tokenizer = _byte_level(fields, source) if kind == "gpt2" else _sentencepiece(fields)
    _add_tokens(tokenizer, fields)
    _add_start(tokenizer, fields, kind == "llama")
    tokens = fields["tokenizer.ggml.tokens"]
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in KEYS.items()}
    more = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom")]
    ends = list(dict.fromkeys(token for token in (ids["eos_token_id"], *more) if token is not None))
    known = {name: token for name, token in ids.items() if token is not None}
    if len(ends) > 1:
        known["eos_token_id"] = ends
    described: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    described |= {name.removesuffix("_id"): tokens[token] for name, token in ids.items() if token is not None}
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    described |= {} if unknown is None else {"unk_token": tokens[unknown]}
    contents = {
        TOKENIZER: tokenizer.to_str(pretty=True),
        TOKENIZER_CONFIG: json.dumps(described, indent=2, ensure_ascii=False),
        CONFIG: json.dumps(known),
    }
    if template := fields.get("tokenizer.chat_template"):
        contents[CHAT_TEMPLATE] = template
    return TextFiles(contents, source)


def _byte_level(fields: dict[str, Any], source: Path) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    name = fields.get("tokenizer.ggml.pre", "gpt-2")
    way = way_named(name)
    if way is None:
        raise DataError(f"{source}: its tokenizer cuts text as {name!r} does, which is not known here")
    vocabulary = _used(fields)
    merges = []
    for merge in fields.get("tokenizer.ggml.merges", []):
        at = merge.index(" ", 1)
        pair = merge[:at], merge[at + 1 :]
        if {*pair, "".join(pair)} <= vocabulary.keys():  # A file may hold one merge that never applies.
            merges.append(pair)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=way.ignores_merges))
    tokenizer.pre_tokenizer = pre_tokenizer_of(way)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = _used(fields)
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    types = fields.get("tokenizer.ggml.token_type", [])
    whole = {token for token, index in vocabulary.items() if not types or types[index] == NORMAL}
    merges = []
    for token in sorted(whole, key=lambda token: (-scores[token], vocabulary[token])):
        splits = ((token[:at], token[at:]) for at in range(1, len(token)))
        found = [pair for pair in splits if whole.issuperset(pair)]
        merges += sorted(found, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=fields["tokenizer.ggml.tokens"][unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = fields.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend(UNDERLINE)] if space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", UNDERLINE)])
    strip = [decoders.Strip(" ", 1, 0)] if space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(UNDERLINE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _used(fields: dict[str, Any]) -> dict[str, int]:
    """Token -> id, without the tokens that only fill up the embedding."""
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    return {token: index for index, token in enumerate(tokens) if types[index] != UNUSED}


def _add_tokens(tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    """Mark the tokens that are found in a text before it is cut."""
    from tokenizers import AddedToken

    for token, kind in zip(fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.token_type", []), strict=False):
        if kind in (CONTROL, USER_DEFINED, UNKNOWN):
            tokenizer.add_tokens([AddedToken(token, special=kind != USER_DEFINED, normalized=False)])


def _add_start(tokenizer: Tokenizer, fields: dict[str, Any], default: bool) -> None:
    """Let the tokenizer add the token that begins a text, if the file says so."""
    from tokenizers import processors

    bos = fields.get("tokenizer.ggml.bos_token_id")
    if bos is not None and fields.get("tokenizer.ggml.add_bos_token", default):
        name = fields["tokenizer.ggml.tokens"][bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, bos)]
        )
