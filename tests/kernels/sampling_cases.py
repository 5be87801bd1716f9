"""Cases of the choice of tokens, for the interpreter and for a GPU."""

from __future__ import annotations

import math

import torch
from sbn_kernels.sampling import choose_tokens, choose_tokens_reference, lowest_logits, lowest_logits_reference
from torch import Tensor

TEMPERATURES = (0.0, 1.0, 1e-300, 1e30, 0.7)


def settings_of(temperatures: tuple[float, ...], seeds: list[int]) -> Tensor:
    """Write the numbers of rows as the kernel reads them."""
    numbers = torch.tensor([[temperature, 1.0] for temperature in temperatures], dtype=torch.float64)
    return torch.cat([numbers.view(torch.int64), torch.tensor([[0, seed] for seed in seeds])], dim=1)


def check_against_twin(vocab: int, dtype: torch.dtype, device: str) -> None:
    """Compare the kernel with its twin on random logits, with and without a smallest logit."""
    torch.manual_seed(vocab)
    whole = (3 * torch.randn(5, vocab + 3)).to(device, dtype)
    settings = settings_of(TEMPERATURES, [1, 2, 3, -4, 2**63 - 1]).to(device)
    positions = torch.tensor([0, 5, 7, 2**33 + 1, 9], device=device)
    lowest = torch.tensor([-1.0, 0.0, 1.0, 2.0, -math.inf], device=device)
    for logits in (whole[:, :vocab], whole[:, :vocab].contiguous()):
        for limit in (None, lowest):
            kept = logits.float() if limit is None else logits.float().masked_fill(logits < limit[:, None], -math.inf)
            found = choose_tokens(logits, settings, positions, limit)
            assert torch.equal(found, choose_tokens_reference(logits, settings, positions, limit))
            assert int(found[0]) == int(kept[0].argmax())
            if limit is None:  # A row has alone what it has among others.
                alone = [choose_tokens(logits[i : i + 1], settings[i : i + 1], positions[i : i + 1]) for i in range(5)]
                assert torch.equal(found, torch.cat(alone))


def check_special_values(device: str) -> None:
    """Infinities, NaNs, and zeros of both signs."""
    inf, nan = math.inf, math.nan
    logits = torch.tensor(
        [[-inf] * 4, [-inf, 1, nan, nan], [inf, -inf, inf, 0], [-inf, -inf, -inf, -50], [-1, -0.0, 0.0, -0.0]],
        device=device,
    )
    positions = torch.zeros(5, dtype=torch.int64, device=device)
    for temperature in (0.0, 1.0):
        settings = settings_of((temperature,) * 4 + (0.0,), [0, 1, 2, 3, 4]).to(device)
        for choose in (choose_tokens, choose_tokens_reference):
            assert choose(logits, settings, positions).tolist() == [0, 2, 0, 3, 1]


LIMITS = (  # temperature, top_p, top_k
    (0.8, 0.9, 0), (0.8, 1.0, 50), (1.0, 0.95, 20), (1.3, 0.5, 3), (0.7, 1e-12, 0), (2.0, 0.999999, 0), (1.0, 1.0, 1),
    (1e-300, 0.9, 0), (1e30, 0.3, 0), (0.5, 0.99, 10**9), (1.0, 1.0, 0), (0.0, 0.5, 3), (0.0, 0.0, 0), (1.0, 0.0, 0),
)  # fmt: skip


def limits_of(limits: list[tuple[float, float, int]]) -> Tensor:
    """Write the limits of rows as the kernel reads them."""
    numbers = torch.tensor([limit[:2] for limit in limits], dtype=torch.float64)
    return torch.cat([numbers.view(torch.int64), torch.tensor([[limit[2], 0] for limit in limits])], dim=1)


def check_lowest(logits: Tensor, settings: Tensor) -> Tensor:
    """Compare the smallest logits that can be drawn with those of the twin, here and on the CPU."""
    found = lowest_logits(logits, settings)
    assert torch.equal(found, lowest_logits_reference(logits, settings))
    assert torch.equal(lowest_logits_reference(logits.cpu(), settings.cpu()), found.cpu())
    return found


def check_lowest_of_random_logits(vocab: int, dtype: torch.dtype, device: str) -> None:
    """Compare the kernel of the limits with its twin, for narrow and wide logits and many limits."""
    generator = torch.Generator().manual_seed(vocab)
    settings = limits_of(list(LIMITS)).to(device)
    shapes = ((3.0, 0.0), (1.0, 16.0), (1e-3, -0.5), (300.0, 0.0), (0.0, 1.0))
    for scale, shift in shapes if device == "cuda" else shapes[::4]:  # The interpreter takes seconds for each.
        whole = scale * torch.randn(len(LIMITS), vocab + 3, generator=generator) + shift
        whole[:, 1::7] = whole[:, :1]  # Equal logits
        whole = whole.to(device, dtype)
        found = check_lowest(whole[:, :vocab], settings)
    for row in (0, 3):  # A row has alone what it has among others.
        alone = lowest_logits(whole[row : row + 1, :vocab].contiguous(), settings[row : row + 1])
        assert torch.equal(alone, found[row : row + 1])
    assert found.tolist() == [1.0] * 10 + [-math.inf] * 3 + [1.0]


def check_lowest_of_special_values(dtype: torch.dtype, device: str) -> None:
    """Infinities, NaNs, zeros of both signs, and the largest numbers."""
    inf, nan, most = math.inf, math.nan, torch.finfo(dtype).max
    rows = [
        [-inf] * 4, [nan] * 4, [-nan, 1, 2, inf], [inf, inf, most, -inf], [-0.0, 0.0, -1, 1], [0.0, -0.0, -0.0, -1e-7],
        [most, -most, 0, -inf], [-most, -inf, nan, -2], [inf, nan, -inf, 0],
    ]  # fmt: skip
    logits = torch.tensor(rows, device=device).to(dtype)
    for limit in LIMITS if device == "cuda" else LIMITS[::7]:
        check_lowest(logits, limits_of([limit] * len(rows)).to(device))
    of_two = check_lowest(logits, limits_of([(1.0, 1.0, 2)] * len(rows)).to(device)).tolist()
    assert of_two == [-most, -most, 2.0, most, 0.0, 0.0, 0.0, -most, 0.0]
