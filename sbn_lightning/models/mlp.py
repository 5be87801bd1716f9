"""The feed-forward layer of a block: ``down(act(gate(x)) * up(x))``."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sbn_lightning.layers.gated import swiglu_between
from sbn_lightning.layers.masked_linear import MaskedLinear
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.linear import make_linear
from sbn_lightning.models.norm import RMSNorm
from sbn_lightning.sparsity.ternary import apply_swiglu


def apply_relu2(gate_up: Tensor) -> Tensor:
    """``relu(gate)^2 * up``, where gate and up lie side by side: ``[..., 2 features]`` -> ``[..., features]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.relu(gate).square() * up


GATES = {"silu": apply_swiglu, "relu2": apply_relu2}


class GatedMLP(nn.Module):
    """The feed-forward layer of all families here: SwiGLU, or squared ReLU as in BitNet b1.58 2B4T.

    Args:
        config: The configuration of the model.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate_up = make_linear(config, config.d_model, (config.d_ffn, config.d_ffn), bias=config.mlp_bias)
        self.down = make_linear(config, config.d_ffn, (config.d_model,), bias=config.mlp_bias)
        self.sub_norm = RMSNorm(config.d_ffn, config.norm_eps) if config.sub_norms else None

    def forward(self, x_BTD: Tensor, quantized: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Compute the layer; ``quantized`` are the codes of the tokens and their scales, if they exist already."""
        if self.activation == "silu" and self.sub_norm is None and isinstance(self.down, MaskedLinear):
            # The backend may fuse SwiGLU with its neighbours.
            return swiglu_between(self.gate_up, self.down, x_BTD, quantized)
        given = {} if quantized is None else {"quantized": quantized}
        hidden = GATES[self.activation](self.gate_up(x_BTD, **given))
        out: Tensor = self.down(hidden if self.sub_norm is None else self.sub_norm(hidden))
        return out


SwiGLU = GatedMLP  # The name in version 0.1.0.
