"""Turn prompts into token ids, and find the tokens at which a text ends."""

from __future__ import annotations

from collections.abc import Sequence

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data.tokenizer import find_eos
from sbn_lightning.formats.loaded import LoadedModel
from sbn_lightning.inference.chat import as_chat

# Tokens that end documents and turns in published tokenizers. They are used for models that do not say where they stop.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "</s>", "<eos>")


def stop_ids(opened: LoadedModel, stop_token: str | list[str] | None) -> set[int]:
    """Find the ids of the tokens that end a text.

    Args:
        opened: The model.
        stop_token: The tokens that the user named. None takes those that the model's own config names, and without a
            config those of :data:`ENDS` that the tokenizer has.

    Raises:
        ConfigError: If a token that was named is not in the vocabulary.
    """
    tokenizer = opened.need_tokenizer()
    if stop_token is None:
        known = {found for end in ENDS if (found := tokenizer.token_to_id(end)) is not None}
        return set(opened.text.stop_ids) or known
    ids = set()
    for token in [stop_token] if isinstance(stop_token, str) else stop_token:
        found = tokenizer.token_to_id(token)
        if found is None:
            raise ConfigError(f"stop_token {token!r} is not a token of the model's tokenizer")
        ids.add(found)
    return ids


def encode_prompt(opened: LoadedModel, prompt: str, *, chat: bool = False) -> list[int]:
    """Turn a prompt into token ids, at least one.

    Args:
        opened: The model.
        prompt: The text to continue. An empty text begins a new document.
        chat: Whether the prompt is a message to a chat model.

    Raises:
        ConfigError: If a chat is asked for and the model has no chat template.
    """
    tokenizer = opened.need_tokenizer()
    if chat:
        # The template writes the special tokens, the one that begins a text included.
        ids: list[int] = tokenizer.encode(as_chat(opened.text, prompt), add_special_tokens=False).ids
        return ids
    return tokenizer.encode(prompt).ids or [_document_start(opened)]


def check_prompt(ids: Sequence[int], vocab_size: int, name: str) -> None:
    """Refuse a prompt that a model cannot read.

    Args:
        ids: The token ids of the prompt.
        vocab_size: The number of token ids that the model knows.
        name: What to call the prompt in messages.

    Raises:
        ConfigError: If the prompt is empty, or a token id is beyond the vocabulary.
    """
    if not len(ids):
        raise ConfigError(f"{name} is empty; begin it with a token, for example the end-of-document token")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise ConfigError(
            f"{name} has token id {wrong}, the model's vocab_size is {vocab_size}; was it written with another "
            "tokenizer?"
        )


def _document_start(opened: LoadedModel) -> int:
    """The token that begins a text: the model's own, or the one that ended the text before."""
    text = opened.text
    if text.bos_id is not None:
        return text.bos_id
    return text.stop_ids[0] if text.stop_ids else find_eos(opened.need_tokenizer(), None)[1]
