"""Bracket matching, against cases made by hand."""

import pytest
import torch

from research.reproduce.probe import Brackets, bracket_probe, find_places

TEXTS = ["(", "[", "{", ")", "]", "}", " x", "):", "\n  ]", "f(", "()", "])", None]
IDS = {text: index for index, text in enumerate(TEXTS)}


@pytest.fixture
def brackets():
    return Brackets.of_texts(TEXTS)


def places(brackets, *texts):
    found = find_places([IDS[text] for text in texts], brackets)
    return list(zip(found.index.tolist(), found.kind.tolist(), found.distance.tolist(), strict=True))


def test_kinds_are_of_what_a_token_begins_with(brackets):
    assert brackets.kind.tolist() == [-1, -1, -1, 0, 1, 2, -1, 0, 1, -1, -1, 1, -1]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["(", " x", ")"], [(2, 0, 2)]),
        (["f(", "[", " x", "\n  ]", "):"], [(3, 1, 2), (4, 0, 4)]),
        (["{", "[", "()", "]", "}"], [(3, 1, 2), (4, 2, 4)]),
        (["f(", "[", "])"], [(2, 1, 1)]),
        ([")", "(", ")"], [(2, 0, 1)]),  # opened before the window
        (["(", "[", ")", ")"], []),  # does not match, so the open brackets are unknown
        (["(", None, ")"], []),  # in another document
        ([" x"], []),
    ],
)
def test_places(brackets, texts, expected):
    assert places(brackets, *texts) == expected


class Answers(torch.nn.Module):
    """A model that predicts the same token everywhere, or always the true next token."""

    def __init__(self, token=None, wrong_after=None):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.token, self.wrong_after = token, wrong_after

    def forward(self, tokens):
        following = tokens.roll(-1, 1) if self.token is None else torch.full_like(tokens, self.token)
        logits = torch.nn.functional.one_hot(following, len(TEXTS)).float()
        logits[..., IDS[" x"]] = 9.0  # closes no bracket, so it does not count although it is the most likely
        return self.scale * logits


def test_scores(brackets):
    window = ["(", " x", ")", "[", "{", "}", "]", " x"]
    tokens = torch.tensor([IDS[text] for text in [*window, *window, "("]])
    right = bracket_probe(Answers(), tokens, brackets, window=8, batch_size=1)
    assert (right["places"], right["accuracy"], right["balanced_accuracy"]) == (6, 1.0, 1.0)
    assert right["always_round"] == pytest.approx(1 / 3)
    assert right["by_distance"]["1-7"]["places"] == 6
    assert right["by_distance"]["8-31"] == {
        "places": 0,
        "accuracy": None,
        "balanced_accuracy": None,
        "always_round": None,
    }
    always = bracket_probe(Answers(IDS["):"]), tokens, brackets, window=8)
    assert always["accuracy"] == always["balanced_accuracy"] == pytest.approx(1 / 3)


def test_balance_and_distance(brackets):
    """Nine round brackets are near, a square one is far away. A model that always says round is right in 90 %."""
    texts = ["[", *9 * ["(", ")"], "]"]
    tokens = torch.tensor([IDS[text] for text in texts])
    always = bracket_probe(Answers(IDS[")"]), tokens, brackets, window=len(texts))
    assert always["accuracy"] == always["always_round"] == pytest.approx(0.9)
    assert always["balanced_accuracy"] == pytest.approx(0.5)
    assert always["by_distance"]["8-31"]["accuracy"] == 0.0
    assert always["by_distance"]["1-7"]["accuracy"] == 1.0


def test_no_window_is_no_place(brackets):
    assert bracket_probe(Answers(), torch.tensor([0, 1]), brackets, window=8)["places"] == 0


def test_a_real_tokenizer():
    from sbn_lightning.data.tokenizer import byte_tokenizer

    brackets = Brackets.of(byte_tokenizer())
    assert [int(brackets.kind[ord(c)]) for c in ")]}(a "] == [0, 1, 2, -1, -1, -1]
    assert brackets.inside[256] is None
    assert len(find_places([ord(c) for c in "f(x[1])"], brackets).kind) == 2
