"""What the study trains, in the order of its worth. Each trial is one model, and differs from a neighbour in one thing.

The learning rate is tuned at the smallest size. The other sizes take ``lr = TUNED * 128 / d_model``: with AdamW the
change of a layer's output by a step grows with the width, and this rule keeps the change the same (the rule of muP for
matrices, arXiv 2203.03466). Initial weights have the standard deviation ``0.02 * sqrt(512 / d_model)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

Family = Literal["ternary", "bf16"]
Variant = Literal["", "muon", "relu2", "exact", "learned"]


@dataclass(frozen=True)
class Size:
    """A shape of the transformer. Each head has 64 features.

    Args:
        d_model: The width of the residual stream.
        n_layers: The number of blocks.
        n_kv_heads: The number of key/value heads.
        d_ffn: The width of the hidden layer of the feed-forward layer.
    """

    d_model: int
    n_layers: int
    n_kv_heads: int
    d_ffn: int


SIZES = {
    "2M": Size(128, 4, 1, 384),
    "5M": Size(256, 4, 1, 768),
    "9M": Size(384, 4, 2, 1024),
    "15M": Size(512, 4, 2, 1408),  # The model of research/reproduce.
    "31M": Size(768, 4, 3, 2048),
    "63M": Size(768, 9, 3, 2048),
}
# Parameters with the embedding, which is the head too, for a vocabulary of 8,192 tokens.
PARAMETERS = {
    "2M": 1_836_160, "5M": 5_114_112, "9M": 9_440_640, "15M": 15_471_104, "31M": 31_070_976, "63M": 62_044_416
}  # fmt: skip
VARIANT_TOKENS = 1536 * 32_768  # of other ideas: as in research/reproduce
# The best learning rates at 128 features.
TUNED: dict[Family, float] = {"ternary": 16e-3, "bf16": 8e-3}


@dataclass(frozen=True)
class Trial:
    """One training.

    Args:
        size: The name of the size.
        family: ``"ternary"``, or ``"bf16"`` for weights that are not quantised.
        pattern: The pattern N:M; ``"8:8"`` is dense.
        tokens: The number of tokens to train on.
        lr: The peak learning rate.
        seed: The seed of the first weights and of the order of the text.
        shrink: How much of a masked weight the masked decay takes away in a step at the peak of the learning rate. The
            decay falls to zero over the first half of training.
        variant: What else is changed: ``"muon"`` trains the matrices with Muon, ``"relu2"`` has squared ReLU,
            ``"exact"`` makes every weight that the mask keeps +1 or -1, and ``"learned"`` learns the mask in the last
            part of training.
    """

    size: str
    family: Family
    pattern: str
    tokens: int
    lr: float
    seed: int = 1
    shrink: float = 0.0
    variant: Variant = ""

    @property
    def name(self) -> str:
        """What the trial is, as the name of a file."""
        decay = f"-decay{self.shrink:g}" if self.shrink else ""
        variant = f"-{self.variant}" if self.variant else ""
        pattern = self.pattern.replace(":", "of")
        tokens = f"{self.tokens / 1e6:.0f}M"
        return f"{self.size}-{self.family}-{pattern}{decay}{variant}-{tokens}-lr{self.lr:g}-s{self.seed}"

    @property
    def way(self) -> str:
        """The pattern, with the masked decay and the variant."""
        return (
            self.pattern + (" with masked decay" if self.shrink else "") + (f", {self.variant}" if self.variant else "")
        )


def learning_rate(size: str, family: Family) -> float:
    """Return the learning rate that the rule of this module gives a size."""
    return float(f"{TUNED[family] * 128 / SIZES[size].d_model:.3g}")


def tokens_of(size: str, each: float) -> int:
    """Return ``each`` tokens a parameter, in whole steps of 32,768 tokens."""
    return round(PARAMETERS[size] * each / 32_768) * 32_768


def trials(
    sizes: Sequence[str],
    each: float,
    seeds: Iterable[int],
    families: Sequence[Family] = ("ternary", "bf16"),
    ways: Sequence[str] = ("8:8", "2:4", "decay", "6:8"),
) -> Iterator[Trial]:
    """Yield the trials of some sizes with ``each`` tokens a parameter; ``"decay"`` is 2:4 with the masked decay."""
    for seed, size, way, family in product(seeds, sizes, ways, families):
        lr = learning_rate(size, family)
        shrink = 0.08 if way == "decay" else 0.0
        pattern = "2:4" if way == "decay" else way
        yield Trial(size, family, pattern, tokens_of(size, each), lr, seed, shrink)


def sweep(size: str, each: float, rates: dict[Family, Sequence[float]]) -> Iterator[Trial]:
    """Yield the trials that choose the learning rate of a size, from dense models and 2:4."""
    for family, pattern in product(rates, ("8:8", "2:4")):
        for lr in rates[family]:
            yield Trial(size, family, pattern, tokens_of(size, each), lr)


def extra(seeds: Iterable[int]) -> Iterator[Trial]:
    """Yield the trials of other ideas, at 15M and 50M tokens, each with its baseline."""
    for seed in seeds:
        base = [
            Trial("15M", "ternary", pattern, VARIANT_TOKENS, learning_rate("15M", "ternary"), seed)
            for pattern in ("8:8", "2:4", "6:8", "3:4")
        ]
        dense, two_of_four, _, three_of_four = base
        yield from base
        yield from (replace(one, variant="muon") for one in (dense, two_of_four))
        yield from (replace(one, variant="relu2") for one in (dense, two_of_four))
        yield from (replace(one, variant="exact") for one in (three_of_four, two_of_four))
        yield replace(two_of_four, variant="learned")


def smoke() -> Iterator[Trial]:
    """Yield trials of 120 steps that show whether each variant runs."""
    base = Trial("15M", "ternary", "2:4", 120 * 32_768, learning_rate("15M", "ternary"))
    yield replace(base, variant="learned")
    yield replace(base, variant="muon")
    yield replace(base, variant="exact", pattern="3:4")
    yield replace(base, shrink=0.08)
    yield replace(base, variant="relu2")
    yield replace(base, family="bf16", lr=learning_rate("15M", "bf16"))


ROUNDS: dict[str, list[Trial]] = {
    "smoke": list(smoke()),
    "sweep": [
        *sweep("2M", 20, {"ternary": (16e-3, 8e-3, 32e-3, 4e-3), "bf16": (8e-3, 4e-3, 16e-3, 2e-3)}),
        *sweep("5M", 20, {"ternary": (8e-3, 4e-3, 16e-3), "bf16": (4e-3, 2e-3, 8e-3)}),
    ],
}
