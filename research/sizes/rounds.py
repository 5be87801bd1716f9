"""Lists of trials in the order of their worth. A worker takes the first one that nobody has taken and that fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from research.sizes.rates import AT_15M, sweep
from research.sizes.trials import Family, Trial, tokens_of

FAMILIES: tuple[Family, ...] = ("ternary", "bf16")
WAYS = ("8:8", "2:4", "decay", "6:8")
PAIR = ("8:8", "2:4")
SHRINK = 0.08
VARIANTS_AT = "5M", 10.0  # the size and the tokens a parameter of other ideas


def trials(
    size: str, each: float, seeds: Iterable[int], ways: Sequence[str] = WAYS, families: Sequence[Family] = FAMILIES
) -> Iterator[Trial]:
    """Yield the trials of a size with ``each`` tokens a parameter; ``"decay"`` is 2:4 with the masked decay."""
    for seed in seeds:
        for way in ways:
            for family in families:
                pattern, shrink = ("2:4", SHRINK) if way == "decay" else (way, 0.0)
                lr = AT_15M[family] if size == "15M" else 0.0  # These need not wait for the sweep.
                yield Trial(size, family, pattern, tokens_of(size, each), lr, seed, shrink)


def ideas(seed: int) -> Iterator[Trial]:
    """Yield the trials of other ideas. Their baselines are among the trials of the same size."""
    size, each = VARIANTS_AT
    dense, sparse, three = (
        Trial(size, "ternary", pattern, tokens_of(size, each), seed=seed) for pattern in ("8:8", "2:4", "3:4")
    )
    yield replace(sparse, variant="muon")
    yield three
    yield replace(three, variant="exact")
    yield replace(sparse, variant="learned")
    yield replace(dense, variant="muon")
    yield replace(sparse, variant="relu2")
    yield replace(dense, variant="relu2")
    yield replace(sparse, variant="exact")
    yield replace(sparse, variant="muon", scale=0.5)
    yield replace(sparse, variant="muon", scale=2.0)


def large() -> Iterator[Trial]:
    """Yield the trials beyond 15M. Large trials take the longest, so two processes of a GPU begin there."""
    for family in FAMILIES:
        yield from trials("31M", 10, [1], PAIR, (family,))


def larger() -> Iterator[Trial]:
    """Yield the pairs at 63M."""
    for seed in (1, 2):
        for family in FAMILIES:
            yield from trials("63M", 10, [seed], PAIR, (family,))


def seeds() -> Iterator[Trial]:
    """Yield the trials that decide whether BF16 pays more for 2:4 than ternary at 31M: the seeds 2 and 3."""
    for seed in (2, 3):
        for family in FAMILIES:
            yield from trials("31M", 10, [seed], PAIR, (family,))
    yield from trials("31M", 10, [1], ("decay",))


def main() -> Iterator[Trial]:
    """Yield the study, the most valuable trials first."""
    # results.jsonl has these, except a few seeds at 2M. There 560 steps are too few to tell much.
    yield from trials("15M", 10, [1], ("8:8", "2:4", "decay"))
    yield from sweep()
    yield from trials("2M", 10, [1, 2, 3], ("8:8", "2:4", "decay"))
    yield from trials("5M", 10, [1])
    # These come next.
    yield from trials("15M", 10, [2], PAIR)
    yield from trials("5M", 40, [1], PAIR, ("ternary",))
    yield from trials("5M", 10, [2], PAIR)
    yield from ideas(1)
    yield from trials("5M", 40, [1], PAIR, ("bf16",))
    yield from trials("5M", 10, [3], PAIR)
    yield from trials("5M", 10, [2, 3], ("decay",))
    yield from trials("15M", 10, [2], ("decay",))
    yield from trials("31M", 10, [1], PAIR)
    yield from ideas(2)
    yield from trials("9M", 10, [1], ("8:8", "2:4", "decay"))
    yield from trials("2M", 40, [1, 2, 3], ("8:8", "2:4", "decay"))
    yield from trials("15M", 10, [1, 2], ("6:8",))
    yield from trials("9M", 10, [2], PAIR)
    yield from trials("5M", 10, [2, 3], ("6:8",))
    yield from trials("5M", 40, [2], PAIR)
    yield from trials("2M", 160, [1], PAIR)
    yield from trials("31M", 10, [1], ("decay",))
    yield from trials("15M", 20, [1, 2], ("8:8", "2:4", "decay"))
    yield from trials("63M", 20, [1, 2])
    yield from trials("150M", 20, [1])


def smoke() -> Iterator[Trial]:
    """Yield short trials that show whether each variant runs."""
    base = Trial("2M", "ternary", "2:4", 120 * 32_768, lr=8e-3)
    yield replace(base, variant="learned")
    yield replace(base, variant="muon")
    yield replace(base, variant="exact", pattern="3:4")
    yield replace(base, shrink=SHRINK)
    yield replace(base, variant="relu2")
    yield replace(base, family="bf16", lr=4e-3)


ROUNDS = {make.__name__: list(make()) for make in (main, large, larger, seeds, smoke)}
