"""Which learning rate and which weight decay each parameter has.

Weights of linear layers decay; norms, biases and embeddings do not. Rules change this for some parameters, for example
to train the embedding of a pretrained model more slowly than the layers that become ternary. ULMFiT (arXiv 1801.06146,
"discriminative fine-tuning") lowers the learning rate from the last layer to the first in this way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sbn_lightning.core.errors import ConfigError

# The key of a parameter group that holds the factor of its learning rate.
SCALE = "learning_rate_scale"


@dataclass(frozen=True)
class LearningRateRule:
    """A learning rate and a weight decay for some parameters.

    Args:
        match: A shell-style pattern for the names of parameters in the model, for example ``"embed.*"``,
            ``"blocks.[01].*"`` or ``"*.down.weight"``.
        scale: The factor of the learning rate; 0 or more.
        weight_decay: The weight decay of these parameters. None leaves the weight decay as it is without the rule.

    Raises:
        ConfigError: If a number is negative or not finite.
    """

    match: str
    scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("scale", self.scale), ("weight_decay", self.weight_decay)):
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"learning_rates: {name}={value} of {self.match!r} must be 0 or more, and finite")


def parameter_groups(model: nn.Module, rules: Sequence[LearningRateRule] = ()) -> list[dict[str, Any]]:
    """Return the optimiser groups of a model's parameters that need gradients.

    Args:
        model: The model.
        rules: The rules. If several match a parameter, the last one counts.

    Returns:
        Without rules two groups: parameters that decay, and parameters that do not. With rules, up to two such groups
        for each rule, and two for parameters without a rule; the key :data:`SCALE` has the factor of the rule.

    Raises:
        ConfigError: If a rule matches no parameter that is trained.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for rule in rules:
        if not any(fnmatchcase(name, rule.match) for name, _ in named):
            example = f"none of {len(named)}, such as {named[-1][0]!r}" if named else "the model trains none"
            raise ConfigError(f"learning_rates: {rule.match!r} matches no parameter: {example}")
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decay: dict[str, Any] = {"params": []}
    rest: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    groups: dict[tuple[bool, LearningRateRule | None], dict[str, Any]] = {(True, None): decay, (False, None): rest}
    for name, parameter in named:
        decays = parameter.ndim >= 2 and id(parameter) not in embeddings
        last = next((rule for rule in reversed(rules) if fnmatchcase(name, rule.match)), None)
        group = groups.setdefault((decays, last), _group(decays, last))
        group["params"].append(parameter)
    if not rules:
        return [decay, rest]
    return [{SCALE: 1.0} | group for group in groups.values() if group["params"]]


def _group(decays: bool, rule: LearningRateRule | None) -> dict[str, Any]:
    """Return an empty group for the parameters of a rule."""
    group: dict[str, Any] = {"params": [], SCALE: 1.0 if rule is None else rule.scale}
    if rule is not None and rule.weight_decay is not None:
        group["weight_decay"] = rule.weight_decay
    elif not decays:
        group["weight_decay"] = 0.0
    return group


def scale_learning_rates(optimizer: Optimizer) -> None:
    """Multiply the learning rate of each group of a new optimiser by the factor of the group."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.get(SCALE, 1.0)  # Groups share a learning rate that is a tensor.
