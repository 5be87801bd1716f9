"""What a model family is: the options of :class:`TransformerConfig` that make it, and what other programs call it.

A family translates between the fields of its ``config.json`` and our options in both directions. So a model *is* of a
family if its options come back unchanged when they are written as that family and read again. Nothing else has to say
which options belong to which family, and no configuration stores a family's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models.config import TransformerConfig, family_options

Values = Mapping[str, Any]
"""The contents of a ``config.json``."""


@dataclass(frozen=True)
class GGUFArchitecture:
    """An architecture of llama.cpp that computes what a family computes.

    Attributes:
        name: The value of ``general.architecture``.
        reads: The names of options that the file can have or not have.
        implies: A function of the number of blocks. It returns the options that the architecture always has.
        alternates_halves: Whether llama.cpp pairs neighbouring rows of a head for rotary positions. The rows of q and k
            are then reordered in the file.
        reads_rope_divisors: Whether llama.cpp reads the divisors of frequencies that Llama 3.1 to 3.3 need.
        head: What the architecture says about the head: ``"tied"`` if it always shares the weight of the embedding,
            ``"own"`` if it always has its own weight, ``"either"`` if the file decides.
    """

    name: str
    reads: tuple[str, ...] = ()
    implies: Callable[[int], Values] = lambda n_layers: {}
    alternates_halves: bool = False
    reads_rope_divisors: bool = False
    head: Literal["tied", "own", "either"] = "either"

    def refusal(self, config: TransformerConfig) -> str | None:
        """Say in one line why llama.cpp would compute something else; None if it computes the same."""
        options = config.beyond_plain_blocks() | ({"qkv_bias": True} if config.qkv_bias else {})
        implied = self.implies(config.n_layers)
        for name, value in implied.items():
            if getattr(config, name) != value:
                return f"needs {name}={value}, not {getattr(config, name)}"
        for name, value in options.items():
            if name not in implied and name not in self.reads:
                return f"does not read {name}={value}"
        scaling = config.rope_scaling
        if scaling is not None and scaling.rope_type == "llama3" and not self.reads_rope_divisors:
            return "does not read rope_scaling of the type llama3"
        if scaling is not None and (scaling.beta_fast, scaling.beta_slow, scaling.truncate) != (32, 1, True):
            return "reads YaRN with beta_fast=32, beta_slow=1 and truncate=True only"
        if self.head != "either" and config.tie_embeddings != (self.head == "tied"):
            return f"needs tie_embeddings={self.head == 'tied'}"
        return None


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: The ``model_type`` in a ``config.json``.
        architecture: The class of transformers.
        read: A function that reads the family's own fields of a ``config.json``, and returns options of
            :class:`TransformerConfig`. Fields that are null are left out before. Fields that all families share
            (widths, numbers of heads, positions, ``hidden_act``) are read elsewhere.
        write: The inverse of ``read``: options of a configuration -> fields of a ``config.json``.
        defaults: The values that transformers takes for fields that a ``config.json`` leaves out.
        gguf: The architectures of llama.cpp, the preferred one first.
    """

    name: str
    architecture: str
    read: Callable[[Values], dict[str, Any]]
    write: Callable[[TransformerConfig], dict[str, Any]]
    defaults: Values = field(default_factory=dict)
    gguf: tuple[GGUFArchitecture, ...] = ()

    def differing(self, config: TransformerConfig) -> dict[str, Any]:
        """The options of a configuration that this family cannot have, by name."""
        plain = family_options() | {"qkv_bias": False}
        wanted = {name: getattr(config, name) for name in plain} | {"head_dim": _own_head_dim(config)}
        written = self.write(config) | write_shared(config)
        try:
            found = plain | read_shared(self, {name: value for name, value in written.items() if value is not None})
        except ConfigError:
            found = plain
        return {name: value for name, value in wanted.items() if found[name] != value}


def read_shared(family: Family, values: Values) -> dict[str, Any]:
    """Read the options of :class:`TransformerConfig` in which families differ, from a ``config.json``.

    Args:
        family: The family of the model.
        values: The contents of the file, without fields that are null, and with the defaults of the family.

    Raises:
        ConfigError: If the file asks for something that :class:`TernaryTransformer` does not have.
    """
    heads, d_model = int(values["num_attention_heads"]), int(values["hidden_size"])
    head_dim = int(values.get("head_dim", d_model // heads))
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "relu2"):
        raise ConfigError(f"hidden_act {activation!r} is not supported, only silu and relu2")
    own = {"head_dim": None if head_dim * heads == d_model else head_dim, "activation": activation}
    return own | family.read(values)


def _own_head_dim(config: TransformerConfig) -> int | None:
    return None if config.attention_width == config.d_model else config.head_size


def write_shared(config: TransformerConfig) -> dict[str, Any]:
    """The fields of a ``config.json`` that all families share, as far as :func:`read_shared` needs them."""
    shared = {
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "hidden_act": config.activation,
    }
    return shared if _own_head_dim(config) is None else shared | {"head_dim": config.head_size}


def read_windows(values: Values) -> dict[str, Any]:
    """Read the sliding windows of a family in which each block has its own kind of attention.

    transformers ignores ``sliding_window`` unless ``use_sliding_window`` is set. Older files name the first block with
    a window (``max_window_layers``), newer ones list the kind of each block (``layer_types``).

    Raises:
        ConfigError: If a block has another kind of attention, or the file does not say how long the window is.
    """
    count = int(values["num_hidden_layers"])
    window = values.get("sliding_window") if values.get("use_sliding_window") else None
    if "layer_types" in values:
        layers = layers_of_type(values["layer_types"], "sliding_attention")
    else:
        layers = tuple(range(int(values["max_window_layers"]), count)) if window else ()
    if not layers:
        return {}
    if not window:
        raise ConfigError("layer_types has sliding_attention, and use_sliding_window with sliding_window is not set")
    return {"sliding_window": int(window), "sliding_layers": None if len(layers) == count else layers}


def layers_of_type(layer_types: Any, wanted: str) -> tuple[int, ...]:
    """The numbers of the blocks with one kind of attention.

    Args:
        layer_types: The kind of each block: ``full_attention`` or ``sliding_attention``.
        wanted: The kind to look for.

    Raises:
        ConfigError: If there is another kind.
    """
    if others := sorted(set(layer_types) - {"full_attention", "sliding_attention"}):
        raise ConfigError(f"layers of the type {', '.join(others)} are not supported")
    return tuple(i for i, kind in enumerate(layer_types) if kind == wanted)


def write_windows(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of :func:`read_windows`."""
    if config.sliding_window is None:
        return {"use_sliding_window": False}
    windowed = [config.window(block) is not None for block in range(config.n_layers)]
    return {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "max_window_layers": windowed.index(True) if any(windowed) else config.n_layers,
        "layer_types": ["sliding_attention" if has_one else "full_attention" for has_one in windowed],
    }


def only_full_attention(values: Values) -> None:
    """Check that a file of a family without sliding windows asks for none.

    Raises:
        ConfigError: If it does.
    """
    if layers_of_type(values.get("layer_types", ()), "sliding_attention"):
        raise ConfigError("layer_types has sliding_attention, which this model_type does not have")


def read_attention_bias(values: Values) -> dict[str, Any]:
    """Read the field that gives q, k, v and the output projection biases."""
    has_bias = bool(values.get("attention_bias", False))
    return {"qkv_bias": has_bias, "o_bias": has_bias}
