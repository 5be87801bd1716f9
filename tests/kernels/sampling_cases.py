"""Cases of the choice of tokens, for the interpreter and for a GPU."""

from __future__ import annotations

import math

import torch
from sbn_kernels.sampling import choose_tokens, choose_tokens_reference
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
            alone = [choose_tokens(logits[i : i + 1], settings[i : i + 1], positions[i : i + 1]) for i in range(5)]
            if limit is None:
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
