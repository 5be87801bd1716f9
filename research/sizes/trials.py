"""What the study trains. Each trial is one model, and differs from a neighbour in one thing."""

from __future__ import annotations

from dataclasses import dataclass
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
    "150M": Size(1024, 13, 4, 2816),
}
# Parameters with the embedding, which is the head too, for a vocabulary of 8,192 tokens.
PARAMETERS = {
    "2M": 1_836_160, "5M": 5_114_112, "9M": 9_440_640, "15M": 15_471_104, "31M": 31_070_976, "63M": 62_044_416,
    "150M": 154_954_752,
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One training.

    Args:
        size: The name of the size.
        family: ``"ternary"``, or ``"bf16"`` for weights that are not quantised.
        pattern: The pattern N:M; ``"8:8"`` is dense.
        tokens: The number of tokens to train on.
        lr: The peak learning rate; 0 takes the one of the rule, which :mod:`research.sizes.rates` knows.
        seed: The seed of the first weights and of the order of the text.
        shrink: How much of a masked weight the masked decay takes away in a step at the peak of the learning rate. The
            decay falls to zero over the first half of training.
        variant: What else is changed: ``"muon"`` trains the matrices with Muon, ``"relu2"`` has squared ReLU,
            ``"exact"`` makes every weight that the mask keeps +1 or -1, and ``"learned"`` learns the mask in the last
            part of training.
        scale: The factor of the learning rate of the matrices in the blocks.
    """

    size: str
    family: Family
    pattern: str
    tokens: int
    lr: float = 0.0
    seed: int = 1
    shrink: float = 0.0
    variant: Variant = ""
    scale: float = 1.0

    @property
    def name(self) -> str:
        """What the trial is, as the name of a file."""
        decay = f"-decay{self.shrink:g}" if self.shrink else ""
        variant = f"-{self.variant}" if self.variant else ""
        variant += f"-x{self.scale:g}" if self.scale != 1 else ""
        pattern = self.pattern.replace(":", "of")
        tokens = f"{self.tokens / 1e6:.0f}M"
        return f"{self.size}-{self.family}-{pattern}{decay}{variant}-{tokens}-lr{self.lr:g}-s{self.seed}"


def tokens_of(size: str, each: float) -> int:
    """Return ``each`` tokens a parameter, in whole steps of 32,768 tokens."""
    return round(PARAMETERS[size] * each / 32_768) * 32_768
