"""The terminal of ``sbn chat``: lines in, answers out, and what Ctrl-C means in each moment."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from sbn_lightning.core.errors import SBNError
from sbn_lightning.inference.conversation import Conversation
from sbn_lightning.inference.generator import Generator

HELP = "/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer"


def talk(
    conversation: Conversation, generator: Generator, limits: dict[str, Any], seed: int, *, speed: bool = False
) -> None:
    """Answer the lines of stdin until it ends, or until a line says ``/quit``.

    Args:
        conversation: The conversation.
        generator: The generator of the conversation.
        limits: Fields of :class:`~sbn_lightning.inference.request.Limits`, the same for all answers.
        seed: The seed of the first answer; the second answer has the seed after it, and so on.
        speed: Whether to print the speed of each answer to stderr.
    """
    print(HELP, file=sys.stderr)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Arrow keys and a history, where Python has them.
            import readline  # noqa: F401
    while (message := _next_message()) is not None:
        if message == "/reset":
            conversation.reset()
        elif message:
            _answer(conversation, generator, message, limits | {"seed": seed % (1 << 63)}, speed)
            seed += 1


def _next_message() -> str | None:
    """Read the user's next line; None at its end or after /quit."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:  # There is no answer to stop.
            print(f"\n{HELP}", file=sys.stderr)
            continue
        return None if line == "/quit" else line


def _answer(
    conversation: Conversation, generator: Generator, message: str, limits: dict[str, Any], speed: bool
) -> None:
    """Print the answer to a message. An error ends this answer and not the conversation."""
    request = None
    before = generator.reused_tokens
    try:
        message.encode("utf-8")
        request, dropped = conversation.ask(message, **limits)
        if dropped:
            print(f"[the context is full: the oldest {dropped} messages are dropped]", file=sys.stderr)
        for piece in request:
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        if request is not None:
            request.cancel()
        print("\n[stopped]", file=sys.stderr)
    except UnicodeEncodeError as error:  # Python marks bytes of the terminal that are not UTF-8.
        print(f"error: the message is not UTF-8: {error.reason}", file=sys.stderr)
    except SBNError as error:
        print(f"error: {error}", file=sys.stderr)
    if request is None:
        return
    try:
        conversation.keep(request)
    except SBNError:  # It has been printed.
        return
    if speed:
        print(f"{request.speed}; {generator.reused_tokens - before} tokens were in the cache", file=sys.stderr)
