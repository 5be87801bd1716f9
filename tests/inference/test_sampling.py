import math

import numpy as np
import pytest
import torch

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.inference import Sampling, generate
from sbn_lightning.inference.sampling import GREEDY, Sampler
from tests.inference.test_decoder import PROMPTS, make


def drawn_shares(sampling, probabilities, draws=40_000):
    logits = torch.tensor(probabilities, dtype=torch.float64).log().expand(draws, -1)
    return torch.bincount(sampling(logits), minlength=len(probabilities)).double() / draws


# The values are not sorted, so that rank and token id differ.
WEIGHTS = [0.05, 0.4, 0.1, 0.15, 0.3]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), WEIGHTS),
        (Sampling(0.5), [w**2 / sum(v**2 for v in WEIGHTS) for w in WEIGHTS]),
        (Sampling(1e300), [0.2] * 5),
        (Sampling(1.0, top_k=2), [0, 4 / 7, 0, 0, 3 / 7]),
        (Sampling(1.0, top_k=9), WEIGHTS),
        # 0.4 + 0.3 reaches 0.65, so the third token is left out. For 0.75 the third token is needed.
        (Sampling(1.0, top_p=0.65), [0, 4 / 7, 0, 0, 3 / 7]),
        (Sampling(1.0, top_p=0.75), [0, 0.4 / 0.85, 0, 0.15 / 0.85, 0.3 / 0.85]),
        (Sampling(1.0, top_p=1e-9), [0, 1, 0, 0, 0]),
        # top_p uses the probabilities among the top_k tokens: 4/7 alone is below 0.6.
        (Sampling(1.0, top_p=0.6, top_k=2), [0, 4 / 7, 0, 0, 3 / 7]),
        (Sampling(1.0, top_p=0.5, top_k=2), [0, 1, 0, 0, 0]),
        # A temperature of 0.5 squares the weights: 0.16 of 0.285 are above 0.5.
        (Sampling(0.5, top_p=0.5), [0, 1, 0, 0, 0]),
        (Sampling(0.0), [0, 1, 0, 0, 0]),
        (Sampling(1e-4), [0, 1, 0, 0, 0]),
        (Sampling(1e-300, top_p=0.9), [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling, expected):
    shares = drawn_shares(sampling, WEIGHTS)
    for share, wanted in zip(shares.tolist(), expected, strict=True):
        deviation = math.sqrt(wanted * (1 - wanted) / 40_000)
        assert abs(share - wanted) <= 4 * deviation


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_all_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should_be(vary):
    """The test of chi-square, with 1,023 degrees of freedom: a mean of 1,023 and a deviation of 45."""
    vocab, draws = 1024, 20_000
    logits = 0.5 * torch.randn(vocab, generator=torch.Generator().manual_seed(0))
    sampler, counts = Sampler(1000, torch.device("cpu")), torch.zeros(vocab)
    for start in range(0, draws, 1000):
        sampler.set_all(Sampling(1.0), start)
        positions = torch.zeros(1000, dtype=torch.int64)
        if vary == "position":
            for row in range(1000):
                sampler.set_row(row, Sampling(1.0), 7)
            positions = torch.arange(start, start + 1000)
        counts += torch.bincount(sampler.choose(logits.expand(1000, -1), positions), minlength=vocab)
    expected = draws * logits.softmax(-1)
    chi_square = float(((counts - expected).square() / expected).sum())
    assert abs(chi_square - 1023) < 4 * 45


@pytest.mark.parametrize("other", ["seed", "position"])
def test_rows_and_positions_are_drawn_independently(other):
    logits = torch.zeros(2000, 2)
    if other == "seed":
        pairs = Sampling(1.0)(logits, seed=1).view(-1, 2)
    else:
        pairs = torch.stack([Sampling(1.0)(logits[:1000], 1, position) for position in (4, 5)], 1)
    assert 400 < int((pairs[:, 0] == pairs[:, 1]).sum()) < 600


def test_a_row_draws_what_it_draws_alone_whatever_the_other_rows_do():
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 300).bfloat16()  # There are equal logits among these.
    settings = [Sampling(1.5, top_p=0.8), GREEDY, Sampling(1.5), Sampling(2.0, top_k=7), Sampling(0.9, 0.95, 20)]
    together, positions = Sampler(5, torch.device("cpu")), torch.tensor([3, 1, 4, 1, 5])
    for row, sampling in enumerate(settings):
        together.set_row(row, sampling, 10 + row)
    assert together.kind == "limited"
    chosen = together.choose(logits, positions)
    for row, sampling in enumerate(settings):
        alone = sampling(logits[row : row + 1], 10 + row, int(positions[row]))
        assert int(alone) == int(chosen[row])
        assert int(together.choose(logits[row : row + 1], positions[row : row + 1], row)) == int(chosen[row])
    assert int(chosen[1]) == int(logits[1].argmax())


def test_numbers_of_any_size_reach_the_device_and_change_no_other_row():
    """The temperature of a row is stored as bits, which a conversion to another dtype would change."""
    sampler = Sampler(2, torch.device("cpu"))
    sampler.set_row(0, Sampling(0.1), 2**64 - 3)
    sampler.set_row(1, Sampling(10**400, top_k=10**30), np.int64(-1))
    sampler.update_device()
    numbers = sampler._settings.view(torch.float64)[:, :2]
    assert numbers.tolist() == [[0.1, 1.0], [1e30, 1.0]]
    assert sampler._settings[:, 2:].tolist() == [[0, -3], [2**62, -1]]
    sampler.set_row(1, Sampling(1.0, top_k=np.int64(5)), 0)
    sampler.update_device()
    assert sampler._settings[1, 2:].tolist() == [5, 0]


def test_settings_that_change_are_used_and_the_kind_follows():
    logits, position = torch.tensor([[0.0, 1.0, 0.5]]), torch.zeros(1, dtype=torch.int64)
    sampler = Sampler(1, torch.device("cpu"))
    assert sampler.kind == "greedy"
    seen = []
    for seed in range(200):
        sampler.set_row(0, Sampling(1.0, top_k=2), seed)
        seen.append(int(sampler.choose(logits, position)))
    assert set(seen) == {1, 2}
    sampler.set_row(0, Sampling(1.0), -3)
    assert sampler.kind == "drawn"
    sampler.set_row(0, GREEDY, 3)
    assert sampler.kind == "greedy"
    assert sampler.choose(logits, position).tolist() == [1]


def test_tokens_as_likely_as_the_last_one_that_stays_can_be_drawn():
    logits = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0]).expand(2000, -1)
    for sampling in (Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.5)):
        assert set(sampling(logits).tolist()) == {1, 2, 3, 4}


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0), Sampling(1.0, top_p=0.9), Sampling(1.0, top_k=3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_infinities_and_nans(sampling, dtype):
    inf, nan = math.inf, math.nan
    logits = torch.tensor(
        [[-inf, -inf, 1, -inf], [-inf, inf, 3, inf], [0, nan, 3, nan], [-inf] * 4, [-inf, 0.5, -inf, 0.5]], dtype=dtype
    )
    for seed in range(20):
        *fixed, last = sampling(logits, seed).tolist()
        assert fixed == [2, 1, 1, 0]
        assert last in (1, 3)


def test_a_seed_gives_the_same_text_and_another_seed_another():
    model, sampling = make(), Sampling(1.0, top_p=0.9)
    first, again, other = (generate(model, PROMPTS, max_new_tokens=20, sampling=sampling, seed=s) for s in (3, 3, 40))
    assert first == again
    assert first != other
    assert first != generate(model, PROMPTS, max_new_tokens=20)
    assert generate(model, PROMPTS[1:2], max_new_tokens=20, sampling=sampling, seed=4) == first[1:2]


def test_a_text_that_is_cut_goes_on_as_it_would_have():
    model, sampling = make(), Sampling(1.0)
    (whole,) = generate(model, PROMPTS[:1], max_new_tokens=20, sampling=sampling, seed=3)
    (rest,) = generate(model, [[*PROMPTS[0], *whole[:8]]], max_new_tokens=12, sampling=sampling, seed=3)
    assert rest == whole[8:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, r"top_p=1\.1"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 2.0}, r"top_k=2\.0 is not an integer"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)


def test_a_generator_is_refused():
    with pytest.raises(ConfigError, match="a draw takes a seed, not a generator of torch"):
        Sampling(1.0)(torch.zeros(1, 3), torch.Generator())


def test_a_seed_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        generate(make(), PROMPTS, max_new_tokens=2, sampling=Sampling(1.0), seed=1.5)
