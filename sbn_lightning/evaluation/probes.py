"""Small tasks that separate models where perplexity does not: copying, induction, sums, rare identifiers.

Each task is a set of rows of token ids, and some tokens of a row belong to an item. The model sees the whole row at
once, and an item is right if the model ranks each of the item's tokens first. The mean log-probability of these tokens
separates models that get almost no item right. The items of a row share their context. The
noise is therefore the standard error over rows: the deviation of the rows' accuracies, divided by the square root of
the number of rows.

* ``copy``: a span of :data:`SPAN` random tokens comes again after a distance. All tokens of the second span but the
  first :data:`ANNOUNCED` are items.
* ``induction``: a pair of random tokens comes again after a distance, and its second token is an item (the "induction
  heads" of Olsson et al., arXiv 2209.11895).
* ``sums``: lines such as ``23+45=68``. The sums after the first :data:`SHOTS` lines are items.
* ``identifiers``: held-out text. An item is a long name that came before in the row and comes in no other row, without
  its first token.

All other tokens of a row of ``copy`` and ``induction`` differ from each other, so nothing else can be copied.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data.tokenizer import find_eos

TaskName = Literal["copy", "induction", "sums", "identifiers"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
SPAN, ANNOUNCED, SHOTS = 16, 4, 8
DISTANCES = (32, 128, 512)
_NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]{7,}")
_WORD = re.compile(r" ?[A-Za-z]{2,}")


@dataclass(frozen=True)
class Task:
    """The rows of a task.

    Attributes:
        name: The name of the task.
        setting: What distinguishes the task from others of its name, for example ``"distance 128"``; may be empty.
        tokens: The token ids, int64 ``[rows, length]``.
        items: The number of the item that each token belongs to, int64 ``[rows, length]``; -1 for none. Numbers start
            anew in each row.
    """

    name: TaskName
    setting: str
    tokens: Tensor
    items: Tensor


@dataclass(frozen=True)
class Probed:
    """What a model did in a task.

    Attributes:
        task: The name of the task.
        setting: The setting of the task.
        accuracy: The share of items that were right: the mean over rows of the row's share.
        error: The standard error of ``accuracy``; NaN for a single row.
        log_probability: The mean logarithm of the probability of an item's token, in nats: the mean over rows of the
            row's mean. It separates models that get almost no item right.
        log_probability_error: The standard error of ``log_probability``; NaN for a single row.
        items: The number of items.
        rows: The number of rows with an item.
    """

    task: TaskName
    setting: str
    accuracy: float
    error: float
    log_probability: float
    log_probability_error: float
    items: int
    rows: int


def make_tasks(
    tokenizer: Tokenizer,
    length: int = 512,
    rows: int = 64,
    text: Tensor | None = None,
    seed: int = 0,
    names: Sequence[TaskName] = TASKS,
) -> list[Task]:
    """Make the rows of the tasks.

    Args:
        tokenizer: The tokenizer of the model.
        length: The number of tokens in a row.
        rows: The number of rows of each task.
        text: Held-out text for ``identifiers``, int64 ``[tokens]``. Without it this task is left out.
        seed: The seed of the random tokens and numbers.
        names: The tasks to make.

    Raises:
        ConfigError: If a row is too short for a task, or the vocabulary has too few words for a row.
    """
    if unknown := [name for name in names if name not in TASKS]:
        raise ConfigError(f"probe: {unknown[0]!r} is not one of {', '.join(TASKS)}")
    generator = torch.Generator().manual_seed(seed)
    tasks: list[Task] = []
    distances = [distance for distance in DISTANCES if distance + SPAN < length]
    if not distances:
        raise ConfigError(f"probe: length={length} is too short; take {DISTANCES[0] + SPAN + 1} or more")
    for name, span, announced in (("copy", SPAN, ANNOUNCED), ("induction", 2, 1)):
        if name in names:
            words = _words(tokenizer, length)
            tasks += [
                _repeated(name, words, rows, length, distance, span, announced, generator)  # type: ignore[arg-type]
                for distance in distances
            ]
    first = find_eos(tokenizer, None)[1]
    for task in tasks:
        task.tokens[:, 0] = first
    if "sums" in names:
        tasks.append(_sums(tokenizer, rows, length, first, generator))
    if "identifiers" in names and text is not None:
        tasks.append(_identifiers(tokenizer, rows, length, text))
    return tasks


def probe(logits: Callable[[Tensor], Tensor], tasks: Sequence[Task], batch_size: int = 16) -> list[Probed]:
    """Ask a model all tasks.

    Args:
        logits: The model: ids int64 ``[batch, length]`` -> logits ``[batch, length, vocab_size]`` of the next token.
        tasks: The tasks. A task without any item is left out.
        batch_size: The number of rows that the model sees at once. The last batch is filled up with its first row, so
            that a compiled model always sees one shape.
    """
    results = []
    for task in tasks:
        if not bool((task.items >= 0).any()):
            continue
        rights, logs = [], []
        for batch, items in zip(task.tokens.split(batch_size), task.items.split(batch_size), strict=True):
            filled = torch.cat((batch, batch[:1].expand(batch_size - len(batch), -1)))
            found = logits(filled)[: len(batch), :-1]
            asked = items[:, 1:] >= 0
            targets = batch[:, 1:][asked].unsqueeze(-1)
            chosen = found[asked.to(found.device)].float()
            right = torch.zeros_like(asked)
            right[asked] = chosen.argmax(-1).cpu() == targets.squeeze(-1)
            log = torch.zeros(asked.shape)
            log[asked] = chosen.log_softmax(-1).cpu().gather(-1, targets).squeeze(-1)
            rights.append(right)
            logs.append(log)
        results.append(_score(task, torch.cat(rights), torch.cat(logs)))
    return results


def as_records(results: Sequence[Probed]) -> list[dict[str, Any]]:
    """Return plain values for JSON, which has no NaN: the error of a single row is None."""
    return [{name: None if value != value else value for name, value in asdict(one).items()} for one in results]


def _score(task: Task, right: Tensor, log: Tensor) -> Probed:
    """Return the result of a task.

    Args:
        task: The task.
        right: Whether the token after each token was ranked first, bool ``[rows, length - 1]``.
        log: The logarithm of that token's probability, float32 ``[rows, length - 1]``.
    """
    shares: list[float] = []
    means: list[float] = []
    count = 0
    for row, logs, items in zip(right, log, task.items[:, 1:], strict=True):
        numbers = items[items >= 0].unique().tolist()
        if numbers:
            shares.append(sum(bool(row[items == number].all()) for number in numbers) / len(numbers))
            means.append(float(logs[items >= 0].mean()))
            count += len(numbers)
    return Probed(task.name, task.setting, *_mean(shares), *_mean(means), count, len(shares))


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is NaN for a single value."""
    tensor = torch.tensor(values, dtype=torch.float64)
    error = float(tensor.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return float(tensor.mean()), error


def _words(tokenizer: Tokenizer, length: int) -> Tensor:
    """Return the tokens that are words, or all tokens where too few of them are words, int64."""
    texts = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]
    words = [i for i, text in enumerate(texts) if _WORD.fullmatch(text)]
    chosen = words if len(words) >= length else list(range(len(texts)))
    if len(chosen) < length:
        raise ConfigError(
            f"probe: rows of {length} different tokens need a larger vocabulary than {len(texts)}; give a lower length"
        )
    return torch.tensor(chosen)


def _repeated(
    name: TaskName,
    words: Tensor,
    rows: int,
    length: int,
    distance: int,
    span: int,
    announced: int,
    generator: torch.Generator,
) -> Task:
    """Return rows in which spans come again after ``distance`` tokens, as many as fit."""
    tokens = torch.stack([words[torch.randperm(len(words), generator=generator)[:length]] for _ in range(rows)])
    items = torch.full_like(tokens, -1)
    number = 0
    for start in range(1, length - distance - span + 1, distance + span):
        again = start + distance
        tokens[:, again : again + span] = tokens[:, start : start + span]
        for place in range(again + announced, again + span):
            items[:, place] = number
            number += 1
    return Task(name, f"distance {distance}", tokens, items)


def _sums(tokenizer: Tokenizer, rows: int, length: int, first: int, generator: torch.Generator) -> Task:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]

    tokens = torch.full((rows, length), first)
    items = torch.full_like(tokens, -1)
    for row in range(rows):
        place, line = 1, 0
        while True:
            a, b = torch.randint(10, 100, (2,), generator=generator).tolist()
            question, answer, end = encode(f"{a}+{b}="), encode(str(a + b)), encode("\n")
            whole = [*question, *answer, *end]
            if place + len(whole) > length:
                break
            tokens[row, place : place + len(whole)] = torch.tensor(whole)
            if line >= SHOTS:
                items[row, place + len(question) : place + len(question) + len(answer)] = line
            place, line = place + len(whole), line + 1
    return Task("sums", "", tokens, items)


def _identifiers(tokenizer: Tokenizer, rows: int, length: int, text: Tensor) -> Task:
    tokens = text[: len(text) // length * length].long().view(-1, length)[:rows]
    texts = {i: _text_in_a_row(tokenizer, i) for i in tokens.unique().tolist()}
    found = [_names([texts[i] for i in row]) for row in tokens.tolist()]
    rows_with = Counter(name for names in found for name in {name for name, _, _ in names})
    items = torch.full_like(tokens, -1)
    for row, names in enumerate(found):
        seen: set[str] = set()
        for number, (name, first, end) in enumerate(names):
            if name in seen and rows_with[name] == 1:
                items[row, first + 1 : end] = number
            seen.add(name)
    return Task("identifiers", "", tokens, items)


def _text_in_a_row(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token that is not the first one. Some tokenizers drop the space of the first token."""
    once, twice = (tokenizer.decode([token] * count, skip_special_tokens=False) for count in (1, 2))
    return twice[len(once) :]


def _names(texts: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the long names in a row, each with its first token and the token after its last one.

    Only names that start and end with a token are taken; a space may come before the name in its first token.
    """
    starts: dict[int, int] = {}  # The place of a character in the row -> the token that starts there.
    place = 0
    for index, text in enumerate(texts):
        starts.setdefault(place + len(text) - len(text.lstrip(" ")), index)
        place += len(text)
    ends: dict[int, int] = {}  # The place after a character -> the token after the one that ends there.
    place = 0
    for index, text in enumerate(texts):
        place += len(text)
        ends.setdefault(place, index + 1)
    return [
        (match.group(), starts[match.start()], ends[match.end()])
        for match in _NAME.finditer("".join(texts))
        if match.start() in starts and match.end() in ends
    ]
