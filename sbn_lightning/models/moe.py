"""A mixture of experts in place of a block's feed-forward layer: each token goes to a few of many small MLPs.

A router gives each token a probability for each expert. The token goes to the k most probable ones, and their outputs
are added with these probabilities as weights (Mixtral and Qwen3-MoE first divide them by their sum). The router stays
dense and computes in float32: a rounded router would send tokens to other experts.

The experts' weights are ternary, masked or dense, as ``config.linear`` says. All experts of a block share one layer
(:mod:`sbn_lightning.layers.experts_linear`), so masks, schedules, statistics and formats need to know nothing.

Left alone, a router sends most tokens to few experts. :func:`load_balance_loss` of Switch Transformer
(arXiv 2101.03961, equations 4 to 6) works against this. It needs the load of the last forward, which each mixture keeps
until the next one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbn_lightning.layers.experts_linear import DenseExperts, Routing, SparseBitExperts, SparseExpertsLinear
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.mlp import GATES


class Load(NamedTuple):
    """How a router spread the tokens of one forward.

    Attributes:
        share: The share of the tokens that went to each expert, float32 ``[experts]``. The sum is k.
        probability: The mean probability of each expert, float32 ``[experts]``, with a gradient.
    """

    share: Tensor
    probability: Tensor


class Router(nn.Linear):
    """Gives each token a logit for each expert, in float32."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.d_model, config.n_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class MixtureOfExperts(nn.Module):
    """The feed-forward layer ``sum over a token's experts of weight * down(act(gate(x)) * up(x))``.

    Args:
        config: The configuration of the model, with ``n_experts`` above 0.

    Attributes:
        load: How the router spread the tokens of the last forward; None before the first one.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.top_k = config.n_experts_per_token
        self.normalise = config.normalise_experts
        self.activation = config.activation
        self.router = Router(config)
        assert config.d_expert is not None
        self.gate_up = make_experts(config, config.d_model, (config.d_expert, config.d_expert))
        self.down = make_experts(config, config.d_expert, (config.d_model,))
        self.load: Load | None = None

    # The numbers of the experts' tokens are known on the host only, so a compiled graph ends before this module.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x_BTD: Tensor) -> Tensor:
        tokens = x_BTD.flatten(0, -2)
        probabilities = self.router(tokens).softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, -1)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        route = Routing.of(chosen, probabilities.shape[-1])
        self.load = Load(route.counts / max(len(tokens), 1), probabilities.mean(0))
        gate_up = self.gate_up(route.gather(tokens), route.counts)
        if self.activation == "silu":
            y = self.down(gate_up, route.counts, swiglu=True)  # The backend may fuse SwiGLU with the quantisation.
        else:
            y = self.down(GATES[self.activation](gate_up), route.counts)
        return route.combine(y, weights).to(y.dtype).view(*x_BTD.shape[:-1], y.shape[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, without the load: a copy has not computed anything."""
        return vars(self) | {"load": None}


def make_experts(
    config: TransformerConfig, in_features: int, parts: tuple[int, ...]
) -> DenseExperts | SparseExpertsLinear | SparseBitExperts:
    """Make the layer of all experts of a block, of the kind ``config.linear``.

    Args:
        config: The configuration of the model.
        in_features: The width of the tokens.
        parts: The rows of each part of one expert. A ternary layer has one gamma for each part.
    """
    layer: DenseExperts | SparseExpertsLinear | SparseBitExperts
    if config.linear == "dense":
        layer = DenseExperts(config.n_experts, in_features, sum(parts))
    elif config.linear == "masked":
        layer = SparseExpertsLinear(config.n_experts, in_features, sum(parts), sparsity=config.sparsity)
    else:
        layer = SparseBitExperts(config.n_experts, in_features, parts, sparsity=config.sparsity)
    layer.active = config.n_experts_per_token
    return layer


def loads(model: nn.Module) -> list[Load]:
    """Return the loads of all mixtures of a model in their last forward, in the model's order."""
    return [module.load for module in model.modules() if isinstance(module, MixtureOfExperts) and module.load]


def load_balance_loss(loads: Iterable[Load]) -> Tensor:
    """Return the load-balancing loss of Switch Transformer: ``experts * sum_e share_e * probability_e``.

    Shares and probabilities are means over the tokens of all blocks, as in ``load_balancing_loss_func`` of
    transformers. Tokens that are spread evenly give k, the number of experts of a token.

    Args:
        loads: The load of each block. At least one.

    Returns:
        A float32 scalar. Its gradient makes busy experts less probable.
    """
    shares, probabilities = zip(*loads, strict=True)
    share, probability = torch.stack(shares).mean(0), torch.stack(probabilities).mean(0)
    return share.numel() * (share * probability).sum()


def busiest(loads: Iterable[Load]) -> Tensor:
    """Return how many times the average the busiest expert of all blocks gets; 1 means an even spread."""
    return torch.stack([load.share.max() * load.share.numel() / load.share.sum() for load in loads]).max().detach()
