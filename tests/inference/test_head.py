"""A head of 8 bits: close to the head that it rounds, and measured by ``sbn evaluate``."""

import json

import pytest
import torch
from sbn_kernels.decode.reference import int8_rows_reference
from sbn_kernels.decode.step import pack

from sbn_lightning.checkpoints.lightning_file import contents
from sbn_lightning.cli import main
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data.tokenizer import byte_tokenizer
from sbn_lightning.inference import generate
from sbn_lightning.inference.head import Int8Head, use_head
from sbn_lightning.inference.persistent import gather_weights, refusal
from tests.inference.test_decoder import PROMPTS, make


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_head_is_rounded_row_by_row(dtype):
    torch.manual_seed(0)
    weight = torch.randn(50, 32) * torch.logspace(-3, 3, 50).unsqueeze(1)
    weight[7] = 0
    head, x = Int8Head(weight), torch.randn(4, 3, 32, dtype=dtype)
    y = head(x)
    exact = x.double() @ weight.double().t()
    assert (y.shape, y.dtype) == ((4, 3, 50), dtype)
    error = (y.double() - exact).square().mean((0, 1)).sqrt() / exact.square().mean((0, 1)).sqrt().clamp(min=1e-30)
    assert error.max() < 0.02
    assert torch.equal(y[..., 7], torch.zeros(4, 3, dtype=dtype))
    twin = int8_rows_reference(x.flatten(0, 1), head.codes, head.scale)
    torch.testing.assert_close(y.flatten(0, 1), twin)


def test_a_model_generates_with_it_and_keeps_its_embedding():
    model = make()
    embedding = model.embed.weight.clone()
    use_head(model, 16)
    assert isinstance(model.lm_head, torch.nn.Linear)
    use_head(model, 8)
    use_head(model, 8)
    assert isinstance(model.lm_head, Int8Head)
    assert torch.equal(model.embed.weight, embedding)
    rows = generate(model, PROMPTS, max_new_tokens=6)
    model.lm_head = torch.nn.Linear(32, 320, bias=False).double()
    model.lm_head.weight.data = (Int8Head(embedding).codes * Int8Head(embedding).scale.unsqueeze(1)).double()
    assert generate(model, PROMPTS, max_new_tokens=6) == rows


def test_refuses():
    with pytest.raises(ConfigError, match="head_bits=4"):
        use_head(make(n_layers=1), 4)


def test_the_persistent_step_gets_the_codes():
    model = make(torch.bfloat16, d_model=256, n_heads=4, d_ffn=256)
    use_head(model, 8)
    assert "CUDA" in str(refusal(model, 1))  # Nothing else is in the way.
    weights = gather_weights(model)
    assert torch.equal(weights.head, model.lm_head.codes)
    packed = pack(weights)
    assert packed.head_bits == 8
    assert packed.head.data_ptr() == model.lm_head.codes.data_ptr()  # no copy
    assert torch.equal(packed.head_scale, model.lm_head.scale)
    model.lm_head = torch.nn.Identity()
    assert refusal(model, 1) == "does not know a head of the type Identity"


def test_evaluate_measures_it(tmp_path, capsys):
    model = make(torch.float32)
    torch.save(contents(model.config, model.state_dict()), "model.ckpt")
    byte_tokenizer().save("tokenizer.json")
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 10)
    options = ["--checkpoint", "model.ckpt", "--text", "text.txt", "--device", "cpu"]
    assert main(["evaluate", *options, "--head_bits", "8", "--output", "rounded.json"]) == 0
    assert "logits_error" in capsys.readouterr().out
    assert main(["evaluate", *options, "--output", "plain.json"]) == 0
    rounded, plain = (json.loads((tmp_path / name).read_text()) for name in ("rounded.json", "plain.json"))
    head = rounded["head"]
    assert head["perplexity_before"] == plain["perplexity"]["perplexity"]
    assert 0 < head["logits_error"] < 0.02
    assert rounded["perplexity"]["perplexity"] == pytest.approx(plain["perplexity"]["perplexity"], rel=0.01)
    assert head["perplexity_change"] == pytest.approx(
        rounded["perplexity"]["perplexity"] / plain["perplexity"]["perplexity"] - 1
    )
    assert "head" not in plain
