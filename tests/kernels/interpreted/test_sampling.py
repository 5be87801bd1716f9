"""The choice of tokens equals its twin in the interpreter."""

import pytest
import torch
from sbn_kernels.sampling import choose_tokens
from sbn_kernels.sampling.reference import noise

from tests.kernels.sampling_cases import check_against_twin, check_special_values, settings_of

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
