"""How many programs a persistent kernel starts, and what changes while collectives run on the same GPU.

A persistent kernel starts one program on each multiprocessor, and each program computes its share of the tiles. A
collective that runs at the same time occupies some multiprocessors. The programs that were meant for them start when
others have ended, so the kernel takes twice as long, whether one multiprocessor is missing or twenty. While collectives
run, kernels therefore start several times as many programs with fewer tiles each, and the GPU deals them out. A tile
is computed the same way in both cases, so results are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sbn_kernels.common.integers import ceil_div

LEAST_STEPS = 48  # The steps of a program that make the start of its pipeline worth while.
LEAST_TILES = 2  # With two tiles, the end of the first overlaps with the beginning of the second.
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
    if not _collectives:
        return min(processors, tiles)
    each = max(LEAST_TILES, ceil_div(LEAST_STEPS, steps))
    return min(processors * max(1, tiles // (processors * each)), tiles)
