"""The choice of tokens equals its twin in the interpreter."""

import pytest
import torch
from sbn_kernels.sampling import choose_tokens, lowest_logits, lowest_logits_reference
from sbn_kernels.sampling.reference import noise
from sbn_kernels.sampling.threshold_reference import weights

from tests.kernels.sampling_cases import (
    check_against_twin,
    check_lowest,
    check_lowest_of_random_logits,
    check_lowest_of_special_values,
    check_special_values,
    limits_of,
    settings_of,
)

pytestmark = pytest.mark.usefixtures("poisoned_buffers")


@pytest.mark.parametrize("vocab", [1, 5, 255, 1024, 1025, 3001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_its_twin(vocab: int, dtype: torch.dtype) -> None:
    check_against_twin(vocab, dtype, "cpu")


def test_special_values() -> None:
    check_special_values("cpu")


def test_the_noise_has_the_moments_of_its_distribution() -> None:
    """Standard Gumbel: a mean of 0.5772 and a variance of pi^2 / 6. The deviations of the estimates are below 0.002."""
    found = noise(torch.arange(20), torch.arange(20), 50_000)
    assert abs(float(found.mean()) - 0.5772) < 0.006
    assert abs(float(found.var()) - 1.6449) < 0.02
    assert -2.9 < float(found.min()) < float(found.max()) < 23


def test_limits_may_have_any_strides() -> None:
    """A column of a table is read as it is, and not the memory behind its first number."""
    logits, positions = torch.randn(8, 50), torch.zeros(8).long()
    table = torch.stack([logits.max(1).values, torch.full((8,), float("-inf"))], 1)
    tokens = choose_tokens(logits, settings_of((100.0,) * 8, list(range(8))), positions, table[:, 0])
    assert torch.equal(tokens, logits.argmax(1))


def test_no_rows() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert choose_tokens(torch.zeros(0, 5), torch.zeros(0, 4, dtype=torch.int64), nothing).shape == (0,)


def test_what_does_not_fit_is_refused() -> None:
    logits, settings, positions = torch.zeros(2, 5), settings_of((1.0, 0.0), [1, 2]), torch.zeros(2).long()
    with pytest.raises(ValueError, match=r"logits must be floating point \[rows, vocab > 0\]"):
        choose_tokens(logits.long(), settings, positions)
    with pytest.raises(ValueError, match="logits must be float32, bfloat16 or float16"):
        choose_tokens(logits.double(), settings, positions)
    with pytest.raises(ValueError, match=r"settings must be int64 \[2, 4\]"):
        choose_tokens(logits, settings[:1], positions)
    with pytest.raises(ValueError, match=r"positions must be int64 \[2\]"):
        choose_tokens(logits, settings, positions.int())
    with pytest.raises(ValueError, match=r"lowest must be float32 \[2\]"):
        choose_tokens(logits, settings, positions, torch.zeros(3))
    with pytest.raises(ValueError, match="settings and positions must be contiguous"):
        choose_tokens(logits, settings.repeat(1, 2)[:, ::2], positions)
    with pytest.raises(ValueError, match="logits must be bfloat16 or float16, not"):
        lowest_logits(logits, settings)
    with pytest.raises(ValueError, match="settings must be contiguous"):
        lowest_logits(logits.half(), settings.repeat(1, 2)[:, ::2])
    with pytest.raises(ValueError, match=r"settings must be int64 \[2, 4\]"):
        lowest_logits_reference(logits, settings[:1])


@pytest.mark.parametrize(("vocab", "dtype"), [(5, torch.float16), (1025, torch.bfloat16)], ids=str)
def test_the_lowest_logit_equals_its_twin(vocab: int, dtype: torch.dtype) -> None:
    check_lowest_of_random_logits(vocab, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_lowest_logit_of_special_values(dtype: torch.dtype) -> None:
    check_lowest_of_special_values(dtype, "cpu")


def test_random_limits() -> None:
    torch.manual_seed(0)
    for _ in range(4):
        logits = (4 * torch.randn(8, 700)).round(decimals=int(torch.randint(0, 3, ()))).bfloat16()
        limits = [
            (2.0 ** (6 * torch.rand(()).item() - 3), torch.rand(()).item() ** 0.25, int(torch.randint(0, 900, ())))
            for _ in range(8)
        ]
        found = check_lowest(logits, limits_of(limits))
        for row, (temperature, top_p, top_k) in enumerate(limits):  # The definition, with probabilities of float64.
            values = logits[row].double()
            kept = values if top_k == 0 else values[values >= values.topk(min(top_k, 700)).values[-1]]
            shares = (kept / temperature).softmax(0)
            larger = [float(shares[kept > value].sum()) for value in kept.unique()]
            allowed = [value for value, share in zip(kept.unique().tolist(), larger, strict=True) if share < top_p]
            near = any(abs(share - top_p) < 1e-6 for share in larger)
            assert float(found[row]) == min(allowed) or near


def test_no_rows_have_no_lowest_logits() -> None:
    assert lowest_logits(torch.zeros(0, 5).half(), torch.zeros(0, 4, dtype=torch.int64)).shape == (0,)


def test_weights_are_exponentials() -> None:
    values = torch.linspace(-30, 0, 10_001)[None]
    found = weights(values, torch.zeros(1, 1), torch.full((1, 1), 0.9, dtype=torch.float64)).double()
    expected = 2.0**40 * (values.double() / 0.9).exp()
    assert float(found[0, -1]) == 2.0**40
    assert bool(((found - expected).abs() <= 1 + 2e-6 * expected).all())
