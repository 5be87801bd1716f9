"""The packed layer on the kernels of a GPU. ``tests/kernels/interpreted`` has what runs without one."""

import pytest
import torch

from sbn_lightning import SparseBitLinear
from sbn_lightning.formats import load_model
from sbn_lightning.inference.opening import use_backend
from sbn_lightning.layers.packed import PackedTernaryLinear, pack_layers, packed_layer
from tests.formats.models import logits, make_model, save, some_tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible to torch")


@pytest.mark.parametrize("pattern", ["2:4", "6:8", "5:7"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_equal_the_reference(pattern, bits, dtype):
    torch.manual_seed(0)
    in_features = 224  # not a multiple of a tile of the kernels
    source = SparseBitLinear(in_features, 200, pattern=pattern, split_sizes=(120, 40, 40), activation_bits=bits)
    layer = packed_layer(source).cuda()
    for tokens in (1, 2, 9, 64, 65, 300):
        x = torch.randn(tokens, in_features, device="cuda", dtype=dtype)
        layer.backend = "reference"
        expected = layer(x)
        layer.backend = "kernels"
        actual = layer(x)
        assert actual.dtype == dtype
        error = (actual - expected).float().norm() / expected.float().norm()
        assert error < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


@pytest.mark.parametrize("pattern", ["2:4", "6:8"])
def test_logits_of_a_packed_model(tmp_path, pattern):
    from sbn_lightning.cli import main

    model = make_model(pattern=pattern, qkv_bias=True, d_model=128, d_ffn=256)
    save(model, tmp_path / "m.ckpt")
    # The embeddings stay exact. The default, 16 bits, moves the logits by 2 % of their deviation.
    assert main(["export", "--checkpoint", "m.ckpt", "--output", "out", "--embedding_bits", "32"]) == 0
    tokens = some_tokens(length=48)
    expected = logits(model, tokens)
    loaded = load_model("out", device="cuda").model
    for part in (tokens, tokens[:, :3]):
        actual = logits(loaded, part.cuda()).cpu()
        wanted = expected[:, : part.shape[1]]
        error = (actual - wanted).abs().amax(-1) / wanted.std()
        # A sum in another order may change a quantised token by one 8-bit step.
        assert error.median() < 1e-3
        assert error.max() < 5e-2
    layers = [layer for layer in loaded.modules() if isinstance(layer, PackedTernaryLinear)]
    assert layers
    assert all(layer._packed is not None for layer in layers)
    if torch.cuda.get_device_capability() == (9, 0):
        assert all(layer._layout == ("sparse24" if pattern == "2:4" else "dense") for layer in layers)
    use_backend(loaded, "int8", torch.float32)
    error = (logits(loaded, tokens.cuda()).cpu() - expected).abs().amax(-1) / expected.std()
    assert error.median() < 1e-3
    assert all(layer._layout == "dense" for layer in layers)


@pytest.mark.parametrize("tokens", [4, 100])
def test_a_compiled_model_is_the_same(tokens):
    model = pack_layers(make_model(pattern="2:4", d_model=128, d_ffn=256, max_sequence_length=128)).cuda()
    prompt = some_tokens(batch=1, length=tokens).cuda()
    expected = logits(model, prompt)
    model.compile_blocks()
    for _ in range(2):
        actual = logits(model, prompt)
    assert ((actual - expected).abs().amax(-1) / expected.std()).median() < 1e-3
    assert all(layer._packed is not None for layer in model.modules() if isinstance(layer, PackedTernaryLinear))
