"""The examples of integrations: each is under 40 lines and does what its docstring says."""

import importlib
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.mark.parametrize("name", ["plain_pytorch", "hugging_face_trainer", "any_causal_lm", "torchao_quantize"])
def test_examples_are_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 40


def test_plain_pytorch(example, capsys):
    loss, trained, loaded = example("plain_pytorch").main(steps=120)
    assert loss < 0.3
    assert torch.equal(trained, loaded)
    assert "'mask_density': 0.5" in capsys.readouterr().out


def test_hugging_face_trainer(example, capsys):
    pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("accelerate")
    history, trained, packed = example("hugging_face_trainer").main(steps=40)
    logged = [entry for entry in history if "loss" in entry]
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert logged[-1]["sparsity/mask_density"] == 0.5
    prompt = torch.arange(16)[None]
    assert torch.equal(trained.cpu()(prompt).logits, packed.cpu()(prompt).logits)


def test_any_causal_lm(example):
    pytest.importorskip("transformers", minversion="5")
    loss, ours, theirs = example("any_causal_lm").main(steps=20)
    assert loss < 5  # a uniform guess has ln 256 = 5.5
    assert ours[0] == theirs[0, 16:].tolist()


def test_torchao(example):
    pytest.importorskip("torchao")
    loss, trained, packed = example("torchao_quantize").main(steps=60)
    assert loss < 1.5  # a uniform guess has ln 10 = 2.3
    assert torch.equal(trained, packed)
