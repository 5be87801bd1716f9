"""One request to a :class:`~sbn_lightning.inference.generator.Generator`: its limits, its text as it comes, its end.

The generator's thread adds tokens, and any other thread reads the text. One condition variable guards all that both of
them touch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Literal

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.inference.loop import Speed
from sbn_lightning.inference.sampling import Sampling
from sbn_lightning.inference.stops import StopStrings
from sbn_lightning.inference.text import TextStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Limits:
    """What one request asks for.

    Args:
        max_new_tokens: The largest number of tokens to add; fewer where the model's context ends.
        temperature: 0 takes the most likely token; 1 draws from the model's distribution.
        top_p: A probability. Tokens are drawn from the most likely ones whose probabilities sum to this value.
        top_k: The number of most likely tokens to draw from; None draws from all.
        seed: The seed of this request's own draws.
        stop: Strings that end the text. They are not part of the text.
        stop_tokens: The ids of the tokens that end the text; None takes the model's own.

    Raises:
        ConfigError: If a value is outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} is below 1")
        if not isinstance(self.seed, Integral):
            raise ConfigError(f"seed={self.seed!r} is not an integer")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"seed={self.seed} is outside 0 to 2^63 - 1")
        if isinstance(self.stop, str):  # A string is a sequence of strings as well: its characters.
            object.__setattr__(self, "stop", (self.stop,))
        StopStrings(self.stop)
        self.sampling  # noqa: B018 (the constructor checks the values)

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(self.temperature, self.top_p, self.top_k)


@dataclass(frozen=True)
class Completion:
    """What a request has given.

    Attributes:
        text: The new text, without the stop string.
        tokens: The ids of the new tokens, without the stop token. After a stop string the tokens of that string are
            among them.
        finish: What ended the text: ``"stop"`` (a stop token or a stop string), ``"length"`` or ``"cancelled"``.
    """

    text: str
    tokens: list[int]
    finish: Finish


class Request:
    """A prompt that a generator continues. Iterate over it for the pieces of text as they come.

    Requests are made by :meth:`Generator.submit`. A request can be iterated over more than once, and from any thread.

    Args:
        prompt: The token ids of the prompt.
        limits: What is asked for.
        room: The number of new tokens at most, which may be fewer than ``limits.max_new_tokens``.
        stop_tokens: The ids that end the text.
        tokenizer: The tokenizer; None for a model without one, whose requests have no text.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        limits: Limits,
        room: int,
        stop_tokens: frozenset[int],
        tokenizer: Tokenizer | None,
    ) -> None:
        """Make a request that has not started."""
        self.prompt, self.limits, self.room = list(prompt), limits, room
        self.sampling = limits.sampling
        self._stop_tokens = stop_tokens
        self._text = None if tokenizer is None else TextStream(tokenizer)
        self._stops = StopStrings(limits.stop)
        self._changed = threading.Condition()
        self._tokens: list[int] = []
        self._pieces: list[str] = []
        self._finish: Finish | None = None
        self._error: BaseException | None = None
        self._cancelled = False
        self._submitted = time.perf_counter()
        self._times: tuple[float, float] = (self._submitted, self._submitted)  # Of the first and the last token.
        self.written: list[int] = []  # Every token that was chosen, a stop token included.

    def __iter__(self) -> Iterator[str]:
        """Yield the pieces of text as they come, from the first on; the pieces together are the text.

        Raises:
            Exception: What made this request fail, if it failed.
        """
        shown = 0
        while True:
            with self._changed:
                while not self.done and len(self._pieces) == shown:
                    self._changed.wait()
                pieces, done = self._pieces[shown:], self.done
            yield from pieces
            shown += len(pieces)
            if done:
                break
        if self._error is not None:
            raise self._error

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end of the text.

        Args:
            timeout: The longest time to wait, in seconds; None waits as long as it takes.

        Raises:
            TimeoutError: If the text has not ended in time. The request goes on.
            Exception: What made this request fail, if it failed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"the request has not ended within {timeout} seconds; it goes on")
            if self._error is not None:
                raise self._error
            assert self._finish is not None
            return Completion("".join(self._pieces), list(self._tokens), self._finish)

    def cancel(self) -> None:
        """End the request where it is. The text so far stays; a request that has ended does not change."""
        with self._changed:
            self._cancelled = True

    @property
    def done(self) -> bool:
        """Whether no more text comes."""
        return self._finish is not None or self._error is not None

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked for the end of this request."""
        return self._cancelled

    @property
    def speed(self) -> Speed:
        """What was read and written so far. The time of the prompt includes the time in the queue."""
        first, last = self._times
        return Speed(len(self.prompt), first - self._submitted, len(self._tokens), last - first, 1)

    def take(self, token: int) -> None:
        """Add a token. Only the generator calls this method and the next two."""
        now = time.perf_counter()
        with self._changed:
            self._times = (now if not self.written else self._times[0], now)
            self.written.append(token)
            if token in self._stop_tokens:
                self._end("stop")
                return
            self._tokens.append(token)
            if self._text is not None:
                self._show(self._text.push(token))
            if self._stops.found:
                self._end("stop")
            elif len(self._tokens) == self.room:
                self._end("length")

    def end_cancelled(self) -> None:
        """End the request because somebody cancelled it."""
        with self._changed:
            self._end("cancelled")

    def fail(self, error: BaseException) -> None:
        """End the request with an error, which its readers get."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _show(self, text: str) -> None:
        piece = self._stops.push(text)
        if piece:
            self._pieces.append(piece)
            self._changed.notify_all()

    def _end(self, finish: Finish) -> None:
        if self._text is not None and not self._stops.found:
            self._show(self._text.finish())
            if self._stops.found:
                finish = "stop"
            elif held := self._stops.finish():
                self._pieces.append(held)
        self._finish = finish
        self._changed.notify_all()
