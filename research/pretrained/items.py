"""Tasks for the lm-evaluation-harness, made of held-out text: names that come again, and the line that comes next.

``python -m research.pretrained tasks`` writes a folder with three tasks. ``sbn evaluate --tasks NAME --tasks_folder
FOLDER`` asks them with the harness, and so does ``lm_eval --include_path FOLDER --tasks NAME`` for an exported model.
The study itself scores the same items with :func:`score_items`, since the harness is not needed for that.

* ``heldout_names``: code up to the second occurrence of a long name that is in no other chosen document. The model
  must write the name. An item is right if each token of the name is the most likely one.
* ``heldout_code``: twelve lines of code, and four lines of which one is the next one. The others come from elsewhere
  in the same document, so that the topic alone gives nothing away.
* ``heldout_english``: the same with the sentences of English documentation.

The choice with the highest log-probability counts, and also with the highest log-probability a byte (``acc_norm``).
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from sbn_lightning.core.files import write_text

# Ten characters or more, and more than one word: read_lines or LineReader, but not Foundation or __init__.
NAME = re.compile(r"\b(?!__)(?=\w*[a-z0-9](?:_|[A-Z]))[A-Za-z_][A-Za-z_0-9]{9,}\b")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
CHOICES = 4
# The most questions about one document. There is less English text than code.
PER_DOCUMENT = {"names": 3, "code": 3, "english": 10}
# The number of characters and lines before a question.
CONTEXT, LINES, SENTENCES = 700, 12, 3


@dataclass(frozen=True)
class Item:
    """A question: a text, and the texts that may follow it.

    Attributes:
        context: The text before.
        choices: The possible continuations. A single one is to be written by the model.
        answer: The place of the right one.
    """

    context: str
    choices: list[str]
    answer: int = 0


# Rows of token ids and how many tokens at the end of each are scored -> log-probability of the end, and whether each
# of its tokens is the most likely one.
Score = Callable[[Sequence[Sequence[int]], Sequence[int]], list[tuple[float, bool]]]


def make_items(documents: dict[str, Sequence[str]], count: int = 200, seed: int = 0) -> dict[str, list[Item]]:
    """Make the items of the three tasks.

    Args:
        documents: The held-out documents of each kind, ``"code"`` and ``"english"``.
        count: The largest number of items of a task.
        seed: The seed of the choices.
    """
    rng = random.Random(seed)
    found = {
        "heldout_names": list(_names(documents["code"])),
        "heldout_code": [item for text in documents["code"] for item in _next_lines(text, rng)],
        "heldout_english": [item for text in documents["english"] for item in _next_sentences(text, rng)],
    }
    return {task: rng.sample(items, min(count, len(items))) for task, items in found.items()}


def _names(documents: Sequence[str]) -> Iterator[Item]:
    """Yield some items of each document: the second occurrence of a name, not far after the first one."""
    of_document = [set(NAME.findall(text)) for text in documents]
    documents_with = Counter(name for names in of_document for name in names)
    for text in documents:
        seen: dict[str, int] = {}
        items = []
        for match in NAME.finditer(text):
            name, place = match.group(), match.start()
            again = name in seen
            first = seen.setdefault(name, place)
            if (
                not again
                or documents_with[name] > 1
                or place - first > CONTEXT - 100
                or len(items) == PER_DOCUMENT["names"]
            ):
                continue
            start = text.find("\n", max(0, place - CONTEXT)) + 1
            if start <= first:
                # A space before the name belongs to the name, because tokens begin with their space.
                end = place - (text[place - 1] == " ")
                items.append(Item(text[start:end], [text[end : match.end()]]))
                seen[name] = -len(text)  # Each name is asked once.
        yield from items


def _next_lines(text: str, rng: random.Random) -> Iterator[Item]:
    lines = text.splitlines(keepends=True)
    # Half of the characters are letters, so that tables of numbers are left out.
    places = [i for i in range(LINES, len(lines)) if 20 <= len(lines[i].strip()) <= 100 and _letters(lines[i]) >= 0.5]
    for place in rng.sample(places, min(PER_DOCUMENT["code"], len(places))):
        far = [i for i in places if abs(i - place) > 2 * LINES and lines[i].strip() != lines[place].strip()]
        if len(far) >= CHOICES - 1:
            # The same indentation for all choices, so that it gives nothing away.
            line = lines[place]
            indent = line[: len(line) - len(line.lstrip())]
            wrong = [indent + lines[i].strip() + "\n" for i in rng.sample(far, CHOICES - 1)]
            yield _mixed("".join(lines[place - LINES : place]), line.rstrip() + "\n", wrong, rng)


def _letters(line: str) -> float:
    """Return the share of letters in a line that is not empty."""
    text = line.strip()
    return sum(map(str.isalpha, text)) / len(text)


def _next_sentences(text: str, rng: random.Random) -> Iterator[Item]:
    sentences = [" ".join(part.split()) for part in SENTENCE.split(text)]
    places = [i for i in range(SENTENCES, len(sentences)) if 40 <= len(sentences[i]) <= 250]
    for place in rng.sample(places, min(PER_DOCUMENT["english"], len(places))):
        far = [i for i in places if abs(i - place) > SENTENCES and sentences[i] != sentences[place]]
        if len(far) >= CHOICES - 1:
            context = " ".join(sentences[place - SENTENCES : place])[-CONTEXT:]
            wrong = [" " + sentences[i] for i in rng.sample(far, CHOICES - 1)]
            yield _mixed(context, " " + sentences[place], wrong, rng)


def _mixed(context: str, right: str, wrong: list[str], rng: random.Random) -> Item:
    answer = rng.randrange(CHOICES)
    return Item(context, [*wrong[:answer], right, *wrong[answer:]], answer)


def write_tasks(items: dict[str, list[Item]], folder: Path) -> None:
    """Write each task as a file of items and a description for the harness, with the absolute path of the items."""
    for task, found in items.items():
        data = folder.resolve() / f"{task}.jsonl"
        write_text(data, "".join(json.dumps(asdict(item)) + "\n" for item in found))
        chooses = len(found[0].choices) > 1 if found else True
        lines = [
            f"task: {task}",
            "dataset_path: json",
            f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}",
            "test_split: test",
            f"output_type: {'multiple_choice' if chooses else 'loglikelihood'}",
            'doc_to_text: "{{context}}"',
            *(
                ['doc_to_choice: "{{choices}}"', "doc_to_target: answer"]
                if chooses
                else ['doc_to_target: "{{choices[0]}}"']
            ),
            'target_delimiter: ""',
            "metric_list:",
            *(f"  - {{metric: {metric}}}" for metric in (("acc", "acc_norm") if chooses else ("acc",))),
        ]
        write_text(folder / f"{task}.yaml", "\n".join(lines) + "\n")


def read_items(folder: Path) -> dict[str, list[Item]]:
    """Return the items that :func:`write_tasks` wrote, by task."""
    return {
        path.stem: [Item(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(folder.glob("heldout_*.jsonl"))
    }


def score_items(
    items: dict[str, list[Item]], tokenizer: Tokenizer, score: Score, most_tokens: int, batch_size: int = 32
) -> dict[str, dict[str, float]]:
    """Return for each task the accuracy, its standard error, and the number of items.

    Args:
        items: The items by task.
        tokenizer: The tokenizer of the model.
        score: The model.
        most_tokens: The number of tokens that the model sees at most. The context is cut from the left.
        batch_size: The number of rows that are scored at once.
    """
    results = {}
    for task, found in items.items():
        rows = [_encode(tokenizer, item.context, choice, most_tokens) for item in found for choice in item.choices]
        scored: list[tuple[float, bool]] = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            scored += score([row for row, _ in part], [count for _, count in part])
        results[task] = _summary(found, scored)
    return results


def _encode(tokenizer: Tokenizer, context: str, choice: str, most_tokens: int) -> tuple[list[int], int]:
    """Return the tokens of both, and how many of them belong to the choice. The harness splits them in the same way."""
    whole = tokenizer.encode(context + choice, add_special_tokens=False).ids
    before = tokenizer.encode(context, add_special_tokens=False).ids
    count = max(1, len(whole) - len(before))
    return whole[-most_tokens:], min(count, most_tokens - 1)


def _summary(items: Sequence[Item], scored: Sequence[tuple[float, bool]]) -> dict[str, float]:
    rights: list[tuple[bool, bool]] = []
    logs: list[float] = []
    place = 0
    for item in items:
        own = scored[place : place + len(item.choices)]
        place += len(item.choices)
        logs.append(own[item.answer][0])
        if len(own) == 1:
            rights.append((own[0][1], own[0][1]))
            continue
        by_byte = [log / len(choice.encode()) for (log, _), choice in zip(own, item.choices, strict=True)]
        best = max(range(len(own)), key=lambda i: own[i][0])
        best_by_byte = max(range(len(own)), key=by_byte.__getitem__)
        rights.append((best == item.answer, best_by_byte == item.answer))
    count = max(1, len(rights))
    acc, norm = (sum(right[i] for right in rights) / count for i in range(2))
    return {
        "acc": acc,
        "acc_error": (acc * (1 - acc) / max(1, count - 1)) ** 0.5,
        "acc_norm": norm,
        "log_probability": sum(logs) / count,
        "items": len(rights),
    }
