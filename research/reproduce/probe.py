"""Bracket matching in held-out code: a probe that can break while the loss stays.

Wherever the text closes a bracket, the model is asked which kind closes here: of all tokens that begin with a closing
bracket, is the most likely one of the right kind? The right kind is that of the innermost open bracket, so the model
has to remember it, from a few tokens ago or from hundreds. Round brackets are most of them, and who always answers ")"
is often right: accuracy is balanced over the three kinds (that one gets a third), and given by distance to the opener.

Left out: places whose opener lies outside the window, and those where the text itself does not match (brackets in
strings and comments); after such a place the search for openers starts anew. What brackets a string holds that do match
counts as code.
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
DISTANCES = (1, 8, 32, 128)  # where bins of distances, in tokens, begin


@dataclass
class Brackets:
    """What a vocabulary's tokens say of brackets.

    Attributes:
        inside: Brackets in each token's text, in order, by id; None for the token between documents.
        kind: Of each token: 0, 1, 2 for one whose text begins with ``)``, ``]``, ``}`` after white space, else -1;
            int64 ``[vocab_size]``.
    """

    inside: list[str | None]
    kind: Tensor

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Brackets:
        """Of a tokenizer with an end-of-document token."""
        from sbn_lightning.data.tokenizer import find_eos

        texts: list[str | None] = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]
        texts[find_eos(tokenizer, None)[1]] = None
        return cls.of_texts(texts)

    @classmethod
    def of_texts(cls, texts: Sequence[str | None]) -> Brackets:
        """Of each token's text, by id; None for the token between documents."""
        inside = [None if text is None else "".join(c for c in text if c in OPEN + CLOSE) for text in texts]
        starts = [(text or "").lstrip()[:1] for text in texts]
        return cls(inside, torch.tensor([CLOSE.find(start) if start else -1 for start in starts]))


@dataclass
class Places:
    """Where a window closes a bracket, each tensor int64 ``[places]``.

    Attributes:
        index: The place of the closing token in the window.
        kind: Which bracket it closes.
        distance: Tokens from the opener to it.
    """

    index: Tensor
    kind: Tensor
    distance: Tensor


def find_places(tokens: Sequence[int], brackets: Brackets) -> Places:
    """Places of a window, a sequence of ids, at which the next token closes a bracket that was opened in it."""
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
    """Asks a model which bracket closes.

    Args:
        model: Ids int64 ``[B, T]`` -> logits ``[B, T, vocab_size]``; the next token's at each place.
        tokens: Held-out text, int64 ``[tokens]``; cut into windows, and what does not fill one is left out.
        brackets: Of the vocabulary.
        window: Tokens the model sees at a time.
        batch_size: Windows at a time.

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
    """Shares of right answers; None where nothing was asked."""
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
