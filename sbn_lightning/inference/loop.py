"""The loop around a :class:`Decoder`: token ids in, token ids out.

The host runs ahead of the device and reads tokens back only where it must. :func:`generate` looks every
:data:`CHECK_EVERY` tokens whether all sequences have stopped. :func:`stream` reads each token one step late, while the
device computes the next one.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.inference.decoder import Decoder, StepKind
from sbn_lightning.inference.sampling import GREEDY, Sampling
from sbn_lightning.models.transformer import TernaryTransformer

CHECK_EVERY = 16


@dataclass
class Speed:
    """How much was generated, and how long it took.

    Attributes:
        prompt_tokens: The number of tokens read.
        prefill_seconds: The time until each sequence had its first new token.
        new_tokens: The number of tokens written by all sequences, up to where each stopped.
        decode_seconds: The time for all new tokens but the first of each sequence. On a GPU it includes the capture of
            the graph.
        sequences: The number of prompts.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0
    sequences: int = 0

    def __add__(self, other: Speed) -> Speed:
        """Add up two batches."""
        return Speed(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __str__(self) -> str:
        """Tokens a second, in one line."""
        decoded = self.new_tokens - self.sequences
        parts = [
            f"prefill {self.prompt_tokens} tokens, {self.prompt_tokens / max(self.prefill_seconds, 1e-9):.0f} tokens/s"
        ]
        if decoded > 0:
            parts.append(f"decode {decoded} tokens, {decoded / max(self.decode_seconds, 1e-9):.1f} tokens/s")
        return "; ".join(parts)


def generate(
    model: TernaryTransformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
    cuda_graph: bool | None = None,
    decode_step: StepKind = "graph",
    prefill_chunk: int | None = None,
    decoder: Decoder | None = None,
    speed: Speed | None = None,
) -> list[list[int]]:
    """Continue a batch of prompts, which may differ in length.

    With a greedy choice each prompt gets the tokens that it would get alone and without a cache, as far as the device
    computes the same sums in a batch.

    Args:
        model: The model, on the device to use.
        prompts: The token ids of each prompt, none empty.
        max_new_tokens: How many tokens to add to each prompt at most; fewer where the model's context ends.
        sampling: How tokens are chosen; greedy if not given.
        seed: The seed of the first prompt's draws. The next prompt has the seed after it, and so on, so a prompt draws
            what it would draw alone. The same seed, prompts and device give the same tokens.
        stop_tokens: The ids that end a sequence; they are not part of the result.
        cuda_graph: Whether to capture a step as a CUDA graph; see :class:`Decoder`.
        decode_step: How a step is computed; ``step`` of :class:`Decoder`.
        prefill_chunk: The largest number of tokens of a prompt that are read at a time; None reads prompts at once.
        decoder: A decoder of this model with one row for each prompt. Several calls can use one decoder and share its
            CUDA graphs; a call without a decoder makes one and drops it. The decoder has its own settings, so
            ``cuda_graph``, ``decode_step`` and ``prefill_chunk`` cannot be given as well.
        speed: An object to fill in. Measuring waits twice for the device.

    Returns:
        The new token ids of each prompt.

    Raises:
        ConfigError: If a prompt is empty, or leaves no room for a new token in the model's context or in the decoder,
            if the decoder belongs to another model or comes with settings, or if the model cannot use ``decode_step``.
        StepTimeoutError: If a persistent step passed its deadline.
    """
    if decoder is not None:
        if not isinstance(decoder, Decoder):
            raise ConfigError(f"decoder: a {type(decoder).__name__} cannot be used again; leave the argument out")
        if decoder.model is not model:
            raise ConfigError("the decoder belongs to another model; make one of this model")
        if (cuda_graph, decode_step, prefill_chunk) != (None, "graph", None):
            raise ConfigError(
                "a decoder has its own cuda_graph, decode_step and prefill_chunk; give them where it is made"
            )
        rooms = _rooms(prompts, max_new_tokens, decoder.max_length, "the decoder's rows of {} (max_length)")
    else:
        rooms, decoder = _start(model, prompts, max_new_tokens, cuda_graph, decode_step, prefill_chunk)
    device = decoder.device
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=device)
    written = torch.zeros(len(prompts), max(rooms), dtype=torch.int64, device=device)
    stopped = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    count = 0
    started = first = time.perf_counter()
    for count, tokens in enumerate(_tokens(decoder, prompts, max(rooms), sampling, seed), start=1):
        written[:, count - 1] = tokens
        if count == 1 and speed is not None:
            _wait(device)
            first = time.perf_counter()
        if len(stops):
            stopped |= torch.isin(tokens, stops)
            if count % CHECK_EVERY == 0 and bool(stopped.all()):
                break
    decoder.check()
    rows = written[:, :count].tolist()
    ended = time.perf_counter()
    new = [_until_stop(row[:room], stop_tokens) for row, room in zip(rows, rooms, strict=True)]
    if speed is not None:
        speed.prompt_tokens, speed.prefill_seconds = sum(map(len, prompts)), first - started
        speed.new_tokens, speed.decode_seconds, speed.sequences = sum(map(len, new)), ended - first, len(prompts)
    return new


def stream(
    model: TernaryTransformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
    cuda_graph: bool | None = None,
    prefill_chunk: int | None = None,
    speed: Speed | None = None,
) -> Iterator[int]:
    """Continue one prompt, token by token; the arguments and the tokens are those of :func:`generate`.

    Yields:
        The new token ids, as they come.
    """
    (room,), decoder = _start(model, [prompt], max_new_tokens, cuda_graph, "graph", prefill_chunk)
    speed = Speed() if speed is None else speed
    speed.prompt_tokens, speed.new_tokens, speed.sequences = len(prompt), 0, 1
    started = time.perf_counter()
    for token in _late(_tokens(decoder, [prompt], room, sampling, seed), decoder.device):
        now = time.perf_counter()
        if speed.new_tokens == 0:
            speed.prefill_seconds = now - started
        speed.decode_seconds = now - started - speed.prefill_seconds
        if token in stop_tokens:
            return
        speed.new_tokens += 1
        yield token


def _start(
    model: TernaryTransformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    cuda_graph: bool | None,
    decode_step: StepKind,
    prefill_chunk: int | None,
) -> tuple[list[int], Decoder]:
    """Compute how many new tokens each prompt has room for, and make a decoder that holds them all."""
    limit = model.config.max_sequence_length
    rooms = _rooms(prompts, max_new_tokens, limit, "the model's context of {} (max_sequence_length)")
    longest = max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True))
    own_cache: Any = getattr(model, "make_decoder", None)
    if own_cache is not None:  # A model that is not our own transformer brings its own cache.
        return rooms, own_cache(len(prompts), longest)
    return rooms, Decoder(
        model, len(prompts), longest, cuda_graph=cuda_graph, step=decode_step, prefill_chunk=prefill_chunk
    )


def _rooms(prompts: Sequence[Sequence[int]], max_new_tokens: int, limit: int, where: str) -> list[int]:
    """Compute how many new tokens each prompt has room for, if a sequence can have ``limit`` tokens."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} is below 1")
    if not prompts:
        raise ConfigError("there is no prompt to continue")
    rooms = [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
    if min(rooms) < 1:
        i = rooms.index(min(rooms))
        raise ConfigError(
            f"prompt {i} has {len(prompts[i])} tokens, which leaves no room in {where.format(limit)}: shorten it"
        )
    return rooms


def _tokens(
    decoder: Decoder, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling, seed: int
) -> Iterator[Tensor]:
    """Yield the next token of each sequence, ``count`` times, int64 ``[B]``. The next step overwrites the tensor.

    The device may still compute the tokens when they are yielded.
    """
    decoder.sampler.set_all(sampling, seed)
    tokens = decoder.sampler.choose(decoder.prefill(prompts), decoder.lengths)
    for i in range(count):
        yield tokens
        if i + 1 < count:
            tokens = decoder.step_next(tokens)


def _late(tokens: Iterator[Tensor], device: torch.device) -> Iterator[int]:
    """Yield the first sequence's tokens on the host; each is read after the device was given the next step."""
    if device.type != "cuda":
        for step in tokens:
            yield int(step[0])
        return
    waiting: tuple[Tensor, torch.cuda.Event] | None = None
    for step in tokens:
        arrived = torch.empty(1, dtype=torch.int64, pin_memory=True).copy_(step[:1], non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        # The copy is queued before the next step and awaited after it: `tokens` is resumed in between.
        if waiting is not None:
            yield _read(*waiting)
        waiting = arrived, event
    if waiting is not None:
        yield _read(*waiting)


def _read(host: Tensor, event: torch.cuda.Event) -> int:
    event.synchronize()
    return int(host)


def _until_stop(tokens: list[int], stop_tokens: Collection[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stop_tokens), len(tokens))
    return tokens[:end]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
