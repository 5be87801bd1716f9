"""The model families that this program knows, and which of them a model is."""

from __future__ import annotations

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.families.bitnet import BITNET
from sbn_lightning.models.families.family import Family, GGUFArchitecture
from sbn_lightning.models.families.llama import LLAMA
from sbn_lightning.models.families.mistral import MISTRAL
from sbn_lightning.models.families.mixture import MIXTRAL, OLMOE, QWEN3_MOE
from sbn_lightning.models.families.olmo2 import OLMO2
from sbn_lightning.models.families.qwen2 import QWEN2
from sbn_lightning.models.families.qwen3 import QWEN3
from sbn_lightning.models.families.smollm3 import SMOLLM3

# A model that several families can be is written as the first of them.
FAMILIES: dict[str, Family] = {
    family.name: family for family in (LLAMA, QWEN2, MISTRAL, QWEN3, SMOLLM3, OLMO2, BITNET, MIXTRAL, QWEN3_MOE, OLMOE)
}


def register(family: Family) -> None:
    """Add a family, or replace the one of the same name."""
    FAMILIES[family.name] = family


def family_of(config: TransformerConfig) -> Family:
    """The first family that can have all options of a configuration.

    Raises:
        ConfigError: If there is none. The message names the family that comes closest, and what this family lacks.
    """
    differing = {}
    for family in FAMILIES.values():
        differing[family.name] = family.differing(config)
        if not differing[family.name]:
            return family
    closest = min(differing, key=lambda name: len(differing[name]))
    options = ", ".join(f"{name}={value}" for name, value in differing[closest].items())
    raise ConfigError(
        f"no model family of transformers has these options together: {closest} comes closest and cannot have "
        f"{options}; use --format packed"
    )


def gguf_of(config: TransformerConfig) -> GGUFArchitecture:
    """The architecture of llama.cpp that computes what a model computes.

    Raises:
        ConfigError: If there is none. The message says why.
    """
    family = family_of(config)
    reasons = []
    for architecture in family.gguf:
        reason = architecture.refusal(config)
        if reason is None:
            return architecture
        reasons.append(f"{architecture.name} {reason}")
    raise ConfigError(
        f"no architecture of llama.cpp computes this {family.name}: {'; '.join(reasons) or 'there is none'}; use "
        "--format packed, hf-bitnet or hf-sbn"
    )


def gguf_architectures() -> dict[str, GGUFArchitecture]:
    """All architectures of llama.cpp that can be read, by name."""
    return {architecture.name: architecture for family in FAMILIES.values() for architecture in family.gguf}
