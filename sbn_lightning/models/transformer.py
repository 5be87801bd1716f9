"""A decoder-only transformer of the Qwen2.5 kind whose linear layers are ternary, masked or plain.

Pre-norm blocks: RMSNorm, grouped-query attention with rotary positions, RMSNorm, SwiGLU. Embedding, norms and head stay
dense and in high precision. q, k and v share one fused layer, so do gate and up: the tokens are quantised once for all
of them, and each part keeps its own gamma (``split_sizes``).

Shapes are written as suffixes of names: B batch, T tokens, D d_model, H heads, K key/value heads, E head size.

Who generates text needs other positions than 0, 1, 2, ... and keys and values kept from one call to the next. Both come
in as arguments (:class:`Attend`); what a cache looks like is :mod:`sbn_lightning.inference`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sbn_lightning.backends.reference import REFERENCE
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.masked_linear import MaskedLinear, masked_layers, prepare_layers, weights_stay
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear, ternary_layers
from sbn_lightning.layers.sparse_linear import SparseLinear
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.loss import linear_cross_entropy
from sbn_lightning.models.rope import apply_rope, rope_tables
from sbn_lightning.sparsity.ternary import apply_swiglu


def _linear(config: TransformerConfig, in_features: int, splits: tuple[int, ...], *, bias: bool = False) -> nn.Linear:
    if config.linear == "dense":
        return nn.Linear(in_features, sum(splits), bias)
    sparsity = replace(config.sparsity, split_sizes=splits if len(splits) > 1 else None)
    layer = SparseLinear if config.linear == "masked" else SparseBitLinear
    return layer(in_features, sum(splits), bias, sparsity=sparsity)


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` in the dtype of its input, with float32 sums: PyTorch fuses no mixture of dtypes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attend(Protocol):
    """What queries attend to."""

    def __call__(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
        """Rotated queries and keys, and values, of the tokens at hand -> ``[B, H, T, E]``."""


def causal_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
    """Each token attends to itself and those before it."""
    return F.scaled_dot_product_attention(
        q_BHTE, k_BKTE, v_BKTE, is_causal=True, enable_gqa=q_BHTE.shape[1] != k_BKTE.shape[1]
    )


class Attention(nn.Module):
    """Grouped-query attention, causal unless told otherwise."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.splits = (config.d_model, config.n_kv_heads * config.head_size, config.n_kv_heads * config.head_size)
        self.qkv = _linear(config, config.d_model, self.splits, bias=config.qkv_bias)
        self.o = _linear(config, config.d_model, (config.d_model,))

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, attend: Attend = causal_attention) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in self.qkv(x_BTD).split(self.splits, -1)
        )
        y_BHTE = attend(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)
        out: Tensor = self.o(y_BHTE.transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_up = _linear(config, config.d_model, (config.d_ffn, config.d_ffn))
        self.down = _linear(config, config.d_ffn, (config.d_model,))

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_up = self.gate_up(x_BTD)
        if isinstance(self.down, MaskedLinear):
            out: Tensor = self.down(gate_up, swiglu=True)  # its backend may fuse the two
        else:
            out = self.down(apply_swiglu(gate_up))
        return out


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, attend: Attend = causal_attention) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos, sin, attend)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


_QUANTIZING_OPS = ("sbn_kernels.quantize_tokens.default", "sbn_kernels.swiglu_quantize.default")


def _keep_quantized_tokens() -> tuple[Any, Any]:
    """What activation checkpointing saves besides a block's input: int8 tokens from kernels, not quantised twice."""

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if str(op) in _QUANTIZING_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _checkpoint(block: nn.Module, x_BTD: Tensor, *rope: Tensor) -> Tensor:
    """``block(x, *rope)``, recomputed in the backward pass."""
    options: dict[str, Any] = {"use_reentrant": False}
    if any(layer.backend is not REFERENCE for layer in ternary_layers(block).values()):
        options["context_fn"] = _keep_quantized_tokens
    y: Tensor = checkpoint(block, x_BTD, *rope, **options)
    return y


class TernaryTransformer(nn.Module):
    """Token ids in, logits or loss out.

    Args:
        config: Shape and arithmetic.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.is_compiled = False
        self.reset_parameters()
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new weights: normal, biases zero, norms one."""
        std = self.config.init_std
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                residual = name.endswith(("attention.o", "mlp.down"))
                module.weight.normal_(0.0, std / (2 * self.config.n_layers) ** 0.5 if residual else std)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, std)

    def compile_blocks(self, **options: Any) -> None:
        """Compiles each block with ``torch.compile`` in place; names in the state dict stay as they are.

        Turns torch's ``optimize_ddp`` off, in the whole process.

        Args:
            **options: For ``torch.compile``.
        """
        # A block is a graph by itself, and DDP reduces its gradients while the next one's are computed. torch would cut
        # each graph again at DDP's buckets of 25 MB: less to fuse, more to compile.
        torch._dynamo.config.optimize_ddp = False
        for block in self.blocks:
            block.compile(**options)
        for _, layer in masked_layers(self):
            layer.owner_prepares = True
        self.is_compiled = True

    def hidden(
        self, tokens_BT: Tensor, positions_BT: Tensor | None = None, attend: Sequence[Attend] | None = None
    ) -> Tensor:
        """Token ids int64 ``[B, T]`` -> final hidden states ``[B, T, D]``.

        Args:
            tokens_BT: The tokens.
            positions_BT: Where they stand in their sequences, int64, each below ``max_sequence_length``; 0 to T - 1 if
                not given.
            attend: How each block attends; causally if not given.

        Raises:
            ConfigError: If the sequence is longer than ``max_sequence_length``.
        """
        length = tokens_BT.shape[1]
        if length > self.config.max_sequence_length:
            raise ConfigError(
                f"a sequence of {length} tokens is longer than max_sequence_length={self.config.max_sequence_length}"
            )
        if self.is_compiled:
            prepare_layers(self)
        x_BTD = self.embed(tokens_BT)
        if torch.is_autocast_enabled(x_BTD.device.type):  # the residual stream too: most of the memory traffic
            x_BTD = x_BTD.to(torch.get_autocast_dtype(x_BTD.device.type))
        if positions_BT is None:
            rope = self.cos[:length], self.sin[:length]
        else:
            rope = self.cos[positions_BT].unsqueeze(1), self.sin[positions_BT].unsqueeze(1)
        # In evaluation the layers would each compare their weights with those of the last forward; here all do at once.
        traced_or_trained = torch.compiler.is_compiling() or torch.is_grad_enabled()
        with nullcontext() if traced_or_trained else weights_stay(self):
            for i, block in enumerate(self.blocks):
                if attend is not None:
                    x_BTD = block(x_BTD, *rope, attend[i])
                elif self.config.activation_checkpointing and self.training:
                    x_BTD = _checkpoint(block, x_BTD, *rope)
                else:
                    x_BTD = block(x_BTD, *rope)
        out: Tensor = self.norm(x_BTD)
        return out

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Token ids int64 ``[B, T]`` -> logits ``[B, T, vocab_size]``."""
        logits: Tensor = self.lm_head(self.hidden(tokens_BT))
        return logits

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats of predicting ``targets`` (the tokens, shifted by one), float32 scalar."""
        hidden = self.hidden(tokens_BT).flatten(0, 1)
        return linear_cross_entropy(hidden, self.lm_head.weight, targets_BT.flatten(), self.config.loss)
