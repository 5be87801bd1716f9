"""Write a prompt as a turn of a chat, in the form that the model was trained on: its chat template.

Chat templates are Jinja templates with a few names that Hugging Face's transformers defines: ``messages``,
``add_generation_prompt``, the special tokens, ``raise_exception`` and ``strftime_now``. The template comes with the
model and is not trusted, so it runs in Jinja's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sbn_lightning.checkpoints.text_files import TextFiles
from sbn_lightning.core.errors import ConfigError, DataError

Message = dict[str, str]
"""One message of a chat: ``role`` (``"system"``, ``"user"`` or ``"assistant"``) and ``content``."""


def as_chat(text: TextFiles, message: str) -> str:
    """Write a message of the user as a chat that waits for the model's answer.

    Args:
        text: The model's text files.
        message: What the user says.

    Returns:
        The prompt, special tokens included.

    Raises:
        ConfigError: If the model has no chat template.
        DataError: If the template does not work.
    """
    if text.chat_template is None:
        raise ConfigError("the model has no chat template: it is not a chat model; leave --chat out")
    return write_chat(text, [{"role": "user", "content": message}], text.chat_template)


def write_chat(text: TextFiles, messages: Sequence[Message], template: str) -> str:
    """Write messages as a chat that waits for the model's answer.

    Args:
        text: The model's text files, which name the special tokens.
        messages: The messages so far, the oldest first.
        template: The chat template.

    Returns:
        The prompt, special tokens included.

    Raises:
        DataError: If the template does not work.
    """
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    tokens = {name: _content(text.tokenizer_config.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **tokens)
    except TemplateError as error:
        raise DataError(f"the model's chat template does not work: {str(error).splitlines()[0]}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes characters of HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise DataError(f"the model's chat template refuses the prompt: {message}")


def _content(token: Any) -> str:
    """The text of a special token, which a file may describe as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
