"""The size of an export, part by part: a file at "1.3 bits a weight" may still be mostly embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class PartSize:
    """How large one part of a file is.

    Attributes:
        name: The name of the part, for the user.
        weights: How many numbers the part holds.
        bytes: How many bytes the part takes.
    """

    name: str
    weights: int = 0
    bytes: int = 0

    @property
    def bits(self) -> float:
        """Bits for each number."""
        return 8 * self.bytes / self.weights if self.weights else 0.0


class Sizes:
    """Add up the parts of a file while the file is written."""

    def __init__(self) -> None:
        """Start without any part."""
        self._parts: dict[str, PartSize] = {}

    def add(self, part: str, weights: int, size: int) -> None:
        """Count one tensor.

        Args:
            part: The name of the part that the tensor belongs to.
            weights: How many numbers the tensor stands for.
            size: How many bytes the tensor takes in the file.
        """
        found = self._parts.setdefault(part, PartSize(part))
        found.weights += weights
        found.bytes += size

    def __iter__(self) -> Iterator[PartSize]:
        """Iterate over the parts, in the order in which they were added."""
        return iter(self._parts.values())

    def __getitem__(self, part: str) -> PartSize:
        """Return the part with a name."""
        return self._parts[part]

    @property
    def weights(self) -> int:
        """How many numbers all parts hold."""
        return sum(part.weights for part in self._parts.values())

    def table(self) -> str:
        """One line for each part: its name, how many weights, bits for each weight, and megabytes."""
        width = max(map(len, self._parts))
        return "\n".join(
            f"  {part.name:<{width}} {part.weights:>15,} weights {part.bits:7.3f} bits each {part.bytes / 1e6:9.2f} MB"
            for part in self._parts.values()
        )


def part_of(name: str, linear: str) -> str:
    """The part of a model that a tensor belongs to.

    Args:
        name: The name of the tensor in the state dict.
        linear: What the linear layers of the blocks are: ``"ternary"``, ``"masked"`` or ``"dense"``.
    """
    if name == "embed.weight":
        return "embeddings"
    if name == "lm_head.weight":
        return "head"
    if name.endswith("norm.weight") or name.endswith(".bias"):
        return "norms and biases"
    return f"{linear} layers"
