"""How many programs a persistent kernel starts, and what changes while collectives run on the same GPU.

A persistent kernel starts one program on each multiprocessor, and each program computes its share of the tiles. A
collective that runs at the same time occupies some multiprocessors. The programs that were meant for them start when
others have ended, so the kernel takes twice as long, whether one multiprocessor is missing or twenty. While collectives
run, a program therefore computes one tile, or a few if tiles are short, and the GPU deals the programs out. A tile is
computed the same way in both cases, so results are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sbn_kernels.common.integers import ceil_div

LEAST_STEPS = 48  # The steps of a program that make the start of its pipeline worth while.
_collectives = 0  # How many users say that collectives run at present.


@contextmanager
def beside_collectives() -> Iterator[None]:
    """Say that collectives run on the GPU beside the kernels that start in this context."""
    begin_collectives()
    try:
        yield
    finally:
        end_collectives()


def begin_collectives() -> None:
    """Say that collectives run from now on."""
    global _collectives
    _collectives += 1


def end_collectives() -> None:
    """Say that those collectives have ended."""
    global _collectives
    _collectives -= 1


def programs(processors: int, tiles: int, steps: int) -> int:
    """The number of programs of a persistent kernel.

    Args:
        processors: The multiprocessors of the GPU.
        tiles: The tiles to compute.
        steps: The steps of the sum of one tile.
    """
    fewest = min(processors, tiles)
    if not _collectives:
        return fewest
    return max(fewest, ceil_div(tiles, ceil_div(LEAST_STEPS, steps)))
