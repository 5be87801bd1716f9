"""Choose the LightningModule that a training command builds, from the ``model`` section of the recipe.

A section with ``source`` asks for a Hugging Face model, and any other for :class:`SparseBitNet`. The choice is made
before the parser exists, because the parser's options are those of the class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule

from sbn_lightning.cli import recipes
from sbn_lightning.training.module import SparseBitNet


def model_class(arguments: Sequence[str] | Mapping[str, Any]) -> type[LightningModule]:
    """Return the class that the arguments of a training command ask for.

    Args:
        arguments: The words of the command line, or a whole recipe as a mapping.
    """
    if isinstance(arguments, Mapping):
        wants_source = _names_source(arguments)
    else:
        options = [word.partition("=")[0] for word in arguments]
        wants_source = any(option == "--model.source" or option.startswith("--model.source.") for option in options)
        wants_source = wants_source or any(_names_source(_read(file)) for file in _recipes_in(arguments))
    if not wants_source:
        return SparseBitNet
    from sbn_lightning.integrations.huggingface.causal_lm import CausalLM

    return CausalLM


def _recipes_in(arguments: Sequence[str]) -> list[str]:
    files = []
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option in ("-c", "--config"):
            files.append(value if equals else following)
    return files


def _read(file: str) -> Any:
    """Return the contents of a recipe; None if the file cannot be read. The parser will say why."""
    try:
        return yaml.safe_load(Path(recipes.find(file)).read_text(encoding="utf-8"))
    except Exception:  # The parser has a message for a missing file, a folder, or bad YAML.
        return None


def _names_source(recipe: Any) -> bool:
    model = recipe.get("model") if isinstance(recipe, Mapping) else None
    return isinstance(model, Mapping) and "source" in model
