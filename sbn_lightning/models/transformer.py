"""A decoder-only transformer whose linear layers are ternary, masked or plain.

Without further options a block is that of Qwen2.5 and Llama: an RMSNorm, grouped-query attention with rotary positions,
another RMSNorm and a SwiGLU. Other families are the same model with other options; :mod:`sbn_lightning.models.families`
says which options make which family. The embedding, the norms and the head stay dense and in high precision. q, k and v
share one fused layer, and so do gate and up. The tokens are then quantised once for all parts of the layer, and each
part has its own gamma (``split_sizes``).

The suffix of a tensor's name is its shape: B batch, T tokens, D d_model, H heads, K key/value heads, E head size.

Generation needs positions that do not start at 0, and it keeps keys and values from one call to the next. Positions and
attention are therefore arguments of :meth:`TernaryTransformer.hidden`, and :mod:`sbn_lightning.inference` has the
caches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sbn_lightning.backends.reference import REFERENCE
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.mask_tracker import trust_weights, weights_are_trusted
from sbn_lightning.layers.masked_linear import masked_layers, prepare_layers, weights_stay
from sbn_lightning.layers.options import is_hooked
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear, ternary_layers
from sbn_lightning.models.attention import Attend, Attention, causal_attention
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.documents import attend_within
from sbn_lightning.models.linear import apply_rules
from sbn_lightning.models.loss import linear_cross_entropy
from sbn_lightning.models.mlp import GatedMLP
from sbn_lightning.models.moe import MixtureOfExperts, load_balance_loss, loads
from sbn_lightning.models.norm import RMSNorm
from sbn_lightning.models.rope import rope_tables

T = TypeVar("T")


def make_mlp(config: TransformerConfig, index: int) -> nn.Module:
    """Make the feed-forward layer of the block with the number ``index``."""
    return MixtureOfExperts(config) if config.n_experts else GatedMLP(config)


class _Normed(NamedTuple):
    """Tokens after a norm.

    Attributes:
        residual: What goes on beside the layer after the norm.
        tokens: The normed tokens. A layer that gets ``quantized`` does not read their values.
        quantized: Their codes, int8 ``[tokens, features]``, and scales, float32 ``[tokens]``; None: not quantised.
    """

    residual: Tensor
    tokens: Tensor
    quantized: tuple[Tensor, Tensor] | None


class Block(nn.Module):
    """One transformer block: attention and a feed-forward layer, each with a norm before it or after it.

    Args:
        config: The configuration of the model.
        index: The number of the block.
    """

    def __init__(self, config: TransformerConfig, index: int = 0) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.recompute_mlp = config.activation_checkpointing == "mlp"
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, index)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = make_mlp(config, index)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, attend: Attend = causal_attention) -> Tensor:
        if self.post_norm:
            x_BTD = x_BTD + self.attention_norm(self.attention(x_BTD, cos, sin, attend))
            return x_BTD + self.mlp_norm(self._mlp(x_BTD))
        first = _normed(self.attention_norm, x_BTD, None, self.attention.qkv)
        given = {} if first.quantized is None else {"quantized": first.quantized}
        a_BTD = self.attention(first.tokens, cos, sin, attend, **given)
        # Recomputation would save the tokens, whose values nobody reads once they are quantised.
        layer = None if self.recompute_mlp else getattr(self.mlp, "gate_up", None)
        second = _normed(self.mlp_norm, first.residual, a_BTD, layer)
        return second.residual + self._mlp(second.tokens, second.quantized)

    def _mlp(self, x_BTD: Tensor, quantized: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if self.recompute_mlp and self.training and torch.is_grad_enabled():
            return _checkpoint(self.mlp, x_BTD)
        y_BTD: Tensor = self.mlp(x_BTD) if quantized is None else self.mlp(x_BTD, quantized)
        return y_BTD


def _normed(norm: RMSNorm, x: Tensor, residual: Tensor | None, layer: nn.Module | None) -> _Normed:
    """Add the residual, and norm the sum; also quantise it where a kernel does all of it for the layer after."""
    if type(layer) is SparseBitLinear and not layer.is_partly_rounded and not is_hooked(norm):
        backend, bits = layer.backend, layer.activation_bits
        if bits is not None and backend.joins_norm(x, bits, norm):
            return _Normed(*backend.norm_and_quantize(x, residual, norm, bits))
    h = x if residual is None else x + residual
    return _Normed(h, norm(h), None)


_QUANTIZING_OPS = ("sbn_kernels.quantize_tokens.default", "sbn_kernels.swiglu_quantize.default")


def _keep_quantized_tokens() -> tuple[Any, Any]:
    """Contexts for activation checkpointing that also save int8 tokens, so that kernels do not quantise them twice."""

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if str(op) in _QUANTIZING_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _checkpoint(part: nn.Module, x_BTD: Tensor, *inputs: Any) -> Tensor:
    """Compute ``part(x, *inputs)`` without saving activations; the backward pass computes the part again."""
    # Nothing here draws random numbers: int8 gradients have seeds of their own.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if any(layer.backend is not REFERENCE for layer in ternary_layers(part).values()):
        options["context_fn"] = _keep_quantized_tokens
    run = part if torch.compiler.is_compiling() else _Recomputed(part)
    y: Tensor = checkpoint(run, x_BTD, *inputs, **options)
    return y


class _Recomputed:
    """A part of a model whose second forward, in the backward pass, does not ask whether weights have changed.

    Autograd refuses a weight that has changed by then. To ask would compare fingerprints on a CPU, which the first
    forward did not do.
    """

    def __init__(self, part: nn.Module) -> None:
        self._part, self._ran = part, False

    def __call__(self, *inputs: Any) -> Any:
        if self._ran:
            with trust_weights():
                return self._part(*inputs)
        self._ran = True
        return self._part(*inputs)


class TernaryTransformer(nn.Module):
    """The whole model: token ids go in, and logits or a loss come out.

    Args:
        config: The shape and the arithmetic of the model.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        apply_rules(self, config)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.is_compiled = False
        # The token that ends a document, if tokens attend to their own document alone; None for plain causal attention.
        self.separate_at: int | None = None
        self.reset_parameters()
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights from a normal distribution, and set biases to zero."""
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
        """Compile each block with ``torch.compile`` in place. The names in the state dict stay as they are.

        This turns torch's ``optimize_ddp`` off for the whole process.

        Args:
            **options: Arguments of ``torch.compile``.
        """
        # Each block is a graph of its own, so DDP can reduce the gradients of one block while the backward of the next
        # one runs. With optimize_ddp torch would cut each graph again at DDP's buckets of 25 MB. That leaves less to
        # fuse and more to compile.
        torch._dynamo.config.optimize_ddp = False
        for block in self.blocks:
            block.compile(**options)
        for _, layer in masked_layers(self):
            layer.owner_prepares = True
        self.is_compiled = True

    def hidden(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        attend: Sequence[Attend] | None = None,
        after_blocks: list[Tensor] | None = None,
    ) -> Tensor:
        """Token ids int64 ``[B, T]`` -> final hidden states ``[B, T, D]``.

        Args:
            tokens_BT: The token ids.
            positions_BT: The positions of the tokens in their sequences, int64, each below ``max_sequence_length``.
                None means 0 to T - 1.
            attend: The attention of each block. None means causal attention, within documents if ``separate_at`` is
                set.
            after_blocks: A list to which the hidden states after each block are appended, for a distillation.

        Raises:
            ConfigError: If the sequence is longer than ``max_sequence_length``.
        """
        length = tokens_BT.shape[1]
        if length > self.config.max_sequence_length:
            raise ConfigError(
                f"a sequence of {length} tokens is longer than max_sequence_length={self.config.max_sequence_length}"
            )
        if self.is_compiled and not weights_are_trusted():
            prepare_layers(self)
        x_BTD = self.embed(tokens_BT)
        if torch.is_autocast_enabled(x_BTD.device.type):
            # The residual stream gets autocast's dtype as well, because it is most of the memory traffic.
            x_BTD = x_BTD.to(torch.get_autocast_dtype(x_BTD.device.type))
        if positions_BT is None:
            rope = self.cos[:length], self.sin[:length]
        else:
            rope = self.cos[positions_BT].unsqueeze(1), self.sin[positions_BT].unsqueeze(1)
        if attend is None and self.separate_at is not None:
            attend = [attend_within(tokens_BT, self.separate_at)] * len(self.blocks)
        # In evaluation each layer would look by itself whether its weight has changed. Here one look serves all layers.
        traced_or_trained = torch.compiler.is_compiling() or torch.is_grad_enabled()
        with nullcontext() if traced_or_trained else weights_stay(self):
            for i, block in enumerate(self.blocks):
                inputs = rope if attend is None else (*rope, attend[i])
                if self.config.activation_checkpointing is True and self.training:
                    x_BTD = _checkpoint(block, x_BTD, *inputs)
                else:
                    x_BTD = block(x_BTD, *inputs)
                if after_blocks is not None:
                    after_blocks.append(x_BTD)
        out: Tensor = self.norm(x_BTD)
        return out

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Token ids int64 ``[B, T]`` -> logits ``[B, T, vocab_size]``."""
        logits: Tensor = self.lm_head(self.hidden(tokens_BT))
        return logits

    def run(self, function: Callable[..., T], *inputs: Any) -> T:
        """Return ``function(self, *inputs)``. Wrappers such as Fabric's treat the call as a forward of the model.

        Args:
            function: A function of the model, for example the loss against a teacher.
            *inputs: The other arguments of the function.
        """
        return function(self, *inputs)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """The mean cross-entropy in nats, a float32 scalar.

        In training mode, a mixture of experts adds its load-balancing loss, times ``config.load_balance``.

        Args:
            tokens_BT: The token ids, int64 ``[B, T]``.
            targets_BT: The token that follows each token, int64 ``[B, T]``.
        """
        hidden = self.hidden(tokens_BT).flatten(0, 1)
        head, config = self.lm_head.weight, self.config
        loss = linear_cross_entropy(hidden, head, targets_BT.flatten(), config.loss, config.head_precision)
        if self.training and self.config.n_experts and self.config.load_balance:
            loss = loss + self.config.load_balance * load_balance_loss(loads(self))
        return loss
