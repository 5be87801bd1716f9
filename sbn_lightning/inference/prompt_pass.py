"""The forward of prompts without modules: nine kernels a block, where a compiled block has fifteen.

A block's own forward has to serve every backend and training. Between its products it launches a kernel for each
addition, and the norms read their rows again and again. Here the products and the attention are those of the block.
Fused kernels stand between them (:mod:`sbn_kernels.block`, :mod:`sbn_kernels.prompt`). Nothing has to be compiled by
torch first. Up to a number of tokens, kernels begin early (:mod:`sbn_kernels.common.overlap`).

The results are those of the blocks up to the rounding of sums. A model that the fused kernels do not cover runs
through its blocks: :func:`make_pass` says whether there is a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sbn_lightning.backends.integer import KernelBackend
from sbn_lightning.backends.products import multiply
from sbn_lightning.inference.attention import attend_to_cache, has_kernel, is_faster
from sbn_lightning.inference.persistent import outside_of_the_family
from sbn_lightning.layers.options import is_hooked
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.models.attention import causal_attention
from sbn_lightning.models.transformer import TernaryTransformer

_HEAD_SIZES = (32, 64, 128, 256)
_MOST_EARLY = 4096  # The largest number of tokens of a pass whose kernels are launched early.
_MOST_FEATURES, _MOST_HIDDEN = 16384, 32768  # A kernel keeps a row in registers, so rows must not be longer.


def make_pass(model: TernaryTransformer) -> PromptPass | None:
    """Make the pass of a model in bfloat16 whose layers all run on integer kernels; None for another model."""
    config = model.config
    if model.embed.weight.dtype != torch.bfloat16 or config.head_size not in _HEAD_SIZES or config.activation_bits != 8:
        return None
    if config.d_model > _MOST_FEATURES or config.d_ffn > _MOST_HIDDEN:
        return None
    if outside_of_the_family(model) is not None or any(block.recompute_mlp for block in model.blocks):
        return None
    modules = [part for block in model.blocks for part in block.modules()]
    if any(is_hooked(part) for part in modules):
        return None
    layers = [part for part in modules if isinstance(part, nn.Linear | SparseBitLinear | PackedTernaryLinear)]
    if len(layers) != 4 * config.n_layers or not all(map(_has_kernel, layers)):
        return None
    return PromptPass(model)


def _has_kernel(layer: nn.Module) -> bool:
    """Whether an integer kernel multiplies for a layer, and nothing changes its result afterwards."""
    if type(layer) is SparseBitLinear:
        return type(layer.backend) is KernelBackend and not layer.is_partly_rounded
    if type(layer) is PackedTernaryLinear:
        if layer._settled_for != (layer.backend, layer.codes.device):
            layer._settle()
        return layer._kernel is not None
    return False


class _Weight(NamedTuple):
    """The weight of a layer, as :func:`~sbn_lightning.backends.products.multiply` takes it."""

    codes: Tensor | None
    row_scale: Tensor
    packed: Tensor | None
    form: str
    kernel: str


def _weight(layer: Any) -> _Weight:
    if isinstance(layer, SparseBitLinear):
        weight = layer._prepared
        return _Weight(weight.codes, weight.row_scale, weight.packed, _form_of(weight.kernel), weight.kernel)
    return _Weight(layer.codes, layer.row_scale, layer._packed, layer._layout, layer._kernel)


def _product(layer: Any, x8: Tensor, scale: Tensor) -> Tensor:
    """Multiply quantised tokens with a layer's weight; the bias is left out."""
    return multiply(x8, scale, *_weight(layer), torch.bfloat16)


class _Sums(NamedTuple):
    """A product in parts, which the next norm adds and scales."""

    parts: Tensor
    scale: Tensor
    row_scale: Tensor

    def of(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of the product of some tokens, given their numbers."""
        factor = self.scale.index_select(0, tokens)[:, None] * self.row_scale
        return (self.parts.index_select(1, tokens).sum(0, dtype=torch.int32).float() * factor).to(dtype)


def _product_or_sums(layer: Any, x8: Tensor, scale: Tensor) -> Tensor | _Sums:
    """The product; in parts, where few tiles with long sums would leave many multiprocessors idle."""
    weight = _weight(layer)
    if weight.packed is not None and weight.kernel in ("hopper", "hopper-sparse"):
        from sbn_kernels.gemm.sm90.gemm import gemm_sums
        from sbn_kernels.gemm.sm90.split_k import MOST_TOKENS, choose_parts
        from sbn_kernels.runtime.capability import multiprocessors

        tokens, columns = x8.shape
        rows = weight.row_scale.shape[0]
        parts, tile = choose_parts(tokens, rows, columns, multiprocessors(x8.device.index))
        if parts > 1 and tokens > MOST_TOKENS and rows % 4 == 0:
            sums = gemm_sums(x8, weight.packed, rows, weight.kernel == "hopper-sparse", parts, tile)
            return _Sums(sums, scale, weight.row_scale)
    return multiply(x8, scale, *weight, torch.bfloat16)


def _add_and_normalize(
    x: Tensor, delta: Tensor | _Sums | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of two tensors, and the codes and scales of its norm."""
    from sbn_kernels.block import norm_quantize, norm_quantize_sums

    if isinstance(delta, _Sums):
        return norm_quantize_sums(x, *delta, weight, eps)[:3]
    total, x8, scale, _ = norm_quantize(x, delta, weight, eps)
    return x if delta is None else total, x8, scale


def _form_of(kernel: str) -> str:
    from sbn_kernels.gemm import registry

    return registry.product(kernel).form


class PromptPass:
    """Reads prompts, or parts of prompts behind tokens in the cache; :func:`make_pass` says for which models.

    Args:
        model: The model. Its weights must be prepared before each call.
    """

    def __init__(self, model: TernaryTransformer) -> None:
        self._model = model

    def __call__(
        self,
        tokens_BT: Tensor,
        last_B: Tensor,
        rows_B: Tensor,
        before_B: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        start: int | None = 0,
    ) -> Tensor:
        """Compute the logits after each prompt, and write keys and values to the cache.

        Args:
            tokens_BT: The prompts, padded at their ends, int64 ``[B, T]``.
            last_B: The position of each prompt's last token, int64 ``[B]``.
            rows_B: The row of the cache of each prompt, int64 ``[B]``.
            before_B: The number of tokens that each row of the cache holds already, int64 ``[B]``; these tokens stand
                behind them.
            caches: The keys and values of each layer, bfloat16 ``[rows, K, slots, E]``.
            start: The same number on the host, if all rows have the same one. None if only the device knows the
                numbers, as in a CUDA graph. Then :func:`~sbn_lightning.inference.attention.has_kernel` has to be true
                for the caches.

        Returns:
            The logits, ``[B, vocab_size]``.
        """
        from sbn_kernels.runtime.launch import launching_early

        # On an H200, early launches save 2 to 9 % of a single prompt. Four prompts of 2,048 tokens took longer at 1.5B.
        few = tokens_BT.numel() <= _MOST_EARLY
        with launching_early(tokens_BT.device) if few else nullcontext():
            hidden = self._last_hidden(tokens_BT, last_B, rows_B, before_B, caches, start)
        logits: Tensor = self._model.lm_head(self._model.norm(hidden))
        return logits

    def _last_hidden(
        self,
        tokens_BT: Tensor,
        last_B: Tensor,
        rows_B: Tensor,
        before_B: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        start: int | None,
    ) -> Tensor:
        """Compute the sum that enters the last norm, for the last token of each prompt, ``[B, D]``."""
        from sbn_kernels import quantize_tokens, swiglu_quantize
        from sbn_kernels.prompt import attend, rotate_and_store

        model, config = self._model, self._model.config
        batch, length = tokens_BT.shape
        splits = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        with_kernel = has_kernel(caches[0][0]) and is_faster(batch * length, start != 0)
        assert with_kernel or start is not None  # torch's attention needs the number on the host.
        x = model.embed(tokens_BT).flatten(0, 1)
        delta: Tensor | _Sums | None = None
        block: Any
        for block, (keys, values) in zip(model.blocks, caches, strict=True):
            attention, mlp = block.attention, block.mlp
            x, x8, scale = _add_and_normalize(x, delta, block.attention_norm.weight, config.norm_eps)
            qkv = _product(attention.qkv, x8, scale).view(batch, length, -1)
            places = rows_B, config.n_heads, before_B
            rotate_and_store(qkv, attention.qkv.bias, model.cos, model.sin, keys, values, *places)
            parts = qkv.unflatten(-1, (-1, config.head_size)).transpose(1, 2).split(splits, 1)
            if with_kernel:
                attended = attend(parts[0], keys, values, rows_B, before_B).transpose(1, 2)
            elif start:
                end = start + length
                own_keys, own_values = keys[rows_B, :, :end], values[rows_B, :, :end]
                attended = attend_to_cache(parts[0], own_keys, own_values)
            else:
                attended = causal_attention(*parts)
            attended = attended.transpose(1, 2).reshape(batch * length, -1)
            added = _product(attention.o, *quantize_tokens(attended))
            x, x8, scale = _add_and_normalize(x, added, block.mlp_norm.weight, config.norm_eps)
            delta = _product_or_sums(mlp.down, *swiglu_quantize(_product(mlp.gate_up, x8, scale)))
        ends = torch.arange(batch, device=last_B.device) * length + last_B
        hidden = x.index_select(0, ends)
        if delta is None:
            return hidden
        return hidden + (delta.of(ends, hidden.dtype) if isinstance(delta, _Sums) else delta.index_select(0, ends))
