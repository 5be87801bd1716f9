"""Stochastic rounding of gradients: the draws, no bias over many of them, and arguments that are refused.

On a GPU the kernel is tested, elsewhere the plain-PyTorch twin. ``interpreted`` and ``test_gradient_gpu`` test that the
kernel equals the twin bit for bit.
"""

import pytest
import sbn_kernels as sk
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SEEDS = 1000


def seed(value: int) -> Tensor:
    return torch.tensor([value], device=DEVICE)


def case() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    size = 10 ** torch.empty(36, 1, device=DEVICE).uniform_(-6, 1)
    dy = torch.randn(36, 40, device=DEVICE) * size
    return dy, torch.rand(40, device=DEVICE) + 0.01, torch.rand(36, device=DEVICE) + 0.01


def test_draws_are_philox() -> None:
    """Random123 publishes the answer for philox4x32-7 with key and counter zero: eight tokens of the first channel."""
    words = torch.tensor([0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48], device=DEVICE)
    draws = sk.gradient_draws(10, 5, seed(0))
    assert torch.equal(draws[:8:2, 0], words & 0x7FFF)
    assert torch.equal(draws[1:8:2, 0], words >> 17)


def test_draws_are_uniform_and_independent() -> None:
    """Mean, variance and correlations of the draws are within five standard errors."""
    draw, stream, key = (
        sk.gradient_draws(512, 600, seed(s), n).double().flatten() / 2**15 for s, n in ((5, 2), (5, 3), (6, 2))
    )
    error = 5 / draw.numel() ** 0.5
    for draws in (draw, stream, key):
        assert abs(draws.mean() - 0.5) < error * 12**-0.5 + 2**-15
        assert abs(draws.var() - 1 / 12) < error * 180**-0.5 + 2**-15
    shifted = [(draw[by:], draw[:-by]) for by in (1, 600, 1200, 4800)]
    for left, right in [(draw, stream), (draw, key), *shifted]:
        assert abs(torch.corrcoef(torch.stack([left, right]))[0, 1]) < error


def test_unbiased() -> None:
    """Over many seeds, the mean of every element of both gradients is as close to the truth as its variance allows."""
    dy, gamma, scale = case()
    x8 = torch.randint(-128, 128, (36, 24), device=DEVICE).double()
    codes = torch.randint(-1, 2, (40, 24), device=DEVICE).double()
    quantize = sk.quantize_gradient if ON_GPU else sk.quantize_gradient_reference
    totals = [torch.zeros(36, 40, dtype=torch.double, device=DEVICE) for _ in range(2)]
    for value in range(SEEDS):
        q = quantize(dy, gamma, scale, seed(value), 1)
        totals[0] += q.tokens.double() * q.token_scale[:, None].double()
        totals[1] += (q.channels.double() * q.channel_scale[:, None].double()).t()
    # a value, its step, and the factor it has in the gradient: dX = a T, dW = b^T x8
    truth = (
        (dy.double() * gamma, q.token_scale[:, None].double(), lambda a: a, codes),
        (dy.double() * scale[:, None], q.channel_scale.double(), lambda b: b.t(), x8),
    )
    for total, (value, step, order, factor) in zip(totals, truth, strict=True):
        error = total / SEEDS - value
        part = value / step - (value / step).floor()
        variance = part * (1 - part) * step**2 / SEEDS
        few = 10 / SEEDS * step + 1e-6 * value.abs()  # a sum of few rare events has heavier tails than a normal one
        assert (error.abs() <= 5 * variance.sqrt() + few).all()
        summed = (order(error) @ factor).abs()
        assert (summed <= 5 * (order(variance) @ factor**2).sqrt() + order(few) @ factor.abs() / 10).all()
        assert summed.max() > 0


def test_codes_stay_in_range_and_zero_stays_zero() -> None:
    dy, gamma, scale = case()
    dy[3], dy[:, 7] = 0, 0
    for value in range(20):
        q = sk.quantize_gradient_reference(dy, gamma, scale, seed(value))
        assert q.tokens.min() >= -127
        assert q.channels.min() >= -127
        assert q.tokens.abs().amax(1).ne(127).nonzero().tolist() == [[3]]
        assert not q.tokens[3].any()
        assert not q.channels[7].any()


def test_refused_arguments() -> None:
    dy, gamma, scale = case()
    with pytest.raises(ValueError, match=r"row_scale must be contiguous float32 \[40\]"):
        sk.quantize_gradient(dy, scale, scale, seed(0))
    with pytest.raises(ValueError, match=r"token_scale must be contiguous float32 \[36\]"):
        sk.quantize_gradient(dy, gamma, gamma, seed(0))
    with pytest.raises(ValueError, match="seed must be one int64"):
        sk.quantize_gradient(dy, gamma, scale, seed(0).int())
    with pytest.raises(ValueError, match="stream must be in"):
        sk.quantize_gradient(dy, gamma, scale, seed(0), -1)
    with pytest.raises(ValueError, match="dy must be"):
        sk.quantize_gradient(dy.double(), gamma, scale, seed(0))
    with pytest.raises(ValueError, match=r"x8t must be int8 \[in_features, 5\]"):
        sk.weight_gradient_gemm(torch.zeros(3, 5, dtype=torch.int8), scale[:3], torch.zeros(3, 6, dtype=torch.int8))
    eight = torch.zeros(3, 5, dtype=torch.int8)
    for into in (torch.zeros(3, 4), torch.zeros(3, 3, dtype=torch.bfloat16), torch.zeros(3, 3).t()[:, :1].expand(3, 3)):
        with pytest.raises(ValueError, match=r"into must be contiguous float32 \[3, 3\]"):
            sk.weight_gradient_gemm(eight, scale[:3], eight, into=into, portable=True)
    with pytest.raises(ValueError, match="leave out_dtype out"):
        sk.weight_gradient_gemm(eight, scale[:3], eight, torch.bfloat16, into=torch.zeros(3, 3), portable=True)
    with pytest.raises(ValueError, match="codes must be int8"):
        sk.pack_transposed(dy)
