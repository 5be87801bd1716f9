"""The shapes and the variants of ``training_step.py``: which model is built, and with which layers.

A shape is one of our transformer, or a model of ``transformers`` that knows nothing of this package. A variant says
what the linear layers of the blocks are. Both kinds of model have ``loss(ids, targets)`` and ``compile_blocks()``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from sbn_lightning import TransformerConfig
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.conversion import convert_linears
from sbn_lightning.models.loss import linear_cross_entropy
from sbn_lightning.models.transformer import TernaryTransformer
from sbn_lightning.sparsity.pattern import NMPattern, top_n_mask
from sbn_lightning.sparsity.ternary import expand_scale, weight_scale

LLAMA_3_8B_BLOCKS = "llama-3-8b, 4 blocks"
FOREIGN_1B = "transformers llama-1.1b"
SMOLLM2_135M = "smollm2-135m"
SMALL = "15.5M, as in the reproduction"
SHAPES = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", LLAMA_3_8B_BLOCKS, FOREIGN_1B, SMOLLM2_135M, SMALL)


class ForeignModel(nn.Module):
    """A Llama of ``transformers`` in the shape of TinyLlama-1.1B: 22 blocks with separate q, k, v, gate and up.

    Args:
        head: ``"torch"``: the loss of PyTorch on float32 logits. ``"chunked"``: our loss, which makes the logits
            of some tokens at a time. ``"int8"``: our loss with the products of the head in 8 bits.
        **changes: Other fields of the config.
    """

    def __init__(self, head: str = "torch", **changes: Any) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.head = head
        shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
        shape |= {"num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048}
        self.model = LlamaForCausalLM(LlamaConfig(**shape | changes, attn_implementation="sdpa"))

    @property
    def blocks(self) -> nn.Module:
        """The blocks, whose layers the variants replace."""
        return self.model.model.layers

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        return int(self.model.config.vocab_size)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of the next tokens."""
        if self.head != "torch":
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
            precision = "int8" if self.head == "int8" else "full"
            return linear_cross_entropy(hidden, self.model.lm_head.weight, targets.flatten(), "chunked", precision)
        logits = self.model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def compile_blocks(self) -> None:
        """Compiles each block."""
        for block in self.blocks:
            block.compile()

    def make_no_mask(self) -> None:
        """Lets the model make no mask for attention, which is causal without one.

        The masks of ``transformers`` read position ids on the host, which a CUDA graph cannot record. A kind of
        attention that has no masks of its own gets none.
        """
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        AttentionInterface.register("sdpa_without_masks", sdpa_attention_forward)
        self.model.set_attn_implementation("sdpa_without_masks")


def make_config(shape: str, sequence_length: int, checkpointing: bool, layers: int | None) -> TransformerConfig | None:
    """The config of a shape of our transformer; None for a foreign model."""
    changes: dict[str, Any] = {"max_sequence_length": sequence_length, "activation_checkpointing": checkpointing}
    if layers:
        changes["n_layers"] = layers
    if shape == FOREIGN_1B:
        return None
    if shape == LLAMA_3_8B_BLOCKS:
        blocks = {"d_model": 4096, "d_ffn": 14336, "n_heads": 32, "n_kv_heads": 8, "n_layers": 4, "vocab_size": 32000}
        return TransformerConfig(**{"rope_theta": 5e5, **blocks, **changes})
    if shape == SMOLLM2_135M:
        smol = {"d_model": 576, "d_ffn": 1536, "n_heads": 9, "n_kv_heads": 3, "n_layers": 30, "vocab_size": 49152}
        return TransformerConfig(**{"rope_theta": 1e5, "tie_embeddings": True, **smol, **changes})
    if shape == SMALL:
        small = {"d_model": 512, "d_ffn": 1408, "n_heads": 8, "n_kv_heads": 2, "n_layers": 4, "vocab_size": 8192}
        return TransformerConfig(**{**small, **changes})
    return TransformerConfig.preset(shape, **changes)


def _plain(config: TransformerConfig | None, layers: int | None = None, head: str = "torch") -> Any:
    """The model with plain layers."""
    if config is not None and head != "torch":
        raise ConfigError("our model has the chunked loss anyway")
    if config is None:
        return ForeignModel(head, **({"num_hidden_layers": layers} if layers else {}))
    return TernaryTransformer(TransformerConfig(**config.to_dict() | {"linear": "dense"}))


class FakeQuantizedLinear(nn.Linear):
    """The layer of the public reference: everything is quantised anew for each micro-batch, the product is BF16."""

    pattern = NMPattern(2, 4)
    split_sizes: tuple[int, ...] | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        gamma = expand_scale(weight_scale(weight, self.split_sizes), self.split_sizes, self.out_features).unsqueeze(-1)
        fake = (weight / gamma).round().clamp(-1, 1) * gamma * top_n_mask(weight, self.pattern)
        scale = 127 / x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-5)
        rounded = (x * scale).round().clamp(-128, 127) / scale
        return F.linear(x + (rounded - x).detach(), weight + (fake - weight).detach(), self.bias)


def dense(config: TransformerConfig | None, layers: int | None = None, *, head: str = "torch") -> Any:
    """Makes the BF16 baseline; ``head`` is the head of a foreign model."""
    return _plain(config, layers, head)


def fake_quantized(config: TransformerConfig | None, layers: int | None = None) -> Any:
    """Makes every linear layer of the blocks a layer of the public reference."""
    model = _plain(config, layers)
    for layer in model.blocks.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FakeQuantizedLinear
    return model


def torchao_float8(
    config: TransformerConfig | None, layers: int | None = None, *, recipe: str, head: str = "torch"
) -> Any:
    """Makes torchao's float8 training, which a user on a Hopper GPU would pick instead of us.

    Args:
        config: The config, or None for the foreign model.
        layers: Blocks of a foreign model; None: all.
        recipe: ``"tensorwise"`` or ``"rowwise"``.
        head: The head of a foreign model.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    model = _plain(config, layers, head)
    convert_to_float8_training(model.blocks, config=Float8LinearConfig.from_recipe_name(recipe))
    return model


def torchao_bitnet(config: TransformerConfig | None, layers: int | None = None) -> Any:
    """Makes torchao's prototype: ternary weights without sparsity, int8 forward."""
    from torchao.prototype.quantized_training import bitnet_training
    from torchao.quantization import quantize_

    model = _plain(config, layers)
    quantize_(model.blocks, bitnet_training())
    return model


def ternary(
    config: TransformerConfig | None, layers: int | None = None, *, pattern: str, head: str = "torch", **changes: Any
) -> Any:
    """Makes our model with changes of its config, or converts the foreign one, which has none but its ``head``."""
    if config is None and changes.pop("head_precision", "full") == "int8":
        head = "int8"
    if config is None and changes:
        raise ConfigError(f"a foreign model has no {', '.join(changes)}")
    if config is None:
        model = _plain(config, layers, head)
        convert_linears(model, pattern)
        return model
    if head != "torch":
        raise ConfigError("our model has the chunked loss anyway")
    return TernaryTransformer(TransformerConfig(**config.to_dict() | {"pattern": pattern} | changes))


def masked(config: TransformerConfig | None, layers: int | None = None) -> Any:
    """Makes 2:4 weights in BF16, not quantised."""
    if config is None:
        model = _plain(config, layers)
        convert_linears(model, "2:4", kind="masked")
        return model
    return TernaryTransformer(TransformerConfig(**config.to_dict() | {"linear": "masked", "pattern": "2:4"}))


Build = Callable[[TransformerConfig | None, int | None], Any]
_OURS = partial(ternary, pattern="2:4")
_RECOMPUTED = partial(_OURS, activation_checkpointing="mlp")
VARIANTS: dict[str, tuple[Build, dict[str, str] | None]] = {
    "bf16 dense": (dense, None),
    "bf16 dense, chunked loss": (partial(dense, head="chunked"), None),
    "float8 tensorwise (torchao)": (partial(torchao_float8, recipe="tensorwise"), None),
    "float8 rowwise (torchao)": (partial(torchao_float8, recipe="rowwise"), None),
    "bf16 2:4 masked": (masked, None),
    "fake quantised 2:4": (fake_quantized, None),
    "fake quantised 2:4, eager": (fake_quantized, None),
    "torchao BitNet, dense ternary": (torchao_bitnet, None),
    "float8 tensorwise (torchao), chunked loss": (
        partial(torchao_float8, recipe="tensorwise", head="chunked"),
        None,
    ),
    "ours 2:4": (_OURS, {"backend": "sparse"}),
    "ours 2:4, chunked loss": (partial(_OURS, head="chunked"), {"backend": "sparse"}),
    "ours 2:4, int8 gradients": (_OURS, {"backend": "sparse", "gradients": "int8"}),
    "ours 2:4, int8 dX": (_OURS, {"backend": "sparse", "gradients": "int8-dx"}),
    "ours 2:4, int8 dX, int8 gates": (_OURS, {"backend": "sparse", "gradients": "int8-dx", "saved_gates": "int8"}),
    "ours 2:4, int8 dW": (_OURS, {"backend": "sparse", "gradients": "int8-dw"}),
    "ours 2:4, int8 gradients, int8 head": (
        partial(_OURS, head_precision="int8"),
        {"backend": "sparse", "gradients": "int8"},
    ),
    "ours 2:4, int8 gradients, int8 gates": (_OURS, {"backend": "sparse", "gradients": "int8", "saved_gates": "int8"}),
    "ours 2:4, int8 gradients, head and gates": (
        partial(_OURS, head_precision="int8"),
        {"backend": "sparse", "gradients": "int8", "saved_gates": "int8"},
    ),
    "ours 2:4, int8 gradients, MLP recomputed": (_RECOMPUTED, {"backend": "sparse", "gradients": "int8"}),
    "ours 2:4, auto": (_OURS, {"backend": "auto"}),
    "ours 6:8": (partial(ternary, pattern="6:8"), {"backend": "int8"}),
    "ours 6:8, int8 gradients": (partial(ternary, pattern="6:8"), {"backend": "int8", "gradients": "int8"}),
}
