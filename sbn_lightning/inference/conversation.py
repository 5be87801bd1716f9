"""A conversation with a chat model: its messages, and the prompt that they make for each answer.

The prompt of a turn begins with the whole conversation before it. A generator with ``keep_prefixes`` still has the keys
and values of that beginning, so a turn reads only its own tokens.
"""

from __future__ import annotations

from typing import Any

from sbn_lightning.checkpoints.text_files import TextFiles
from sbn_lightning.core.errors import ConfigError, SBNError
from sbn_lightning.formats.loaded import LoadedModel
from sbn_lightning.inference.chat import Message, write_chat
from sbn_lightning.inference.generator import Generator
from sbn_lightning.inference.request import Request


class Conversation:
    """The messages of a chat, which answer one another.

    Args:
        generator: The generator that writes the answers.
        opened: The model of the generator.
        system: A message to the model that comes before the conversation; None leaves that to the chat template.
        template: The chat template; None takes the model's own.

    Attributes:
        messages: The messages so far. Answers that were stopped are among them as far as they were written.

    Raises:
        ConfigError: If there is no chat template.
        DataError: If the model has no tokenizer.
    """

    def __init__(
        self, generator: Generator, opened: LoadedModel, *, system: str | None = None, template: str | None = None
    ) -> None:
        """Start without any turn."""
        template = opened.text.chat_template if template is None else template
        if template is None:
            raise ConfigError(
                f"{opened.path} has no chat template, so it is unknown how a conversation is written for this model: "
                "name a Jinja file with --template, or use sbn generate"
            )
        self._generator, self._template = generator, template
        self._text: TextFiles = opened.text
        self._tokenizer = opened.need_tokenizer()
        self._before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[Message] = []

    def reset(self) -> None:
        """Forget all messages but the one of the system."""
        self.messages = []

    def ask(self, message: str, *, max_new_tokens: int = 512, **limits: Any) -> tuple[Request, int]:
        """Add a message of the user, and start the answer. Call :meth:`keep` when the answer has ended.

        Where the conversation does not fit into the context any more, its oldest turns are dropped. At least a quarter
        of the context, or ``max_new_tokens`` if that is less, stays free for the answer.

        Args:
            message: What the user says.
            max_new_tokens: The largest number of tokens of the answer.
            **limits: Other fields of :class:`~sbn_lightning.inference.request.Limits`.

        Returns:
            The request whose text is the answer, and the number of messages that were dropped.

        Raises:
            ConfigError: If the message alone does not fit.
            DataError: If the template does not work. The conversation is then as it was before.
        """
        room = self._generator.max_length - min(max_new_tokens, self._generator.max_length // 4)
        messages: list[Message] = [*self.messages, {"role": "user", "content": message}]
        ids = self._encode(messages)
        while len(ids) > room and len(messages) > 1:
            # A turn is a message of the user and its answer. Templates want the user to speak first.
            messages = messages[2:]
            ids = self._encode(messages)
        if len(ids) > room:
            raise ConfigError(
                f"the message makes a prompt of {len(ids)} tokens, and {room} fit beside an answer in a sequence of "
                f"{self._generator.max_length} tokens: shorten it"
            )
        request = self._generator.submit(ids, max_new_tokens=max_new_tokens, **limits)
        dropped = len(self.messages) + 1 - len(messages)
        self.messages = messages
        return request, dropped

    def keep(self, request: Request) -> None:
        """Add the text of an answer that has ended to the messages; without an answer the question goes as well."""
        try:
            self.messages.append({"role": "assistant", "content": request.result().text})
        except Exception:
            self.messages.pop()
            raise

    def _encode(self, messages: list[Message]) -> list[int]:
        prompt = write_chat(self._text, [*self._before, *messages], self._template)
        ids: list[int] = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        if not ids:
            raise SBNError("the chat template writes nothing for these messages")
        return ids
