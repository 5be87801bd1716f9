import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from sbn_lightning import NMPattern, SparseBitLinear, SparseLinear, TernaryTransformer, TransformerConfig
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.sparse_linear import masked_layers
from sbn_lightning.models.loss import FUSED_VOCABULARY, choose_loss, linear_cross_entropy
from sbn_lightning.models.rope import apply_rope, rope_tables
from tests.helpers import small_config


def make(**changes):
    torch.manual_seed(0)
    return TernaryTransformer(small_config(**changes))


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Published parameter counts; tied embeddings are counted once.
    [("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-3b", 3_085_938_688)],
)
def test_presets_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = TernaryTransformer(TransformerConfig.preset(name, max_sequence_length=16))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(layer.pattern == NMPattern(6, 8) for _, layer in masked_layers(model))


@pytest.mark.parametrize("linear", ["ternary", "masked", "dense"])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True, "tie_embeddings": False}, {"n_kv_heads": 4}])
def test_logits_are_causal_and_loss_matches(linear, options):
    model = make(linear=linear, **options)
    tokens = torch.randint(320, (3, 20))
    logits = model(tokens)
    assert logits.shape == (3, 20, 320)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 320
    assert torch.equal(model(changed)[:, :12], logits[:, :12])
    assert not torch.equal(model(changed)[:, 12:], logits[:, 12:])
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model.loss(tokens[:, :-1], tokens[:, 1:]), expected)


def test_layers_by_kind():
    model = make(qkv_bias=True)
    qkv = model.blocks[0].attention.qkv
    assert type(qkv) is SparseBitLinear
    assert qkv.split_sizes == (32, 16, 16)
    assert qkv.bias is not None
    assert model.blocks[0].attention.o.bias is None
    assert model.blocks[0].mlp.gate_up.split_sizes == (64, 64)
    assert type(make(linear="masked").blocks[0].mlp.down) is SparseLinear
    assert type(make(linear="dense").blocks[0].mlp.down) is torch.nn.Linear
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.embed.weight


def test_grouped_query_attention_equals_repeated_heads():
    model = make(linear="dense")
    attention = model.blocks[0].attention
    x = torch.randn(2, 7, 32)
    cos, sin = model.cos[:7], model.sin[:7]
    q, k, v = attention.qkv(x).split((32, 16, 16), -1)
    heads = lambda t: t.view(2, 7, -1, 8).transpose(1, 2)  # noqa: E731
    q, k, v = apply_rope(heads(q), cos, sin), apply_rope(heads(k), cos, sin), heads(v)
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
    scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf"))
    expected = attention.o((scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, cos, sin), expected, rtol=1e-4, atol=1e-6)


def test_rope_depends_on_the_distance_only():
    cos, sin = rope_tables(small_config())
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i, j):
        return (apply_rope(q, cos[i : i + 1], sin[i : i + 1]) * apply_rope(k, cos[j : j + 1], sin[j : j + 1])).sum()

    torch.testing.assert_close(score(5, 3), score(45, 43), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score(0, 0), (q * k).sum())


def test_activation_checkpointing_changes_nothing():
    tokens = torch.randint(320, (2, 17))
    gradients = []
    for activation_checkpointing in (False, True, "mlp"):
        model = make(activation_checkpointing=activation_checkpointing)
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append([p.grad for p in model.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))
    with pytest.raises(ConfigError, match="activation_checkpointing='all' is not one of False, True, 'mlp'"):
        make(activation_checkpointing="all")


@pytest.mark.parametrize("linear", ["ternary", "masked"])
def test_compiled_blocks_train_as_eager_ones(linear):
    """They also do after masks changed, were held, and stopped regrowing. Names in the state dict do not change."""
    tokens = torch.randint(320, (2, 17))
    states = []
    for compiled in (False, True):
        model = make(linear=linear)
        if compiled:
            model.compile_blocks(backend="aot_eager")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(6):
            for _, layer in masked_layers(model):
                layer.hold_mask, layer.regrow = step >= 2, step != 4
            model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        states.append(model.state_dict())
    eager, graph = states
    assert sorted(eager) == sorted(graph)
    for key in eager:
        torch.testing.assert_close(graph[key], eager[key], rtol=1e-3, atol=1e-4)


def test_ddp_leaves_compiled_blocks_whole(tmp_path):
    """By default torch cuts a compiled graph at the buckets of DDP, which here have a megabyte."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    tokens, counts = torch.randint(320, (2, 17)), []
    try:
        for distributed in (False, True):
            model, counter = make(d_model=256, d_ffn=1024, n_layers=1), CompileCounter()
            model.compile_blocks(backend=counter)
            called = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1) if distributed else model
            called(tokens).sum().backward()
            counts.append(counter.frame_count)
    finally:
        dist.destroy_process_group()
    assert counts[0] == counts[1] > 0


def test_state_dict_keys():
    """Checkpoints of earlier versions must keep loading: change these names only with a migration."""
    keys = make(qkv_bias=True, n_layers=1).state_dict()
    linears = ("attention.qkv", "attention.o", "mlp.gate_up", "mlp.down")
    expected = {f"blocks.0.{name}.{part}" for name in linears for part in ("weight", "mask_bits")}
    expected |= {"blocks.0.attention.qkv.bias", "blocks.0.attention_norm.weight", "blocks.0.mlp_norm.weight"}
    assert set(keys) == expected | {"embed.weight", "norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("implementation", ["chunked", "torch", "plain", "auto"])
def test_loss_implementations_agree(implementation, monkeypatch):
    if implementation == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this version of torch has no linear_cross_entropy")
    monkeypatch.setattr("sbn_lightning.models.loss.CHUNK_BYTES", 0)  # 256 tokens
    torch.manual_seed(0)
    hidden = torch.randn(600, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(FUSED_VOCABULARY, 16, dtype=torch.float64, requires_grad=True)
    target = torch.randint(FUSED_VOCABULARY, (600,))
    expected = torch.autograd.grad(F.cross_entropy(hidden @ weight.t(), target), (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, target, implementation)
    for actual, wanted in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-9)


def test_chunked_loss_in_bfloat16_sums_the_head_in_float32(monkeypatch):
    monkeypatch.setattr("sbn_lightning.models.loss.CHUNK_BYTES", 0)
    torch.manual_seed(0)
    hidden, weight = torch.randn(600, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    target = torch.randint(300, (600,))
    exact = F.cross_entropy(hidden @ weight.t(), target)
    expected = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, target, "chunked")
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(hidden, weight, target, "chunked"), loss.detach())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    found = torch.autograd.grad(3 * loss, (hidden, weight))
    assert [g.dtype for g in found] == [torch.float32, torch.float32]
    for actual, wanted in zip(found, expected, strict=True):
        assert (actual - 3 * wanted).norm() < 0.02 * (3 * wanted).norm()


def test_choice_of_loss():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [choose_loss("auto", classes, cuda) for classes in (4095, 4096, 151936)] == ["plain", "chunked", "chunked"]
    fused = "torch" if hasattr(torch.nn, "LinearCrossEntropyOptions") else "plain"
    assert [choose_loss("auto", classes, cpu) for classes in (16383, 16384)] == ["plain", fused]
    with pytest.raises(ConfigError, match="CUDA"):
        choose_loss("liger", 151936, cpu)
    with pytest.raises(ConfigError, match="not one of"):
        choose_loss("fast", 4096, cpu)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 36, "n_heads": 12}, "heads of an even size"),
        ({"n_kv_heads": 3}, "n_kv_heads=3"),
        ({"d_ffn": 100}, r"mlp\.down \(d_ffn\): in_features=100"),
        ({"d_model": 24, "n_heads": 2, "pattern": "5:9"}, r"attention\.qkv.*in_features=24"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"pattern": 368}, "quote it"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        small_config(**changes)


def test_unknown_preset_and_long_sequence():
    with pytest.raises(ConfigError, match=r"qwen2\.5-0\.5b"):
        TransformerConfig.preset("gpt-5")
    with pytest.raises(ConfigError, match="65 tokens is longer"):
        make()(torch.zeros(1, 65, dtype=torch.long))


def test_config_round_trips_through_plain_values():
    config = small_config(pattern="2:4")
    values = config.to_dict()
    assert values["pattern"] == "2:4"
    assert TransformerConfig(**values) == config
