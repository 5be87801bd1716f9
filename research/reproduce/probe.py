"""Bracket matching in held-out code: a test that a model can fail while its loss stays good.

Wherever the text closes a bracket, the model is asked which kind of bracket closes here. Among all tokens that begin
with a closing bracket, is the most likely one of the right kind? The right kind is that of the innermost open bracket,
so the model has to remember a bracket from a few tokens ago, or from hundreds. Most brackets are round, so a model that
always answers ")" is often right. The accuracy is therefore balanced over the three kinds, where that answer scores a
third, and it is also given by the distance to the opening bracket.

Two kinds of places are left out: places whose opening bracket lies outside the window, and places where the text itself
does not match, such as brackets in strings and comments. After such a place the search for opening brackets starts
again. Brackets in a string that do match count as code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

OPEN, CLOSE = "([{", ")]}"
# The first distance, in tokens, of each bin of distances.
DISTANCES = (1, 8, 32, 128)


@dataclass
class Brackets:
    """The brackets in the tokens of a vocabulary.

    Attributes:
        inside: The brackets in each token's text, in order, by id; None for the token between documents.
        kind: The kind of each token, int64 ``[vocab_size]``: 0, 1 or 2 if the text begins with ``)``, ``]`` or ``}``
            after white space, else -1.
    """

    inside: list[str | None]
    kind: Tensor

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Brackets:
        """Return the brackets of a tokenizer that has an end-of-document token."""
        from sbn_lightning.data.tokenizer import find_eos

        texts: list[str | None] = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]
        texts[find_eos(tokenizer, None)[1]] = None
        return cls.of_texts(texts)

    @classmethod
    def of_texts(cls, texts: Sequence[str | None]) -> Brackets:
        """Return the brackets of a list of each token's text, by id; None for the token between documents."""
        inside = [None if text is None else "".join(c for c in text if c in OPEN + CLOSE) for text in texts]
        starts = [(text or "").lstrip()[:1] for text in texts]
        return cls(inside, torch.tensor([CLOSE.find(start) if start else -1 for start in starts]))


@dataclass
class Places:
    """The places where a window closes a bracket. Each tensor is int64 ``[places]``.

    Attributes:
        index: The place of the closing token in the window.
        kind: The kind of bracket that the token closes.
        distance: The number of tokens from the opening bracket to the closing one.
    """

    index: Tensor
    kind: Tensor
    distance: Tensor


def find_places(tokens: Sequence[int], brackets: Brackets) -> Places:
    """Return the places of a window (a sequence of ids) whose token closes a bracket that the window opened."""
    rows: list[tuple[int, int, int]] = []
    stack: list[tuple[str, int]] = []
    for index, token in enumerate(tokens):
        inside, kind = brackets.inside[token], int(brackets.kind[token])
        if inside is None:
            stack.clear()
            continue
        if kind >= 0 and stack and stack[-1][0] == OPEN[kind]:
            rows.append((index, kind, index - stack[-1][1]))
        for bracket in inside:
            if bracket in OPEN:
                stack.append((bracket, index))
            elif stack and stack[-1][0] == OPEN[CLOSE.index(bracket)]:
                stack.pop()
            else:
                stack.clear()
    columns = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).unbind(1)
    return Places(*columns)


@torch.no_grad()
def bracket_probe(
    model: Callable[[Tensor], Tensor], tokens: Tensor, brackets: Brackets, window: int = 512, batch_size: int = 16
) -> dict[str, Any]:
    """Ask a model which bracket closes.

    Args:
        model: The model: ids int64 ``[B, T]`` -> logits ``[B, T, vocab_size]`` of the next token at each place.
        tokens: The held-out text, int64 ``[tokens]``. It is cut into windows; tokens that fill no window are left out.
        brackets: The brackets of the vocabulary.
        window: The number of tokens in a window.
        batch_size: The number of windows that the model sees at once.

    Returns:
        ``places``, ``accuracy``, ``balanced_accuracy`` (mean over the kinds that occur) and ``always_round`` (the
        accuracy of always answering ``)``), and the same ``by_distance``.
    """
    device = next(model.parameters()).device if isinstance(model, torch.nn.Module) else tokens.device
    closing = torch.nonzero(brackets.kind >= 0).flatten()
    kind_of_closing = brackets.kind[closing]
    windows = tokens[: len(tokens) // window * window].reshape(-1, window)
    kinds, distances, answers = [], [], []
    for batch in windows.split(batch_size):
        logits = model(batch.to(device))[:, :, closing.to(device)]
        for row, scores in zip(batch, logits, strict=True):
            places = find_places(row.tolist(), brackets)
            best = scores[(places.index - 1).to(device)].argmax(-1).cpu()
            kinds.append(places.kind)
            distances.append(places.distance)
            answers.append(kind_of_closing[best])
    if not kinds:
        return _score(*3 * [torch.empty(0, dtype=torch.int64)])
    return _score(torch.cat(kinds), torch.cat(answers), torch.cat(distances))


def _score(kinds: Tensor, answers: Tensor, distances: Tensor) -> dict[str, Any]:
    bins = {}
    for low, high in zip(DISTANCES, (*DISTANCES[1:], None), strict=True):
        chosen = (distances >= low) & (distances < (high or 1 << 62))
        bins[f"{low}-{high - 1}" if high else f"{low}+"] = _accuracies(kinds[chosen], answers[chosen])
    return _accuracies(kinds, answers) | {"by_distance": bins}


def _accuracies(kinds: Tensor, answers: Tensor) -> dict[str, Any]:
    """Return the shares of right answers; None where there is no place."""
    if not len(kinds):
        return {"places": 0, "accuracy": None, "balanced_accuracy": None, "always_round": None}
    right = (kinds == answers).double()
    recalls = [float(right[kinds == kind].mean()) for kind in kinds.unique().tolist()]
    return {
        "places": len(kinds),
        "accuracy": float(right.mean()),
        "balanced_accuracy": sum(recalls) / len(recalls),
        "always_round": float((kinds == 0).double().mean()),
    }
