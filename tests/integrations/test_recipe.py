"""recipes/from_hugging_face.yaml trains and resumes, and is not confused with the recipes of our own transformer."""

import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from sbn_lightning.cli import main  # noqa: E402
from sbn_lightning.cli.model_class import model_class  # noqa: E402
from sbn_lightning.integrations.huggingface.causal_lm import CausalLM  # noqa: E402
from sbn_lightning.training.module import SparseBitNet  # noqa: E402

RECIPES = Path(__file__).parents[2] / "recipes"
SHRUNKEN = {
    "model.source.vocab_size": 320,
    "model.source.hidden_size": 32,
    "model.source.head_dim": 8,
    "model.source.intermediate_size": 64,
    "model.source.num_hidden_layers": 2,
    "data.batch_size": 2,
    "data.sequence_length": 16,
    "trainer.accelerator": "cpu",
    "trainer.limit_val_batches": 1,
    "trainer.num_sanity_val_steps": 0,
    "trainer.enable_progress_bar": "false",
}


def fit(tokens, **options):
    values = SHRUNKEN | {"data.path": tokens} | {key.replace("__", "."): value for key, value in options.items()}
    words = [f"--{key}={value}" for key, value in values.items()]
    return main(["fit", "--config", str(RECIPES / "from_hugging_face.yaml"), *words])


def test_two_steps_and_two_more(tokens, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sbn"])
    assert fit(tokens, trainer__max_steps=2, trainer__val_check_interval=2, checkpoint__every_n_train_steps=2) == 0
    last = next(Path("logs").rglob("last.ckpt"))
    model = CausalLM.load_from_checkpoint(last, weights_only=True)
    assert model.config.hugging_face["model_type"] == "qwen3"
    assert sum(type(layer).__name__ == "SparseBitLinear" for layer in model.modules()) == 14
    assert fit(tokens, trainer__max_steps=4, trainer__val_check_interval=2, ckpt_path=last) == 0
    assert torch.load(last, weights_only=True)["global_step"] in (2, 4)
    assert main(["export", "--checkpoint", str(last), "--output", "folder", "--format", "hf-sbn"]) == 0
    assert main(["export", "--checkpoint", str(last), "--output", "other", "--format", "packed"]) != 0
    assert transformers.AutoModelForCausalLM.from_pretrained("folder").config.hidden_size == 32


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", "--config", str(RECIPES / "from_hugging_face.yaml")], CausalLM),
        (["fit", f"--config={RECIPES / 'from_hugging_face.yaml'}"], CausalLM),
        (["fit", "--model.source=some/name"], CausalLM),
        (["fit", "--config", str(RECIPES / "dense_to_sparse.yaml")], SparseBitNet),
        (["fit", "--config", "nowhere.yaml"], SparseBitNet),
        (["fit", "--help"], SparseBitNet),
    ],
)
def test_the_recipe_tells_the_class(words, expected):
    assert model_class(words) is expected
