"""Decoding with a cache equals a loop without a cache.

Models are float64, so that a rounded activation is the same integer whatever the order of a sum."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.inference import Decoder, Speed, generate, stream
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.sparse_linear import SparseBitLinear, masked_layers
from sbn_lightning.models.transformer import TernaryTransformer
from tests.helpers import small_config

PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12, 200, 3, 3]]


def make(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model = TernaryTransformer(small_config(**({"init_std": 0.3} | changes))).to(dtype).eval().requires_grad_(False)
    model.embed.weight.mul_(0.05)  # without this a new model would repeat its last token, because the head is tied
    return model


@torch.no_grad()
def without_cache(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pattern": "2:4", "activation_bits": 4, "qkv_bias": True},
        {"activation_bits": None, "tie_embeddings": False},
        {"n_kv_heads": 4, "n_layers": 1},
        {"n_kv_heads": 1, "linear": "masked", "qkv_bias": True},
        {"linear": "dense", "tie_embeddings": False},
    ],
    ids=str,
)
def test_greedy_tokens_equal_those_of_a_loop_without_cache(options):
    model = make(**options)
    expected = [without_cache(model, prompt, 24) for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) == 3
    assert len(set(expected[0])) > 2
    assert generate(model, PROMPTS, max_new_tokens=24) == expected
    assert [list(stream(model, prompt, max_new_tokens=24)) for prompt in PROMPTS] == expected


def test_a_decoder_is_used_again():
    model = make()
    decoder = Decoder(model, 3, 40)
    for prompts in (PROMPTS, PROMPTS[::-1]):
        again = generate(model, prompts, max_new_tokens=12, decoder=decoder)
        assert again == generate(model, prompts, max_new_tokens=12)
    assert list(map(len, generate(model, [[1] * 38, [2], [3]], decoder=decoder))) == [2, 39, 39]
    for options, message in (
        ({"decode_step": "auto"}, "its own cuda_graph, decode_step"),
        ({"prefill_chunk": 4}, "its own cuda_graph, decode_step"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            generate(model, PROMPTS, decoder=decoder, **options)
    with pytest.raises(ConfigError, match="a SimpleNamespace cannot be used again"):
        generate(model, PROMPTS, decoder=SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="belongs to another model"):
        generate(make(), PROMPTS, decoder=decoder)
    with pytest.raises(ConfigError, match=r"no room in the decoder's rows of 40 \(max_length\)"):
        generate(model, [[1] * 40, [2], [3]], decoder=decoder)
    with pytest.raises(ConfigError, match="2 prompts for a decoder of batch_size=3"):
        generate(model, PROMPTS[:2], decoder=decoder)


def test_packed_layers_generate_as_latent_ones():
    model = make(qkv_bias=True)
    expected = generate(model, PROMPTS, max_new_tokens=12)
    for name, layer in list(masked_layers(model)):
        assert isinstance(layer, SparseBitLinear)
        options = {"pattern": layer.pattern, "split_sizes": layer.split_sizes}
        codes, gamma = layer.ternary()
        model.set_submodule(name, PackedTernaryLinear(codes, gamma, layer.bias, **options))
    assert not list(masked_layers(model))
    assert generate(model, PROMPTS, max_new_tokens=12) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_equal_the_plain_forward(dtype):
    model = make(dtype, activation_bits=None)
    tokens = torch.randint(320, (2, 30), generator=torch.Generator().manual_seed(0))
    decoder = Decoder(model, 2, 40)
    logits = [decoder.prefill([tokens[0, :9].tolist(), tokens[1, :9].tolist()])]
    logits += [decoder.step(tokens[:, i]) for i in range(9, 30)]
    with torch.no_grad():
        expected = model(tokens)[:, 8:]
    torch.testing.assert_close(torch.stack(logits, 1), expected)


def test_a_decoder_forgets_at_the_next_prefill():
    """Slots behind a short prompt still hold keys of an earlier prompt, made huge here. The mask must exclude them."""
    model = make()
    decoder = Decoder(model, 1, 60)
    fresh = Decoder(model, 1, 60)
    decoder.prefill([[9] * 50])
    for layer in decoder._layers:
        layer.keys.mul_(1e3)
        layer.values.mul_(1e3)
    for one in (decoder, fresh):
        one.prefill([[1, 2]])
    for token in (3, 4, 5):
        assert torch.equal(decoder.step(torch.tensor([token])), fresh.step(torch.tensor([token])))


def test_a_model_in_training_mode_that_recomputes_its_activations():
    model = make()
    expected = generate(model, PROMPTS, max_new_tokens=6)
    model.config = replace(model.config, activation_checkpointing=True)
    assert generate(model.train(), PROMPTS, max_new_tokens=6) == expected


def test_a_graph_is_recorded_again_when_weights_have_changed():
    """The old graph reads codes that ternary layers made from the old weights."""
    model = make()
    decoder = Decoder(model, 1, 60)
    decoder.prefill([[1, 2]])
    decoder._plain._graphs["greedy"] = object()
    decoder.prefill([[3, 4]])
    assert decoder._plain._graphs
    with torch.no_grad():
        model.blocks[1].mlp.down.weight.mul_(2)
    decoder.prefill([[3, 4]])
    assert not decoder._plain._graphs


def test_half_precision_and_compiled_blocks():
    model = make(torch.bfloat16)
    expected = generate(model, PROMPTS, max_new_tokens=6)
    assert all(len(row) == 6 for row in expected)
    model.compile_blocks(backend="eager")
    assert generate(model, PROMPTS, max_new_tokens=6) == expected


def test_stop_tokens_end_a_sequence_and_are_left_out():
    model = make()
    full = generate(model, PROMPTS, max_new_tokens=40)
    stop = full[0][5]
    cut = [row[: row.index(stop)] if stop in row else row for row in full]
    assert generate(model, PROMPTS, max_new_tokens=40, stop_tokens=[stop]) == cut
    assert list(stream(model, PROMPTS[0], max_new_tokens=40, stop_tokens=[stop])) == cut[0]


def test_stops_early_when_all_have_stopped(monkeypatch):
    model = make()
    steps = []
    step = Decoder.step_next
    monkeypatch.setattr(Decoder, "step_next", lambda self, tokens: steps.append(1) or step(self, tokens))
    everything = range(320)
    assert generate(model, PROMPTS, max_new_tokens=50, stop_tokens=everything) == [[], [], []]
    assert len(steps) == 15


def test_the_context_ends():
    model = make()
    prompts = [[1] * 60, [2] * 10]
    rows = generate(model, prompts, max_new_tokens=100)
    assert [len(row) for row in rows] == [4, 54]
    assert rows == [without_cache(model, prompt, len(row)) for prompt, row in zip(prompts, rows, strict=True)]


def test_speed_counts_what_was_done():
    speed = Speed()
    rows = generate(make(), PROMPTS, max_new_tokens=5, speed=speed)
    assert (speed.prompt_tokens, speed.new_tokens, speed.sequences) == (13, sum(map(len, rows)), 3)
    assert speed.prefill_seconds > 0
    assert speed.decode_seconds > 0
    assert "prefill 13 tokens" in str(speed)
    assert "decode 12 tokens" in str(speed)
    streamed = Speed()
    list(stream(make(), PROMPTS[0], max_new_tokens=5, speed=streamed))
    assert (streamed.prompt_tokens, streamed.new_tokens, streamed.sequences) == (3, 5, 1)
    total = speed + streamed
    assert (total.prompt_tokens, total.sequences) == (16, 4)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1] * 64], {}, "64 tokens, which leaves no room in the model's context of 64"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([], {}, "no prompt"),
        ([[1], [3, 320]], {}, "prompt 1 has token id 320, the model's vocab_size is 320"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"cuda_graph": True}, "needs a model on a GPU"),
    ],
)
def test_refuses(prompts, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(make(n_layers=1), prompts, **options)


def test_decoder_refuses():
    model = make(n_layers=1)
    with pytest.raises(ConfigError, match="call prefill first"):
        Decoder(model, 1, 8).step(torch.tensor([1]))
    with pytest.raises(ConfigError, match="max_length=65"):
        Decoder(model, 1, 65)
    with pytest.raises(ConfigError, match="2 prompts for a decoder of batch_size=1"):
        Decoder(model, 1, 8).prefill([[1], [2]])
    with pytest.raises(ConfigError, match="prompt 0 has 9 tokens, the cache holds 8"):
        Decoder(model, 1, 8).prefill([[1] * 9])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("options", [{}, {"linear": "dense", "qkv_bias": True}], ids=str)
def test_a_cuda_graph_computes_what_a_loop_does(options):
    model = make(**options).cuda()
    expected = generate(model, PROMPTS, max_new_tokens=40, cuda_graph=False)
    assert generate(model, PROMPTS, max_new_tokens=40) == expected
    assert list(stream(model, PROMPTS[2], max_new_tokens=40)) == expected[2]
    assert generate(model.cpu(), PROMPTS, max_new_tokens=40) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("pattern", "backend"), [("2:4", "sparse"), ("6:8", "int8")])
def test_kernels_in_a_compiled_graph_give_the_logits_of_the_reference(pattern, backend):
    from sbn_lightning.backends.selection import engines
    from sbn_lightning.inference.opening import use_backend

    if backend not in engines(torch.device("cuda"))[0]:
        pytest.skip(f"backend {backend!r} does not run here")
    model = make(torch.float32, pattern=pattern, d_model=256, d_ffn=512, qkv_bias=True).cuda()
    tokens = torch.randint(320, (2, 30), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        expected = model(tokens)[:, 8:]
    use_backend(model, backend, torch.float32)
    model.compile_blocks(fullgraph=True)
    decoder = Decoder(model, 2, 40)
    logits = [decoder.prefill(tokens[:, :9].tolist())]
    logits += [decoder.step(tokens[:, i]).clone() for i in range(9, 30)]
    difference = torch.stack(logits, 1) - expected
    assert difference.square().mean().sqrt() < 0.02 * expected.square().mean().sqrt()
