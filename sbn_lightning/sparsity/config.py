"""``SparsityConfig``: every option of a sparse layer, as one frozen value.

The value is made once and passed whole: from a recipe to the model, from the model to its layers, from a layer to its
backend and to the exporters. A new option is a new field here, and the code that acts on the field. Nothing in between
names the options one by one: constructors take them as ``**options`` and hand them to :meth:`SparsityConfig.make`, and
the command line derives its arguments from the fields.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, cast, get_args

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.sparsity.pattern import NMPattern
from sbn_lightning.sparsity.ternary import ACTIVATION_BITS, GammaOver

Kind = Literal["ternary", "masked"]
MaskSource = Literal["latent", "ternary"]
Gradient = Literal["dense", "masked"]
# Marks an option that came after version 0.1.0 and matters in training only.
TRAINING_OPTION = {"training": True}


@dataclass(frozen=True, kw_only=True)
class SparsityOptions:
    """The options that all sparse layers of a model share. :class:`SparsityConfig` has the options of one layer.

    Args:
        pattern: The pattern "N:M": in each group of M weights at most N are not zero. Quote the pattern in YAML.
        activation_bits: The number of bits of a quantised token: 8, 4, or null to leave tokens as they are.
        mask_source: What ranks the weights of a group: the ``"latent"`` weights, or their ``"ternary"`` codes. Ranking
            by codes is an ablation of the paper. It cost 6 % of perplexity at 2:4 and nothing beyond noise at 6:8.
        gradient: Which weights get the straight-through gradient: all of them (``"dense"``), or only the weights that
            the mask keeps (``"masked"``).
        gamma_over: The weights whose mean magnitude is gamma. ``"dense"``: all weights, as in the paper. ``"kept"``:
            the weights that the mask keeps. ``"masked"``: all weights, where masked weights count as zero.
            ``"nonzero"``: the codes use gamma over all weights, and the scale of the product is the mean over the
            weights whose code is not zero. Codes that rank a group (``mask_source="ternary"``) always use gamma over
            all weights.
        learnable_scales: Whether gamma of each part has a factor that is trained
            (:mod:`sbn_lightning.sparsity.learned_scale`).

    Raises:
        ConfigError: If an option has a value that is not listed here.
    """

    pattern: NMPattern | str = "6:8"
    activation_bits: int | None = 8
    mask_source: MaskSource = "latent"
    gradient: Gradient = "dense"
    gamma_over: GammaOver = "dense"
    learnable_scales: bool = field(default=False, metadata=TRAINING_OPTION)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", NMPattern.parse(self.pattern))
        check_choice("activation_bits", self.activation_bits, ACTIVATION_BITS)
        check_choice("mask_source", self.mask_source, get_args(MaskSource))
        check_choice("gradient", self.gradient, get_args(Gradient))
        check_choice("gamma_over", self.gamma_over, get_args(GammaOver))
        check_choice("learnable_scales", self.learnable_scales, (False, True))

    @property
    def nm(self) -> NMPattern:
        """The pattern, for type checkers: the field ``pattern`` also accepts a string, and is parsed at once."""
        return cast(NMPattern, self.pattern)


@dataclass(frozen=True)
class SparsityConfig(SparsityOptions):
    """All options of one sparse layer; ``SparsityConfig("2:4")`` has the defaults of the paper.

    The other options are those of :class:`SparsityOptions`.

    Args:
        pattern: The pattern "N:M", any 1 <= N <= M <= 32.
        kind: What the layer is: ``"ternary"``, or ``"masked"`` for a layer that is sparse and not quantised. A masked
            layer uses ``pattern`` and ``gradient`` and has no use for the other options.
        split_sizes: The rows of each part of a fused weight, for example (q, k, v). Each part has its own gamma. None
            means that the weight is one part.

    Raises:
        ConfigError: If an option has a value that cannot work.
    """

    pattern: NMPattern | str = "6:8"
    kind: Kind = field(default="ternary", kw_only=True)
    split_sizes: tuple[int, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kind", self.kind, get_args(Kind))
        if self.split_sizes is not None:
            sizes = tuple(self.split_sizes)
            if not sizes or not all(isinstance(rows, int) and rows > 0 for rows in sizes):
                raise ConfigError(f"split_sizes={self.split_sizes} must be numbers of rows, each 1 or more")
            object.__setattr__(self, "split_sizes", sizes)

    @classmethod
    def make(cls, sparsity: SparsityConfig | NMPattern | str | None = None, **options: Any) -> SparsityConfig:
        """Make a config from whatever a caller gave: a whole config, a pattern, single options, or a mixture.

        Args:
            sparsity: A whole config, or a pattern; None stands for the default pattern.
            **options: Single options. If there is a whole config too, an option with its default value is ignored,
                because the command line fills in every default. Any other value replaces the value in the config.

        Raises:
            ConfigError: If an option has a value that cannot work, or if two different patterns are given.
            TypeError: If there is no such option.
        """
        if isinstance(sparsity, SparsityConfig):
            defaults = {f.name: f.default for f in fields(cls)}
            return replace(sparsity, **{k: v for k, v in options.items() if k not in defaults or v != defaults[k]})
        config = cls(**options)
        if sparsity is None:
            return config
        pattern = NMPattern.parse(sparsity)
        if config.pattern not in (cls().pattern, pattern):
            raise ConfigError(f"two patterns are given, {pattern} and {config.pattern}: give one")
        return replace(config, pattern=pattern)

    def check_fits(self, in_features: int, out_features: int, layer: str) -> None:
        """Check that a layer of this shape can have these options.

        Args:
            in_features: The features of a token.
            out_features: The rows of the weight.
            layer: The name of the layer, for the message.

        Raises:
            ConfigError: If M does not divide ``in_features``, or ``split_sizes`` do not add up to ``out_features``.
        """
        self.nm.check_divides(in_features, layer)
        if self.split_sizes is not None and sum(self.split_sizes) != out_features:
            raise ConfigError(f"{layer}: split_sizes={self.split_sizes} do not add up to out_features={out_features}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON or a checkpoint; ``SparsityConfig(**values)`` reads them back.

        Options of training alone are left out while they have their defaults, so that older versions of this program
        can read the values.
        """
        values = asdict(self) | {"pattern": str(self.pattern)}
        unused = [f.name for f in fields(self) if f.metadata.get("training") and getattr(self, f.name) == f.default]
        return {name: value for name, value in values.items() if name not in unused}


OPTION_NAMES = tuple(f.name for f in fields(SparsityConfig) if not f.metadata.get("training"))
"""The names of a layer's options that formats record. Learned factors are part of the gamma that formats hold."""
TRAINING_NAMES = tuple(f.name for f in fields(SparsityConfig) if f.metadata.get("training"))
"""The names of the options that only a layer with a latent weight has a use for."""


def check_choice(option: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise a :class:`ConfigError` if ``value`` is not one of ``choices``. True is not 1, and 8.0 is not 8."""
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise ConfigError(f"{option}={value!r} is not one of {', '.join(map(repr, choices))}")
