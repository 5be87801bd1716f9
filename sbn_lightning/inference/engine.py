"""The rows of a decoder as places for requests: requests join and leave between two steps.

A *turn* does three things: it frees the rows of cancelled requests, reads a bounded number of prompt tokens for the
rows that start, and steps all rows that write. This file knows nothing of threads and queues;
:mod:`~sbn_lightning.inference.generator` has those.

A request gets the tokens that it would get alone. Its prompt is read in a batch of one. A step computes all rows of the
cache, busy or not, so the shapes of its sums never change. A draw depends on the request's own seed and on the position
of the new token.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sbn_lightning.inference.buckets import to_device
from sbn_lightning.inference.loop import Speed
from sbn_lightning.inference.request import Request
from sbn_lightning.inference.sampling import GREEDY, Sampler

# A shorter common beginning is read again. A whole prompt may run as a CUDA graph, and on GPUs other than Hopper the
# rest of a prompt does not.
LEAST_REUSED = 16


class Rows(Protocol):
    """A model and a cache with rows: what the engine runs. :class:`~sbn_lightning.inference.decoder.Decoder` is one.

    Attributes:
        batch_size: The number of rows.
        max_length: The number of tokens that a row can have.
        device: The device of the logits.
        choice: How a step is computed, in one line.
        kind: How a step is computed, in one word.
        flag: A number on the device that is not 0 once a step has failed; None if steps do not fail on the device.
        lengths: The number of tokens of each row, int64 ``[B]``.
        growing: 1 for each row that a step makes longer and 0 for the others, int64 ``[B]``.
        sampler: Has the settings of each row, and chooses tokens.
    """

    batch_size: int
    max_length: int
    device: torch.device
    lengths: Tensor
    growing: Tensor
    sampler: Sampler

    @property
    def choice(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def flag(self) -> Tensor | None: ...

    def extend(self, row: int, tokens: Sequence[int], start: int) -> Tensor:
        """Read tokens into a row, behind its first ``start`` tokens; return the next logits ``[1, vocab_size]``."""
        ...

    def step_next(self, tokens_B: Tensor) -> Tensor:
        """Add a token to each row that grows; return the next tokens, int64 ``[B]``, until the next step."""
        ...

    def check(self) -> None:
        """Raise an error if the steps so far are not valid."""
        ...


@dataclass
class _Row:
    """One row of the cache.

    Attributes:
        index: The number of the row.
        request: The request that has the row; None for a free row.
        cached: The tokens whose keys and values the row holds, as far as the host knows them.
        chosen: How many tokens were chosen for the request; 0 while its prompt is read.
        last_used: A number that grows with every request that gets a row.
    """

    index: int
    request: Request | None = None
    cached: list[int] = field(default_factory=list)
    chosen: int = 0
    last_used: int = 0


@dataclass
class _Step:
    """The tokens of a step on their way to the host."""

    tokens: Tensor
    flag: Tensor | None
    arrived: torch.cuda.Event | None
    rows: list[tuple[_Row, Request]]

    def read(self, check: Callable[[], object]) -> Iterator[tuple[_Row, Request, int]]:
        """Wait for the tokens. If the flag says that the step has failed, ``check`` raises the error."""
        if self.arrived is not None:
            self.arrived.synchronize()
        if self.flag is not None and int(self.flag):
            check()
        tokens = self.tokens.tolist()
        for row, request in self.rows:
            yield row, request, tokens[row.index]


class Engine:
    """Continue requests in the rows of a decoder.

    Args:
        decoder: The decoder; nothing else may use it.
        prefill_chunk: The largest number of prompt tokens that a turn reads.
        keep_prefixes: Whether a free row keeps its tokens, so that a later prompt with the same beginning reads only
            the rest.
        run_ahead: Whether the device gets the next step before the host reads the tokens of the last one. A request
            that has ended then costs one more step, which is thrown away.
    """

    def __init__(self, decoder: Rows, *, prefill_chunk: int, keep_prefixes: bool, run_ahead: bool) -> None:
        """Start with free rows."""
        self._decoder, self._chunk, self._keep = decoder, prefill_chunk, keep_prefixes
        self._run_ahead = run_ahead
        self._rows = [_Row(i) for i in range(decoder.batch_size)]
        self._tokens = torch.zeros(decoder.batch_size, dtype=torch.int64, device=decoder.device)
        self._growing: list[int] | None = None
        self._pending: _Step | None = None
        self._count = itertools.count(1)
        self.reused_tokens = 0
        self.speed = Speed()

    @property
    def has_room(self) -> bool:
        """Whether a row is free."""
        return any(row.request is None for row in self._rows)

    @property
    def is_busy(self) -> bool:
        """Whether a row has a request."""
        return any(row.request is not None for row in self._rows)

    def admit(self, request: Request) -> None:
        """Give a request a free row. The caller has made sure that there is one, and that the prompt fits."""
        free = [row for row in self._rows if row.request is None]
        row = max(free, key=lambda row: (self._shared(row, request), -row.last_used))
        shared = self._shared(row, request)
        row.request, row.chosen, row.last_used = request, 0, next(self._count)
        self._decoder.sampler.set_row(row.index, request.sampling, request.limits.seed)
        row.cached = row.cached[:shared]
        self.reused_tokens += shared
        self.speed.sequences += 1
        self.speed.prompt_tokens += len(request.prompt) - shared

    def turn(self) -> None:
        """Go on with every request: by some tokens of its prompt, or by one new token."""
        for row in self._rows:
            if row.request is not None and row.request.cancelled:
                row.request.end_cancelled()
                self._leave(row)
        started = time.perf_counter()
        self._read_prompts()
        read = time.perf_counter()
        self._step()
        self.speed.prefill_seconds += read - started
        self.speed.decode_seconds += time.perf_counter() - read

    def cancel_all(self) -> None:
        """End all requests where they are."""
        for row in self._rows:
            if row.request is not None:
                row.request.end_cancelled()
                self._leave(row)

    def abandon(self, error: BaseException) -> None:
        """Fail all requests, and forget what the rows hold."""
        self._pending = self._growing = None
        for row in self._rows:
            if row.request is not None:
                row.request.fail(error)
            row.request, row.cached = None, []
            self._decoder.sampler.set_row(row.index, GREEDY, 0)

    def _shared(self, row: _Row, request: Request) -> int:
        """How many tokens at the beginning of a prompt a free row holds already."""
        # The last token of the prompt has to be read in any case, because its logits are needed.
        pairs = zip(row.cached, request.prompt[:-1], strict=False)
        count = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return count if count >= LEAST_REUSED else 0

    def _read_prompts(self) -> None:
        read = 0
        starting = [row for row in self._rows if row.request is not None and row.chosen == 0]
        for row in sorted(starting, key=lambda row: row.last_used):
            request = row.request
            assert request is not None
            # Parts have the same lengths whatever the other requests read, so sums have the same shapes.
            part = request.prompt[len(row.cached) : len(row.cached) + self._chunk]
            if read and read + len(part) > self._chunk:
                return
            read += len(part)
            try:
                logits = self._decoder.extend(row.index, part, len(row.cached))
                row.cached += part
                if len(row.cached) == len(request.prompt):
                    position = to_device([len(row.cached)], logits.device)
                    first = self._decoder.sampler.choose(logits, position, row.index)
                    self._tokens[row.index : row.index + 1] = first
                    row.chosen = 1
                    # The host waits for the first token, so that the reader gets it at once.
                    self._give(row, request, int(first))
            except Exception as error:  # Only this request has a part in the error.
                request.fail(error)
                row.cached = []
                self._leave(row)

    @torch.no_grad()
    def _step(self) -> None:
        writing = [
            (row, row.request) for row in self._rows if row.request is not None and 0 < row.chosen < row.request.room
        ]
        waiting, self._pending = self._pending, None
        if writing:
            self._grow({row.index for row, _ in writing})
            self._tokens = self._decoder.step_next(self._tokens)  # A decoder reads its own tensor without a copy.
            for row, _ in writing:
                row.chosen += 1
            self._pending = self._send(writing)
            if not self._run_ahead:
                self._decoder.check()
                waiting, self._pending = self._pending, None
        if waiting is not None:
            for row, request, token in waiting.read(self._decoder.check):
                if row.request is request:  # Otherwise the request has ended, and this token is one too many.
                    self._give(row, request, token)

    def _grow(self, rows: set[int]) -> None:
        growing = [int(row.index in rows) for row in self._rows]
        if growing != self._growing:
            self._decoder.growing.copy_(to_device(growing, self._decoder.growing.device))
            self._growing = growing

    def _send(self, writing: list[tuple[_Row, Request]]) -> _Step:
        if self._tokens.device.type != "cuda":
            return _Step(self._tokens.clone(), None, None, writing)
        host = torch.empty(self._tokens.shape, dtype=torch.int64, pin_memory=True)
        host.copy_(self._tokens, non_blocking=True)
        # The flag travels with the tokens, so that the host does not wait for the device a second time.
        flag = self._decoder.flag
        if flag is not None:
            flag = torch.empty((), dtype=flag.dtype, pin_memory=True).copy_(flag, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return _Step(host, flag, arrived, writing)

    def _give(self, row: _Row, request: Request, token: int) -> None:
        if request.written:  # The step that gave this token has read the token before it.
            row.cached.append(request.written[-1])
        try:
            before = request.speed.new_tokens
            request.take(token)
            self.speed.new_tokens += request.speed.new_tokens - before
        except Exception as error:  # For example of the tokenizer. The other requests go on.
            request.fail(error)
        if request.done:
            self._leave(row)

    def _leave(self, row: _Row) -> None:
        """Free a row, and let it keep its tokens if that is wanted."""
        row.request = None
        self._decoder.sampler.set_row(row.index, GREEDY, 0)
        # A free row is computed in every step, and writes into the slot behind its tokens. So that slot has to exist.
        row.cached = row.cached[: self._decoder.max_length - 1] if self._keep else []
        self._decoder.lengths[row.index : row.index + 1].fill_(len(row.cached))
