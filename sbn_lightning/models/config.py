"""The shape and the arithmetic of a model, as plain values that fit into a recipe and into a checkpoint."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models.loss import LossImplementation
from sbn_lightning.sparsity.config import SparsityConfig, SparsityOptions, check_choice

LinearKind = Literal["ternary", "masked", "dense"]

QWEN2_5_SHAPES: dict[str, dict[str, int]] = {
    "qwen2.5-0.5b": {"n_layers": 24, "d_model": 896, "d_ffn": 4864, "n_heads": 14, "n_kv_heads": 2},
    "qwen2.5-1.5b": {"n_layers": 28, "d_model": 1536, "d_ffn": 8960, "n_heads": 12, "n_kv_heads": 2},
    "qwen2.5-3b": {"n_layers": 36, "d_model": 2048, "d_ffn": 11008, "n_heads": 16, "n_kv_heads": 2},
}


@dataclass
class RopeScaling:
    """The scaling of rotary positions in Llama 3.1 to 3.3 (``rope_type: llama3`` in transformers).

    A wave is the rotation of one pair of features. :func:`~sbn_lightning.models.rope.rope_stretch` has the formula.

    Args:
        factor: How many times longer the slowest waves become; 1 or more.
        low_freq_factor: A number of turns. Waves that turn less often in the original context are stretched by
            ``factor``.
        high_freq_factor: A number of turns. Waves that turn more often in the original context stay as they are.
        original_max_position_embeddings: The length of the original context, in tokens.

    Raises:
        ConfigError: If a number is out of range.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ConfigError(f"rope_scaling: factor={self.factor} must be 1 or more")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"rope_scaling: low_freq_factor={self.low_freq_factor} must be above 0 and below high_freq_factor="
                f"{self.high_freq_factor}"
            )
        if self.original_max_position_embeddings < 1:
            raise ConfigError(
                f"rope_scaling: original_max_position_embeddings={self.original_max_position_embeddings} must be at "
                "least 1"
            )


@dataclass(frozen=True)
class TransformerConfig(SparsityOptions):
    """The shape and the arithmetic of a :class:`TernaryTransformer`.

    The options of the ternary and masked layers are fields as well; :class:`SparsityOptions` describes them. A config
    does not change; ``dataclasses.replace`` makes another one.

    Args:
        vocab_size: The number of rows of the embedding; at least the size of the tokenizer's vocabulary.
        d_model: The width of the residual stream.
        n_layers: The number of blocks.
        n_heads: The number of query heads. ``d_model / n_heads`` must be an even number.
        n_kv_heads: The number of key/value heads; divides ``n_heads``.
        d_ffn: The width of the SwiGLU hidden layer.
        max_sequence_length: The length of the longest sequence, in tokens.
        rope_theta: The base of the rotary frequencies.
        rope_scaling: Slower rotary frequencies for long contexts, as in Llama 3.1 to 3.3; see :class:`RopeScaling`.
        norm_eps: The epsilon of RMSNorm.
        qkv_bias: Whether q, k and v have a bias, as in Qwen2.5.
        tie_embeddings: Whether the head and the embedding share one weight.
        init_std: The standard deviation of initial weights. Layers that write to the residual stream get
            ``init_std / sqrt(2 n_layers)``.
        linear: The kind of the blocks' linear layers: ``"ternary"``, ``"masked"`` (sparse, not quantised) or
            ``"dense"``.
        activation_checkpointing: Whether the backward pass recomputes each block, so that its activations need not be
            saved. Tokens that kernels have quantised are saved all the same. They are freed in the first backward pass.
        loss: How the head and the cross-entropy are computed; see :mod:`sbn_lightning.models.loss`.

    Raises:
        ConfigError: If the numbers do not fit together.
    """

    vocab_size: int = 4096
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    d_ffn: int = 704
    max_sequence_length: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    tie_embeddings: bool = True
    init_std: float = 0.02
    linear: LinearKind = "ternary"
    activation_checkpointing: bool = field(default=False, kw_only=True)
    loss: LossImplementation = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("linear", self.linear, get_args(LinearKind))
        if isinstance(self.rope_scaling, dict):  # A checkpoint holds only plain values.
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ffn", "max_sequence_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0 and finite")
        if self.d_model % (2 * self.n_heads):
            raise ConfigError(
                f"d_model={self.d_model} does not divide into n_heads={self.n_heads} heads of an even size "
                "(rotary embeddings turn pairs)"
            )
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.linear != "dense":
            self.nm.check_divides(self.d_model, "layers attention.qkv, attention.o and mlp.gate_up (d_model)")
            self.nm.check_divides(self.d_ffn, "layer mlp.down (d_ffn)")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TransformerConfig:
        """Return the config of a published model: ``"qwen2.5-0.5b"``, ``"qwen2.5-1.5b"`` or ``"qwen2.5-3b"``.

        All three have a vocabulary of 151,936 tokens, biases for q, k and v, tied embeddings and the rotary base 1e6.

        Args:
            name: One of the three names above.
            **changes: Fields that get other values, for example ``pattern="2:4"``.

        Raises:
            ConfigError: If there is no preset of that name, or a changed field cannot work.
        """
        if name not in QWEN2_5_SHAPES:
            raise ConfigError(f"preset {name!r} is not one of {', '.join(QWEN2_5_SHAPES)}")
        published: dict[str, Any] = {
            **QWEN2_5_SHAPES[name],
            "vocab_size": 151936,
            "max_sequence_length": 32768,
            "rope_theta": 1e6,
            "qkv_bias": True,
        }
        return cls(**(published | changes))

    @property
    def sparsity(self) -> SparsityConfig:
        """The options of the blocks' linear layers; only for ``linear`` other than ``"dense"``."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(SparsityOptions)}
        return SparsityConfig(kind="masked" if self.linear == "masked" else "ternary", **options)

    @property
    def head_size(self) -> int:
        """The number of features of one attention head."""
        return self.d_model // self.n_heads

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint; ``TransformerConfig(**values)`` reads them back."""
        values = dataclasses.asdict(self) | {"pattern": str(self.pattern)}
        return {name: values[name] for name in inspect.signature(type(self)).parameters}
