"""The shape and the arithmetic of a model, as plain values that fit into a recipe and into a checkpoint."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models.loss import HeadPrecision, LossImplementation, check_head
from sbn_lightning.models.rope_scaling import RopeScaling
from sbn_lightning.sparsity.config import TRAINING_OPTION, SparsityConfig, SparsityOptions, check_choice

LinearKind = Literal["ternary", "masked", "dense"]
QKNorm = Literal["head", "projection"]
Activation = Literal["silu", "relu2"]

QWEN2_5_SHAPES: dict[str, dict[str, int]] = {
    "qwen2.5-0.5b": {"n_layers": 24, "d_model": 896, "d_ffn": 4864, "n_heads": 14, "n_kv_heads": 2},
    "qwen2.5-1.5b": {"n_layers": 28, "d_model": 1536, "d_ffn": 8960, "n_heads": 12, "n_kv_heads": 2},
    "qwen2.5-3b": {"n_layers": 36, "d_model": 2048, "d_ffn": 11008, "n_heads": 16, "n_kv_heads": 2},
}


@dataclass(frozen=True)
class LayerRule:
    """The kind of some linear layers, where it is not the kind of the whole model.

    Args:
        match: A shell-style pattern for the names of layers, for example ``"blocks.0.*"``, ``"blocks.[01].mlp.*"`` or
            ``"*.down"``. The layers of a block are ``attention.qkv``, ``attention.o``, ``mlp.gate_up`` and
            ``mlp.down``.
        linear: The kind of these layers.

    Raises:
        ConfigError: If there is no such kind.
    """

    match: str
    linear: LinearKind

    def __post_init__(self) -> None:
        check_choice("layers: linear", self.linear, get_args(LinearKind))


# Marks an option in which model families differ. Such an option says what the weights mean, so `init_from` takes its
# value from the weights. Its default is the value of the plain blocks of Qwen2.5 and Llama.
FAMILY_OPTION = {"family": True}


@dataclass(frozen=True)
class TransformerConfig(SparsityOptions):
    """The shape and the arithmetic of a :class:`TernaryTransformer`.

    The options of the ternary and masked layers are fields as well; :class:`SparsityOptions` describes them. A config
    does not change; ``dataclasses.replace`` makes another one.

    Args:
        vocab_size: The number of rows of the embedding; at least the size of the tokenizer's vocabulary.
        d_model: The width of the residual stream.
        n_layers: The number of blocks.
        n_heads: The number of query heads.
        n_kv_heads: The number of key/value heads; divides ``n_heads``.
        d_ffn: The width of the hidden layer of the feed-forward layer.
        max_sequence_length: The length of the longest sequence, in tokens.
        rope_theta: The base of the rotary frequencies.
        rope_scaling: Slower rotary frequencies for long contexts; see
            :class:`~sbn_lightning.models.rope_scaling.RopeScaling`.
        norm_eps: The epsilon of RMSNorm.
        qkv_bias: Whether q, k and v have a bias, as in Qwen2.5.
        tie_embeddings: Whether the head and the embedding share one weight.
        init_std: The standard deviation of initial weights. Layers that write to the residual stream get
            ``init_std / sqrt(2 n_layers)``.
        linear: The kind of the blocks' linear layers: ``"ternary"``, ``"masked"`` (sparse, not quantised) or
            ``"dense"``.
        activation_checkpointing: What the backward pass recomputes, so that it need not be saved: nothing (False), each
            block (True), or only the feed-forward layers (``"mlp"``), whose gates and ups are the largest part of what
            is saved. Tokens that kernels have quantised are saved all the same. They are freed in the first backward
            pass.
        loss: How the head and the cross-entropy are computed; see :mod:`sbn_lightning.models.loss`.
        head_dim: The number of features of one head, an even number. None means ``d_model / n_heads``.
        o_bias: Whether the output projection of attention has a bias.
        mlp_bias: Whether the layers of the feed-forward layer have biases.
        qk_norm: The norms of queries and keys before the rotation: over each ``"head"`` as in Qwen3, over the whole
            ``"projection"`` as in OLMo-2, or null for none.
        post_norm: Whether norms follow attention and the feed-forward layer, as in OLMo-2, and do not precede them.
        activation: The function of the gate: ``"silu"``, or ``"relu2"`` (squared ReLU) as in BitNet b1.58 2B4T.
        sub_norms: Whether norms precede the output projection and the down projection, as in BitNet b1.58 2B4T.
        sliding_window: How many tokens a token attends to, itself included. null means all tokens before it.
        sliding_layers: The numbers of the blocks with the sliding window. null means all blocks.
        layers_without_rope: The numbers of the blocks whose attention has no positions, as in SmolLM3.
        n_experts: The number of experts in each block's feed-forward layer. 0 means a plain feed-forward layer.
        n_experts_per_token: The number of experts that each token goes to.
        d_expert: The width of the hidden layer of an expert. null means ``d_ffn``.
        normalise_experts: Whether the weights of a token's experts add up to 1, as in Mixtral.
        load_balance: The weight of the load-balancing loss, which is part of the training loss.
        head_precision: The precision of the head's products in training: ``"full"`` is the dtype of everything else,
            ``"int8"`` rounds weight, tokens and gradients to 8 bits (:mod:`sbn_lightning.backends.int8_head`). Not with
            a distillation, which has a loss of its own. Validation is in full precision.
        layers: Rules for linear layers whose kind is not ``linear``, for example to leave the first block dense. If
            several rules match a layer, the last one counts.

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
    activation_checkpointing: bool | Literal["mlp"] = field(default=False, kw_only=True)
    loss: LossImplementation = field(default="auto", kw_only=True)
    head_dim: int | None = field(default=None, kw_only=True, metadata=FAMILY_OPTION)
    o_bias: bool = field(default=False, kw_only=True, metadata=FAMILY_OPTION)
    mlp_bias: bool = field(default=False, kw_only=True, metadata=FAMILY_OPTION)
    qk_norm: QKNorm | None = field(default=None, kw_only=True, metadata=FAMILY_OPTION)
    post_norm: bool = field(default=False, kw_only=True, metadata=FAMILY_OPTION)
    activation: Activation = field(default="silu", kw_only=True, metadata=FAMILY_OPTION)
    sub_norms: bool = field(default=False, kw_only=True, metadata=FAMILY_OPTION)
    sliding_window: int | None = field(default=None, kw_only=True, metadata=FAMILY_OPTION)
    sliding_layers: tuple[int, ...] | None = field(default=None, kw_only=True, metadata=FAMILY_OPTION)
    layers_without_rope: tuple[int, ...] = field(default=(), kw_only=True, metadata=FAMILY_OPTION)
    n_experts: int = field(default=0, kw_only=True, metadata=FAMILY_OPTION)
    n_experts_per_token: int = field(default=2, kw_only=True, metadata=FAMILY_OPTION)
    d_expert: int | None = field(default=None, kw_only=True, metadata=FAMILY_OPTION)
    normalise_experts: bool = field(default=True, kw_only=True, metadata=FAMILY_OPTION)
    load_balance: float = field(default=0.01, kw_only=True, metadata=TRAINING_OPTION)
    layers: tuple[LayerRule, ...] = field(default=(), kw_only=True, metadata=TRAINING_OPTION)
    head_precision: HeadPrecision = field(default="full", kw_only=True, metadata=TRAINING_OPTION)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("linear", self.linear, get_args(LinearKind))
        check_choice("activation", self.activation, get_args(Activation))
        check_choice("activation_checkpointing", self.activation_checkpointing, (False, True, "mlp"))
        check_head(self.head_precision, self.loss)
        check_choice("qk_norm", self.qk_norm, (None, *get_args(QKNorm)))
        if isinstance(self.rope_scaling, dict):  # A checkpoint holds only plain values.
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ffn", "max_sequence_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0 and finite")
        self._check_heads()
        self._check_positions()
        self._check_experts()
        rules = (LayerRule(**rule) if isinstance(rule, dict) else rule for rule in self.layers)
        object.__setattr__(self, "layers", tuple(rules))
        if self.linear == "dense" and any(rule.linear != "dense" for rule in self.layers):
            raise ConfigError(
                "layers: the rules of a dense model make no layer sparse; set linear to ternary or masked, and give a "
                'first rule {match: "*", linear: dense}'
            )
        if self.linear != "dense":
            if self.attention_width == self.d_model:
                self.nm.check_divides(self.d_model, "layers attention.qkv, attention.o and mlp.gate_up (d_model)")
            else:
                self.nm.check_divides(self.d_model, "layers attention.qkv and mlp.gate_up (d_model)")
                self.nm.check_divides(self.attention_width, "layer attention.o (n_heads * head_dim)")
            if self.n_experts:
                self.nm.check_divides(self.d_expert or self.d_ffn, "layer mlp.down (d_expert)")
            else:
                self.nm.check_divides(self.d_ffn, "layer mlp.down (d_ffn)")

    def _check_heads(self) -> None:
        if self.head_dim is None and self.d_model % (2 * self.n_heads):
            raise ConfigError(
                f"d_model={self.d_model} does not divide into n_heads={self.n_heads} heads of an even size "
                "(rotary embeddings turn pairs)"
            )
        if self.head_dim is not None and (self.head_dim < 2 or self.head_dim % 2):
            raise ConfigError(f"head_dim={self.head_dim} must be an even number (rotary embeddings turn pairs)")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")

    def _check_positions(self) -> None:
        """Check the options of positions and windows, and bring lists of blocks into one form."""
        for name in ("sliding_layers", "layers_without_rope"):
            blocks = getattr(self, name)
            if blocks is None:
                continue
            object.__setattr__(self, name, tuple(sorted(set(blocks))))
            if wrong := [block for block in blocks if not 0 <= block < self.n_layers]:
                raise ConfigError(f"{name}: there is no block {wrong[0]}, the model has n_layers={self.n_layers}")
        if self.sliding_layers is not None and len(self.sliding_layers) in (0, self.n_layers):
            if not self.sliding_layers:
                object.__setattr__(self, "sliding_window", None)
            object.__setattr__(self, "sliding_layers", None)
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(f"sliding_window={self.sliding_window} must be at least 1")
        if self.sliding_window is None and self.sliding_layers:
            raise ConfigError("sliding_layers names blocks, and sliding_window does not say how long the window is")
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_type != "dynamic":
            return
        if self.max_sequence_length > scaling.original_context:
            raise ConfigError(
                f"max_sequence_length={self.max_sequence_length} is beyond the original context of "
                f"{scaling.original_context} tokens, where dynamic positions change with the length of each sequence, "
                "which is not supported; use yarn or linear for longer sequences"
            )

    def _check_experts(self) -> None:
        if self.n_experts < 0 or self.load_balance < 0:
            raise ConfigError(f"n_experts={self.n_experts} and load_balance={self.load_balance} must not be negative")
        if not self.n_experts:
            if self.d_expert is not None:
                raise ConfigError(f"d_expert={self.d_expert} is for a mixture of experts; set n_experts too")
            return
        if self.d_expert is None:
            object.__setattr__(self, "d_expert", self.d_ffn)
        if not 1 <= self.n_experts_per_token <= self.n_experts or self.d_expert < 1:  # type: ignore[operator]
            raise ConfigError(
                f"n_experts_per_token={self.n_experts_per_token} must be 1 to n_experts={self.n_experts}, and d_expert="
                f"{self.d_expert} at least 1"
            )
        for option in ("mlp_bias", "sub_norms"):
            if getattr(self, option):
                raise ConfigError(f"experts have no {option}; set n_experts to 0, or {option} to false")

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

    def kind_of(self, layer: str) -> LinearKind:
        """The kind of a linear layer, by its name in the model: that of the last rule that matches, or ``linear``."""
        return next((rule.linear for rule in reversed(self.layers) if fnmatchcase(layer, rule.match)), self.linear)

    @property
    def head_size(self) -> int:
        """The number of features of one attention head."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def attention_width(self) -> int:
        """The number of features of all query heads."""
        return self.n_heads * self.head_size

    def window(self, block: int) -> int | None:
        """How many tokens a token attends to in a block; None if there is no sliding window."""
        return self.sliding_window if self.sliding_layers is None or block in self.sliding_layers else None

    def beyond_plain_blocks(self) -> dict[str, Any]:
        """The options in which the blocks differ from the plain ones of Qwen2.5 and Llama, by name.

        A program that knows the plain blocks only, such as a fused kernel, must refuse a model that has any.
        """
        plain = family_options(type(self))
        options = {name: getattr(self, name) for name in plain}
        if self.attention_width == self.d_model:
            options["head_dim"] = None
        if self.sliding_window is not None and self.sliding_window >= self.max_sequence_length:
            options["sliding_window"] = options["sliding_layers"] = None
        return {name: value for name, value in options.items() if value != plain[name]}

    def to_dict(self, whole: bool = True) -> dict[str, Any]:
        """Return plain values for a checkpoint; ``TransformerConfig(**values)`` reads them back.

        Args:
            whole: Whether options of model families that have their defaults are included. Versions of this program
                that know only plain blocks can read a configuration without these options.
        """
        values = {name: _plain(getattr(self, name)) for name in inspect.signature(type(self)).parameters}
        values["pattern"] = str(self.pattern)
        if whole:
            return values
        optional = family_options(type(self))
        optional |= {f.name: f.default for f in dataclasses.fields(type(self)) if f.metadata.get("training")}
        return {
            name: value for name, value in values.items() if name not in optional or value != _plain(optional[name])
        }


def family_options(config: type[TransformerConfig] = TransformerConfig) -> dict[str, Any]:
    """The options in which model families differ, by name, with the values of the plain blocks."""
    return {f.name: f.default for f in dataclasses.fields(config) if f.metadata.get("family")}


def _plain(value: Any) -> Any:
    """A value in a form that YAML and JSON can hold."""
    if isinstance(value, RopeScaling):
        return value.to_dict()
    if isinstance(value, LayerRule):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
