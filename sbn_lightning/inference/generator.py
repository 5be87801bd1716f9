"""Continuous use of a model from Python: prompts come at any time, and each gets its text as it is written.

:class:`Generator` keeps the model and the cache. A thread of its own runs the model
(:class:`~sbn_lightning.inference.engine.Engine`); any number of threads submit prompts and read texts. Serving over a
network is the work of vLLM, not of this class.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from sbn_lightning.core.errors import ConfigError, SBNError
from sbn_lightning.formats.loaded import LoadedModel
from sbn_lightning.inference.decoder import Decoder, StepKind
from sbn_lightning.inference.engine import Engine, Rows
from sbn_lightning.inference.head import HeadBits, use_head
from sbn_lightning.inference.loop import Speed
from sbn_lightning.inference.opening import BackendName, DTypeName, open_model
from sbn_lightning.inference.prompts import check_prompt, encode_prompt, stop_ids
from sbn_lightning.inference.request import Completion, Limits, Request

MAX_LENGTH = 4096  # The longest rows that are allocated without being asked for.


class QueueFullError(SBNError):
    """The queue of a generator is full, and the caller did not want to wait."""


class Generator:
    r"""Continue prompts in a batch that requests join and leave between two steps.

    A request gets the tokens that it would get alone, as far as the device computes the same sums: its prompt is read
    by itself, a step always computes the whole batch, and its draws come from its own seed. An error of one request,
    for example a lack of memory for a long prompt, does not end the others.

    ::

        with Generator.from_checkpoint("logs/sparse_pretrain") as generator:
            request = generator.submit("def f(", max_new_tokens=50, stop=["\n\n"])
            for piece in request:
                print(piece, end="", flush=True)

    Args:
        opened: The model; :func:`~sbn_lightning.inference.opening.open_model` makes it ready to run. Its weights must
            not change while the generator is in use.
        batch_size: The number of requests that run at the same time; others wait in a queue.
        max_length: The number of tokens that a sequence can have, prompt included. The cache has room for
            ``batch_size`` such sequences. None takes the model's context, and at most :data:`MAX_LENGTH` tokens.
        prefill_chunk: The largest number of prompt tokens read between two steps. A long prompt then takes bounded
            memory and does not hold up the others for long.
        queue_size: The number of requests that may wait.
        keep_prefixes: Whether a row keeps its tokens when its request has ended. A later prompt with the same
            beginning, such as the next turn of a chat, then reads only its new tokens. The logits are the same up to
            rounding, so a tie may be decided in another way.
        cuda_graph: Whether to use CUDA graphs; see :class:`Decoder`.
        decode_step: How a step is computed; see :class:`Decoder`.

    Raises:
        ConfigError: If an option is outside its range, or the model cannot use ``decode_step``.
    """

    def __init__(
        self,
        opened: LoadedModel,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        prefill_chunk: int = 2048,
        queue_size: int = 1024,
        keep_prefixes: bool = False,
        cuda_graph: bool | None = None,
        decode_step: StepKind = "auto",
    ) -> None:
        """Make a generator; its thread starts with the first request."""
        if max_length is None:
            max_length = min(opened.config.max_sequence_length, MAX_LENGTH)
        if queue_size < 1:
            raise ConfigError(f"queue_size={queue_size} is below 1")
        self._opened = opened
        self._decoder = _rows(opened, batch_size, max_length, prefill_chunk, cuda_graph, decode_step)
        self._device = self._decoder.device
        run_ahead = self._device.type == "cuda" and self._decoder.kind in ("graph", "persistent")
        self._engine = Engine(
            self._decoder, prefill_chunk=prefill_chunk, keep_prefixes=keep_prefixes, run_ahead=run_ahead
        )
        self._stop_tokens = frozenset() if opened.tokenizer is None else frozenset(stop_ids(opened, None))
        self._queue_size = queue_size
        self._queue: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str,
        *,
        tokenizer: str | None = None,
        device: str = "auto",
        dtype: DTypeName = "auto",
        backend: BackendName = "auto",
        compile: bool = False,
        head_bits: HeadBits = 16,
        **options: Any,
    ) -> Generator:
        """Load a model and make a generator of it.

        Args:
            checkpoint: The model, in any format that :func:`~sbn_lightning.formats.load_model` reads.
            tokenizer: A ``tokenizer.json`` or a folder with one; None takes the one that comes with the model.
            device: The device; see :func:`~sbn_lightning.inference.opening.open_model`, also for the next three.
            dtype: The dtype of everything but latent weights.
            backend: The kernels of ternary layers.
            compile: Whether to compile the model's blocks.
            head_bits: Bits for each weight of the head; see :func:`~sbn_lightning.inference.head.use_head`.
            **options: Options of :class:`Generator`.

        Raises:
            ConfigError: If an option cannot work here.
            DataError: If there is no such model, or the model is damaged.
        """
        opened = open_model(
            checkpoint, tokenizer=tokenizer, device=device, dtype=dtype, backend=backend, compile=compile
        )
        use_head(opened.model, head_bits)
        return cls(opened, **options)

    def submit(self, prompt: str | Sequence[int], *, chat: bool = False, wait: bool = True, **limits: Any) -> Request:
        """Hand in a prompt. Any thread may call this method.

        Args:
            prompt: A text, or token ids.
            chat: Whether the text is a message to a chat model.
            wait: Whether to wait while the queue is full.
            **limits: Fields of :class:`Limits`: ``max_new_tokens``, ``temperature``, ``top_p``, ``top_k``, ``seed``,
                ``stop`` and ``stop_tokens``.

        Returns:
            The request. Iterate over it for the text, call ``result()`` to wait for the end, or ``cancel()``.

        Raises:
            ConfigError: If a limit is outside its range, or the prompt is empty, too long, or of another vocabulary.
            DataError: If the prompt is a text and the model has no tokenizer.
            QueueFullError: If the queue is full and ``wait`` is False.
            SBNError: If the generator is closed.
        """
        return self._enqueue(self.prepare(prompt, Limits(**limits), chat=chat), wait)

    def generate(
        self, prompts: Iterable[str | Sequence[int]], *, chat: bool = False, seed: int = 0, **limits: Any
    ) -> list[Completion]:
        """Continue prompts, and wait for all of them.

        All prompts are checked before the first one runs.

        Args:
            prompts: Texts, or token ids.
            chat: Whether the texts are messages to a chat model.
            seed: The seed of the first prompt; the next prompt has ``seed + 1``, and so on.
            **limits: Fields of :class:`Limits`, the same for all prompts.

        Returns:
            What each prompt gave, in the order of the prompts.

        Raises:
            ConfigError: If a limit is outside its range, or a prompt cannot be used.
        """
        requests = [
            self.prepare(prompt, Limits(seed=seed + i, **limits), chat=chat, name=f"prompt {i}")
            for i, prompt in enumerate(prompts)
        ]
        for request in requests:
            self._enqueue(request, wait=True)
        return [request.result() for request in requests]

    def encode(self, prompt: str | Sequence[int], *, chat: bool = False) -> list[int]:
        """Turn a prompt into token ids; token ids stay as they are."""
        return encode_prompt(self._opened, prompt, chat=chat) if isinstance(prompt, str) else list(prompt)

    def prepare(
        self, prompt: str | Sequence[int], limits: Limits, *, chat: bool = False, name: str = "the prompt"
    ) -> Request:
        """Check a prompt and make a request of it, without handing it in.

        Args:
            prompt: A text, or token ids.
            limits: What is asked for.
            chat: Whether the text is a message to a chat model.
            name: What to call the prompt in messages.

        Raises:
            ConfigError: If the prompt is empty, leaves no room for a new token, or has an id beyond the vocabulary, or
                if the model has no tokenizer and stop strings are asked for.
        """
        ids = self.encode(prompt, chat=chat)
        if limits.stop and self._opened.tokenizer is None:
            raise ConfigError("stop strings need a tokenizer, and the model has none; use stop_tokens")
        check_prompt(ids, self._opened.config.vocab_size, name)
        most = self._decoder.max_length
        if len(ids) >= most:
            raise ConfigError(
                f"{name} has {len(ids)} tokens, which leaves no room in a sequence of {most} tokens (max_length; the "
                f"model's context is {self._opened.config.max_sequence_length}): shorten it"
            )
        stops = self._stop_tokens if limits.stop_tokens is None else frozenset(limits.stop_tokens)
        room = min(limits.max_new_tokens, most - len(ids))
        return Request(ids, limits, room, stops, self._opened.tokenizer)

    @property
    def speed(self) -> Speed:
        """What was read and written so far by all requests."""
        return replace(self._engine.speed)

    @property
    def reused_tokens(self) -> int:
        """How many prompt tokens were not read, because a row had them already."""
        return self._engine.reused_tokens

    @property
    def decode_choice(self) -> str:
        """How a decode step is computed, in one line."""
        return self._decoder.choice

    @property
    def max_length(self) -> int:
        """The number of tokens that a sequence can have, prompt included."""
        return self._decoder.max_length

    def close(self) -> None:
        """Cancel all requests and end the thread. A closed generator takes no more prompts."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Generator:
        """Use the generator in a ``with`` statement, which closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the generator."""
        self.close()

    def _enqueue(self, request: Request, wait: bool) -> Request:
        """Put a request into the queue."""
        with self._changed:
            if not wait and len(self._queue) >= self._queue_size and not self._closed:
                raise QueueFullError(f"{len(self._queue)} requests are waiting already (queue_size); try again later")
            self._changed.wait_for(lambda: self._closed or len(self._queue) < self._queue_size)
            if self._closed:
                raise SBNError("the generator is closed: it takes no more prompts")
            self._queue.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="sbn-generator", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return request

    def _run(self) -> None:
        """Take requests from the queue and run turns, until the generator is closed."""
        # The current device belongs to a thread, and some kernels and graphs run on the current device.
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            while self._wait_for_work():
                try:
                    self._engine.turn()
                except Exception as error:  # All rows were in this step, so none of their tokens can be used.
                    self._engine.abandon(error)

    def _wait_for_work(self) -> bool:
        """Fill free rows from the queue; wait while there is nothing to do. Return False once closed."""
        with self._changed:
            while True:
                if self._closed:
                    for request in self._queue:
                        request.end_cancelled()
                    self._queue.clear()
                    self._engine.cancel_all()
                    return False
                for request in [request for request in self._queue if request.cancelled]:
                    self._queue.remove(request)
                    request.end_cancelled()
                while self._queue and self._engine.has_room:
                    self._engine.admit(self._queue.popleft())
                self._changed.notify_all()
                if self._engine.is_busy:
                    return True
                self._changed.wait()


def _rows(
    opened: LoadedModel,
    batch_size: int,
    max_length: int,
    prefill_chunk: int,
    cuda_graph: bool | None,
    decode_step: StepKind,
) -> Rows:
    """Make the model and the cache that the engine runs."""
    own_rows = getattr(opened.model, "make_rows", None)
    if own_rows is None:
        return Decoder(
            opened.model,
            batch_size,
            max_length,
            cuda_graph=cuda_graph,
            step=decode_step,
            prefill_chunk=prefill_chunk,
        )
    # A model that is not our own transformer brings its own cache.
    if cuda_graph or decode_step == "persistent":
        raise ConfigError(
            f"{opened.path} is a model of transformers, which runs without cuda_graph and decode_step=persistent"
        )
    limit = opened.config.max_sequence_length
    if not 1 <= max_length <= limit:
        raise ConfigError(f"max_length={max_length} is outside 1 to the model's context of {limit} tokens")
    for option, number in (("batch_size", batch_size), ("prefill_chunk", prefill_chunk)):
        if number < 1:
            raise ConfigError(f"{option}={number} is below 1")
    rows: Rows = own_rows(batch_size, max_length)
    return rows
