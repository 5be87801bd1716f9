"""The options in which model families differ: formulas by hand, FLOPs, and configurations that cannot work."""

import pytest
import torch
from torch.nn import functional as F

from sbn_lightning import RopeScaling, TernaryTransformer, TransformerConfig
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models.attention import causal_attention
from sbn_lightning.models.config import family_options
from sbn_lightning.models.flops import flops_per_token
from sbn_lightning.models.rope import apply_rope
from tests.helpers import small_config

ALL = {
    "head_dim": 16,
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "qk_norm": "head",
    "post_norm": True,
    "activation": "relu2",
    "sub_norms": True,
    "sliding_window": 5,
    "sliding_layers": (1,),
    "layers_without_rope": (0,),
}


def make(**changes):
    torch.manual_seed(0)
    model = TernaryTransformer(small_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def by_hand(block, x, cos, sin, config, index):
    """One dense block from the formulas, token by token and head by head."""

    def norm(module, value):
        return value / (value.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * module.weight

    attention, size, length = block.attention, config.head_size, x.shape[1]
    q, k, v = attention.qkv(x).split(attention.splits, -1)
    q, k, v = (part.view(*x.shape[:2], -1, size).transpose(1, 2) for part in (q, k, v))
    q, k = norm(attention.q_norm, q), norm(attention.k_norm, k)
    if index not in config.layers_without_rope:
        q, k = apply_rope(q, cos[:length], sin[:length]), apply_rope(k, cos[:length], sin[:length])
    out = torch.zeros_like(q)
    for head in range(config.n_heads):
        shared = head // (config.n_heads // config.n_kv_heads)
        for now in range(length):
            first = 0 if config.window(index) is None else max(0, now - config.window(index) + 1)
            scores = (k[:, shared, first : now + 1] @ q[:, head, now].unsqueeze(-1)).squeeze(-1) / size**0.5
            out[:, head, now] = (scores.softmax(-1).unsqueeze(1) @ v[:, shared, first : now + 1]).squeeze(1)
    x = x + norm(block.attention_norm, attention.o(norm(attention.sub_norm, out.transpose(1, 2).flatten(2))))
    gate, up = block.mlp.gate_up(x).chunk(2, -1)
    return x + norm(block.mlp_norm, block.mlp.down(norm(block.mlp.sub_norm, gate.clamp(min=0) ** 2 * up)))


def test_a_block_with_every_option_follows_the_formulas():
    model = make(linear="dense", **ALL)
    x = torch.randn(2, 11, 32)
    with torch.no_grad():
        for index, block in enumerate(model.blocks):
            found = block(x, model.cos[:11], model.sin[:11])
            expected = by_hand(block, x, model.cos, model.sin, model.config, index)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [4, 5, 6, 30])
def test_a_window_is_a_band_of_the_causal_mask(length):
    q, k, v = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 8)
    band = torch.ones(length, length).tril().triu(-4).bool()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=band, enable_gqa=True)
    torch.testing.assert_close(causal_attention(q, k, v, 5), expected, rtol=1e-5, atol=1e-6)


def test_a_compiled_and_a_checkpointed_block_give_the_same_gradients():
    tokens = torch.randint(320, (2, 17), generator=torch.Generator().manual_seed(0))
    options = ALL | {"n_layers": 1, "sliding_layers": (0,), "layers_without_rope": ()}
    found = []
    for way in ("eager", "checkpointed", "compiled"):
        model = make(activation_checkpointing=way == "checkpointed", **options)
        if way == "compiled":
            model.compile_blocks(backend="eager")
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    eager, checkpointed, compiled = found
    assert all(torch.equal(a, b) for a, b in zip(eager, checkpointed, strict=True))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)


def test_flops_count_the_width_of_the_heads_and_the_windows():
    def attention(**changes):
        changes |= {"linear": "dense", "n_layers": 2}
        model = TernaryTransformer(small_config(**changes))
        linear = sum(6 * m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
        return flops_per_token(model, 64) - linear

    assert attention() == 2 * 6 * 32 * 64
    assert attention(head_dim=32) == 2 * 6 * 128 * 64
    # With a window of 16, the 64 tokens attend to 1, 2, ... 16, 16, ... 16 tokens: about 14.1 on average and not 32.
    windowed = attention(sliding_window=16, sliding_layers=(0,))
    assert windowed == 6 * 32 * 64 + 12 * 32 * (16 - 16**2 / 128)
    assert attention(sliding_window=64) == attention()


def test_a_configuration_without_these_options_is_written_as_before():
    """Older programs can then read a packed folder. Lists of blocks come in one form."""
    plain = small_config().to_dict(whole=False)
    assert not set(plain) & set(family_options())
    assert set(small_config().to_dict()) >= set(family_options())
    config = small_config(**ALL)
    assert {name for name in ALL if name != "qkv_bias"} <= set(config.to_dict(whole=False))
    assert TransformerConfig(**config.to_dict(whole=False)) == config
    assert small_config(sliding_window=5, sliding_layers=[1, 0]).sliding_layers is None
    assert small_config(sliding_window=5, sliding_layers=[]).sliding_window is None
    assert small_config(layers_without_rope=[1, 0, 1]).layers_without_rope == (0, 1)
    assert small_config(head_dim=8).beyond_plain_blocks() == {}
    assert small_config(sliding_window=64).beyond_plain_blocks() == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 7}, "head_dim=7 must be an even number"),
        ({"head_dim": 6, "pattern": "2:32"}, r"attention\.o \(n_heads \* head_dim\): in_features=24"),
        ({"qk_norm": "layer"}, "qk_norm"),
        ({"activation": "gelu"}, "activation"),
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ({"sliding_layers": (1,)}, "sliding_layers names blocks, and sliding_window does not say"),
        ({"sliding_window": 5, "sliding_layers": (2,)}, "sliding_layers: there is no block 2"),
        ({"layers_without_rope": (-1,)}, "layers_without_rope: there is no block -1"),
        (
            {"rope_scaling": RopeScaling(2.0, original_max_position_embeddings=32, rope_type="dynamic")},
            "max_sequence_length=64 is beyond the original context of 32 tokens",
        ),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        small_config(**changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"factor": 2.0}, "rope_type 'llama3' needs low_freq_factor"),
        ({"factor": 2.0, "rope_type": "yarn"}, "rope_type 'yarn' needs original_max_position_embeddings"),
        ({"factor": 2.0, "rope_type": "longrope"}, "rope_type"),
        ({"factor": 2.0, "rope_type": "linear", "attention_factor": 2.0}, "'linear' does not use attention_factor"),
        (
            {"factor": 2.0, "rope_type": "yarn", "original_max_position_embeddings": 8, "beta_slow": 40.0},
            "beta_slow=40.0 must be above 0 and at most beta_fast=32.0",
        ),
        (
            {"factor": 2.0, "rope_type": "yarn", "original_max_position_embeddings": 8, "attention_factor": 0.0},
            "attention_factor=0.0 must be above 0",
        ),
    ],
    ids=str,
)
def test_scaled_positions_that_cannot_work_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RopeScaling(**values)
