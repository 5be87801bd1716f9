"""What ``sbn generate`` does with a model and its prompts: continue them and print the texts in their order.

A model of our own is continued by a :class:`~sbn_lightning.inference.generator.Generator`. A model of transformers
brings its own cache, which has no rows to join and leave, so its prompts run in batches.
"""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Sequence
from dataclasses import replace

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.formats.loaded import LoadedModel
from sbn_lightning.inference.decoder import StepKind
from sbn_lightning.inference.generator import Generator
from sbn_lightning.inference.loop import Speed, generate
from sbn_lightning.inference.loop import stream as stream_tokens
from sbn_lightning.inference.request import Limits
from sbn_lightning.inference.stops import StopStrings
from sbn_lightning.inference.text import TextStream


def continue_prompts(
    opened: LoadedModel,
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
    limits: Limits,
    *,
    batch_size: int,
    prefill_chunk: int,
    decode_step: StepKind,
    stream: bool,
    json: bool,
) -> None:
    """Continue prompts, and print the texts. The speed goes to stderr.

    Args:
        opened: The model.
        prompts: The prompts as the user gave them.
        ids: The token ids of each prompt, which fit into the model's context.
        limits: What is asked for. The first prompt has its seed, and each further prompt the seed after that.
        batch_size: How many prompts run at a time.
        prefill_chunk: The largest number of prompt tokens that are read at a time.
        decode_step: How a step is computed; see :class:`~sbn_lightning.inference.decoder.Decoder`.
        stream: Whether to print the text of a single prompt while it is generated.
        json: Whether to print one JSON list at the end.
    """
    printer = Printer(prompts, batch_size, json)
    is_streamed = stream and len(prompts) == 1 and not json
    if hasattr(opened.model, "make_decoder"):
        if decode_step == "persistent":
            raise ConfigError("decode_step=persistent is for models of our own transformer, not of transformers")
        _by_batches(opened, ids, limits, batch_size, is_streamed, printer)
    else:
        _by_generator(opened, ids, limits, batch_size, prefill_chunk, decode_step, is_streamed, printer)


class Printer:
    """Print what prompts have given, in the order of the prompts.

    Args:
        prompts: The prompts as the user gave them.
        batch_size: After how many prompts to say how many are done.
        json: Whether to print one JSON list at the end.
    """

    def __init__(self, prompts: Sequence[str], batch_size: int, json: bool) -> None:
        self._prompts, self._batch_size, self._json = prompts, batch_size, json
        self._rows: list[dict[str, str | int]] = []

    def add(self, text: str, tokens: int, finish: str) -> None:
        """Print the text of the next prompt."""
        prompt, count = self._prompts[len(self._rows)], len(self._prompts)
        self._rows.append({"prompt": prompt, "text": text, "tokens": tokens, "finish": finish})
        if not self._json:
            print(f"=== prompt {len(self._rows)}: {prompt}\n{text}\n" if count > 1 else text, flush=True)
        if len(self._rows) % self._batch_size == 0 and len(self._rows) < count:
            print(f"{len(self._rows)} of {count} prompts", file=sys.stderr)

    def finish(self, speed: Speed) -> None:
        """Print the list, if one is wanted, and the speed."""
        if self._json:
            print(json_format.dumps(self._rows, ensure_ascii=False, indent=2))
        print(speed, file=sys.stderr)


def _by_generator(
    opened: LoadedModel,
    ids: Sequence[Sequence[int]],
    limits: Limits,
    batch_size: int,
    prefill_chunk: int,
    decode_step: StepKind,
    is_streamed: bool,
    printer: Printer,
) -> None:
    """Continue all prompts in one batch that prompts join and leave."""
    with Generator(
        opened,
        batch_size=min(batch_size, len(ids)),
        max_length=min(opened.config.max_sequence_length, max(map(len, ids)) + limits.max_new_tokens),
        prefill_chunk=prefill_chunk,
        queue_size=len(ids),
        decode_step=decode_step,
    ) as generator:
        # Each prompt has a seed of its own. With one seed for all, equal prompts would draw alike.
        seeds = [(limits.seed + i) % (1 << 63) for i in range(len(ids))]
        requests = [
            generator.submit(given, **vars(replace(limits, seed=seed))) for given, seed in zip(ids, seeds, strict=True)
        ]
        if is_streamed:
            for piece in requests[0]:
                print(piece, end="", flush=True)
            print()
            print(f"decode step: {generator.decode_choice}\n{requests[0].speed}", file=sys.stderr)
            return
        words = opened.need_tokenizer()
        for request in requests:
            done = request.result()
            printer.add(done.text if limits.stop else words.decode(done.tokens), len(done.tokens), done.finish)
    # The paths are measured with the first step, so the choice is known only now.
    print(f"decode step: {generator.decode_choice}", file=sys.stderr)
    printer.finish(generator.speed)


def _by_batches(
    opened: LoadedModel,
    ids: Sequence[Sequence[int]],
    limits: Limits,
    batch_size: int,
    is_streamed: bool,
    printer: Printer,
) -> None:
    """Continue one batch of prompts after the other."""
    words, speed, stop_tokens = opened.need_tokenizer(), Speed(), limits.stop_tokens or ()
    if is_streamed:
        text, stops = TextStream(words), StopStrings(limits.stop)
        for token in stream_tokens(
            opened.model,
            ids[0],
            max_new_tokens=limits.max_new_tokens,
            sampling=limits.sampling,
            seed=limits.seed,
            stop_tokens=stop_tokens,
            speed=speed,
        ):
            print(stops.push(text.push(token)), end="", flush=True)
            if stops.found:
                break
        print(stops.push(text.finish()) + stops.finish())
        print(speed, file=sys.stderr)
        return
    for start in range(0, len(ids), batch_size):
        this, part = Speed(), ids[start : start + batch_size]
        new = generate(
            opened.model,
            part,
            max_new_tokens=limits.max_new_tokens,
            sampling=limits.sampling,
            seed=limits.seed + start,
            stop_tokens=stop_tokens,
            speed=this,
        )
        for given, tokens in zip(part, new, strict=True):
            room = min(limits.max_new_tokens, opened.config.max_sequence_length - len(given))
            stops = StopStrings(limits.stop)
            written = stops.push(words.decode(tokens))
            ended = "length" if len(tokens) == room and not stops.found else "stop"
            printer.add(written + stops.finish(), len(tokens), ended)
        speed += this
    printer.finish(speed)
