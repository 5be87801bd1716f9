import math

import pytest
import torch

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.inference import Sampling, generate
from tests.inference.test_decoder import PROMPTS, make


def drawn_shares(sampling, probabilities, draws=40_000):
    logits = torch.tensor(probabilities, dtype=torch.float64).log().expand(draws, -1)
    tokens = sampling(logits, torch.Generator().manual_seed(0))
    return torch.bincount(tokens, minlength=len(probabilities)).double() / draws


# The values are not sorted, so that rank and token id differ.
WEIGHTS = [0.05, 0.4, 0.1, 0.15, 0.3]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), WEIGHTS),
        (Sampling(0.5), [w**2 / sum(v**2 for v in WEIGHTS) for w in WEIGHTS]),
        (Sampling(1.0, top_k=2), [0, 4 / 7, 0, 0, 3 / 7]),
        (Sampling(1.0, top_k=9), WEIGHTS),
        # 0.4 + 0.3 reaches 0.65, so the third token is left out. For 0.75 the third token is needed.
        (Sampling(1.0, top_p=0.65), [0, 4 / 7, 0, 0, 3 / 7]),
        (Sampling(1.0, top_p=0.75), [0, 0.4 / 0.85, 0, 0.15 / 0.85, 0.3 / 0.85]),
        (Sampling(1.0, top_p=1e-9), [0, 1, 0, 0, 0]),
        # top_p uses the probabilities among the top_k tokens: 4/7 alone is below 0.6.
        (Sampling(1.0, top_p=0.6, top_k=2), [0, 4 / 7, 0, 0, 3 / 7]),
        (Sampling(1.0, top_p=0.5, top_k=2), [0, 1, 0, 0, 0]),
        (Sampling(0.0), [0, 1, 0, 0, 0]),
        (Sampling(1e-4), [0, 1, 0, 0, 0]),
        (Sampling(1e-300), [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling, expected):
    shares = drawn_shares(sampling, WEIGHTS)
    for share, wanted in zip(shares.tolist(), expected, strict=True):
        deviation = math.sqrt(wanted * (1 - wanted) / 40_000)
        assert abs(share - wanted) <= 4 * deviation


def test_rows_are_drawn_independently():
    logits = torch.zeros(2000, 2)
    tokens = Sampling(1.0)(logits, torch.Generator().manual_seed(1))
    pairs = tokens.view(-1, 2)
    assert 400 < int((pairs[:, 0] == pairs[:, 1]).sum()) < 600


def test_a_seed_gives_the_same_text_and_another_seed_another():
    model, sampling = make(), Sampling(1.0, top_p=0.9)
    first, again, other = (generate(model, PROMPTS, max_new_tokens=20, sampling=sampling, seed=s) for s in (3, 3, 4))
    assert first == again
    assert first != other
    assert first != generate(model, PROMPTS, max_new_tokens=20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, r"top_p=1\.1"),
        ({"top_k": 0}, "top_k=0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)
