"""The choice of tokens in plain PyTorch: what the kernel is tested against. Needs no Triton, runs on any device.

A draw is a race of exponential clocks. With ``e`` drawn from Exp(1) for each token, the token of the smallest
``e / p`` is drawn with a probability proportional to ``p``. In logarithms, and times the temperature ``t``, the token
of the largest ``logit + t * noise`` wins, where ``noise = -log(e)``. Nothing is divided by the temperature, so a tiny
temperature makes no infinities. At a temperature of 0 the most likely token wins, the first one of equals. Below about
1e-4 the rounding of the sum hides the noise, and the first one of equals wins there too.

The noise is a function of three numbers: the seed of the row, the position of the new token in the row, and the token's
id. It comes from Philox-4x32 with 10 rounds, keyed by the seed and counted by the id and the position. One call of
Philox serves four tokens. So a row draws the same tokens whatever the other rows do, and a text that is cut and
continued with the same seed goes on as it would have without the cut.

The random words and the numbers ``v`` made of them are equal in the kernel and here, bit for bit. The two logarithms
may differ in their last bits. So a token can differ only where two tokens are equally good up to that rounding.

A logit of minus infinity is never drawn if there is a larger one. A NaN counts as the largest, as in ``torch.argmax``:
the logits of a broken model always give the same token, and a draw does not hide them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbn_kernels.common.integers import ceil_div
from sbn_kernels.common.philox import WORD, philox

ROUNDS = 10
CALLS = 256  # This many calls of Philox serve 4 * CALLS tokens that follow each other.
SETTINGS = 4  # The numbers of a row, see :func:`check_settings`.
TEMPERATURE, TOP_P, TOP_K, SEED = range(SETTINGS)
SMALL = 2.0**-6  # Below, log(1 - v) is a polynomial.
LARGEST = 1.0 - 2.0**-24  # The largest float32 below 1


def check_settings(
    logits: Tensor, settings: Tensor, positions: Tensor | None = None, lowest: Tensor | None = None
) -> None:
    """Checks the arguments of the functions of this package.

    Raises:
        ValueError: If an argument does not fit.
    """
    if logits.dim() != 2 or logits.shape[1] == 0 or not logits.dtype.is_floating_point:
        raise ValueError(f"logits must be floating point [rows, vocab > 0], not {logits.dtype} {list(logits.shape)}")
    rows = logits.shape[0]
    if settings.shape != (rows, SETTINGS) or settings.dtype != torch.int64:
        raise ValueError(f"settings must be int64 [{rows}, {SETTINGS}], not {settings.dtype} {list(settings.shape)}")
    if positions is not None and (positions.shape != (rows,) or positions.dtype != torch.int64):
        raise ValueError(f"positions must be int64 [{rows}], not {positions.dtype} {list(positions.shape)}")
    if lowest is not None and (lowest.shape != (rows,) or lowest.dtype != torch.float32):
        raise ValueError(f"lowest must be float32 [{rows}], not {lowest.dtype} {list(lowest.shape)}")


def noise(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Makes the noise of every token of every row.

    Args:
        seeds: The seeds, int64 ``[rows]``.
        positions: The position of the new token in each row, int64 ``[rows]``.
        vocab: The number of tokens.

    Returns:
        Numbers of the standard Gumbel distribution, float32 ``[rows, vocab]``, between -2.9 and 23.
    """
    width = min(vocab, CALLS)  # A small vocabulary does not need all calls.
    call = torch.arange(ceil_div(vocab, 4 * CALLS) * width, device=seeds.device)[None, :]
    position, zero = positions[:, None], torch.zeros_like(call)
    words = philox((call, position & WORD, (position >> 32) & WORD, zero), seeds[:, None], ROUNDS)
    # The four words of a call belong to tokens that are CALLS apart, so that the kernel reads logits in order.
    four = torch.stack(words, 1).unflatten(-1, (-1, width)).transpose(1, 2).flatten(1)[:, :vocab]
    v = ((four.float() + 0.5) * 2.0**-32).clamp(max=LARGEST)
    polynomial = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4))))
    return -torch.where(v < SMALL, polynomial, -(1 - v).log()).log()


def choose_tokens_reference(
    logits: Tensor, settings: Tensor, positions: Tensor, lowest: Tensor | None = None
) -> Tensor:
    """Chooses a token for each row; the module's documentation has the formula.

    Args:
        logits: The logits, ``[rows, vocab]``.
        settings: The numbers of each row, int64 ``[rows, 4]``: the bits of its temperature and of its top_p as float64,
            its top_k and its seed. The choice itself reads the temperature and the seed.
        positions: The position of the new token in each row, int64 ``[rows]``.
        lowest: The smallest logit of each row that can be chosen, float32 ``[rows]``. None excludes nothing.

    Returns:
        The token ids, int64 ``[rows]``.

    Raises:
        ValueError: If an argument does not fit.
    """
    check_settings(logits, settings, positions, lowest)
    temperature = settings.view(torch.float64)[:, TEMPERATURE].float()
    values = logits.float()
    keys = values + temperature[:, None] * noise(settings[:, SEED], positions, logits.shape[1])
    if lowest is not None:
        keys = keys.masked_fill(values < lowest[:, None], float("-inf"))
    return keys.argmax(dim=-1)
