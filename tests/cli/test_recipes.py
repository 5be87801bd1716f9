"""Every recipe parses, begins with a description, comments its keys, and trains a shrunken copy for two steps."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from sbn_lightning import SparseTernaryPrecision, TernaryTransformer, TransformerConfig
from sbn_lightning.checkpoints import lightning_file
from sbn_lightning.cli import main
from sbn_lightning.cli.training import SBNCLI
from sbn_lightning.formats.init_from import FIXED
from sbn_lightning.training.distillation import Distillation

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SHRUNKEN = {
    "model.config.vocab_size": 320,
    "model.config.d_model": 32,
    "model.config.n_layers": 2,
    "model.config.n_heads": 4,
    "model.config.n_kv_heads": 2,
    "model.config.d_ffn": 64,
    "model.compile": "false",
    "model.cuda_graphs": "false",
    "data.batch_size": 2,
    "data.sequence_length": 16,
    "data.num_workers": 0,
    "trainer.accelerator": "cpu",
    "trainer.strategy": "auto",
    "trainer.max_steps": 2,
    "trainer.accumulate_grad_batches": 1,
    "trainer.val_check_interval": 2,
    "trainer.limit_val_batches": 1,
    "trainer.num_sanity_val_steps": 0,
    "trainer.enable_progress_bar": "false",
}


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sbn"])


@pytest.mark.parametrize(
    "recipe", [path for path in RECIPES if path.stem.startswith("qwen")], ids=lambda path: path.stem
)
def test_one_switch_makes_a_gpu_recipe_fit_two_cpu_cores(recipe, capsys):
    with pytest.raises(SystemExit):
        SBNCLI(["fit", "--config", recipe.stem, "--config", "sizes/cpu", "--print_config"])
    values = yaml.safe_load(capsys.readouterr().out)
    assert (values["trainer"]["accelerator"], values["trainer"]["plugins"]) == ("cpu", None)
    assert (values["model"]["config"]["d_model"], values["model"]["compile"]) == (192, False)
    assert values["model"]["cuda_graphs"] is False
    assert values["model"]["config"]["pattern"] == "6:8"  # what the size does not name stays the recipe's
    tokens = 16 * 256
    assert values["data"]["batch_size"] * values["data"]["sequence_length"] == tokens


def test_the_distillation_fits_two_cpu_cores_too(capsys):
    words = ["--config", "distill_from_pretrained", "--config", "sizes/distill_cpu", "--print_config"]
    with pytest.raises(SystemExit):
        SBNCLI(["fit", *words])
    values = yaml.safe_load(capsys.readouterr().out)
    assert (values["trainer"]["accelerator"], values["trainer"]["plugins"]) == ("cpu", None)
    assert values["model"]["distillation"]["dtype"] == "float32"
    assert values["trainer"]["max_steps"] * values["data"]["batch_size"] * values["data"]["sequence_length"] == 245760


def test_there_are_recipes():
    names = {path.stem for path in RECIPES}
    assert {"sparse_pretrain", "sparse_pretrain_2_4", "dense_to_sparse"} <= names
    assert {"bf16_sparse_baseline", "ternary_dense"} <= names
    assert "dense_to_sparse_from_pretrained" in names
    assert {f"qwen2.5_{size}_sparse" for size in ("0.5b", "1.5b", "3b")} <= names


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_two_steps_of_a_shrunken_copy(recipe, tokens, capsys):
    shrunken = SHRUNKEN | {"data.path": tokens}
    # tests/integrations/test_recipe.py trains the recipe that has another model class
    if "source" in yaml.safe_load(recipe.read_text())["model"]:
        return
    if "init_from" in yaml.safe_load(recipe.read_text())["model"]:
        shrunken["model.init_from"] = shrunken_weights(recipe)
    if "distillation" in yaml.safe_load(recipe.read_text())["model"]:
        shrunken["model.distillation.teacher"] = shrunken["model.init_from"]
    options = [f"--{key}={value}" for key, value in shrunken.items()]
    assert main(["fit", "--config", str(recipe), *options]) == 0
    printed = capsys.readouterr().out
    assert "Trained 2 steps." in printed
    assert f"logs/{recipe.stem}/version_0" in printed


def shrunken_weights(recipe):
    """A dense checkpoint in the form that ``import-hf`` writes, with the shrunken shape of a recipe."""
    config = yaml.safe_load(recipe.read_text())["model"]["config"]
    shape = {key.split(".")[-1]: value for key, value in SHRUNKEN.items() if key.startswith("model.config.")}
    model = TernaryTransformer(TransformerConfig(**(config | shape | {"linear": "dense"})))
    torch.save(lightning_file.contents(model.config, model.state_dict()), "pretrained.ckpt")
    return "pretrained.ckpt"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_what_it_says(recipe):
    text = recipe.read_text()
    lines = text.splitlines()
    assert re.match(r"# .+\.", lines[0])
    values = yaml.safe_load(text)
    assert values["trainer"]["logger"]["init_args"]["name"] == recipe.stem
    if "source" in values["model"]:  # a model of transformers, which has a configuration of its own
        return
    config = TransformerConfig(**values["model"]["config"])
    if "distillation" in values["model"]:
        assert values["model"]["distillation"]["teacher"] == values["model"]["init_from"]
        assert not set(FIXED) & set(values["model"]["config"])  # the shape comes with the weights
        assert Distillation(**values["model"]["distillation"]).logits == 1.0
        return
    if recipe.stem.startswith("qwen") or "init_from" in values["model"]:
        name = Path(values["model"].get("init_from", recipe.stem.replace("_", "-", 1))).name
        published = TransformerConfig.preset(re.match(r"qwen2\.5-[\d.]+b", name)[0])
        published = replace(published, activation_checkpointing=config.activation_checkpointing)
        if "init_from" in values["model"]:  # the shape comes with the weights
            assert not set(FIXED) & set(values["model"]["config"])
            config = replace(config, **{name: getattr(published, name) for name in FIXED})
        assert config == published
        tokens_a_step = values["data"]["batch_size"] * values["trainer"]["accumulate_grad_batches"] * 2048
        assert tokens_a_step == 2**20
        plugin = SparseTernaryPrecision(**values["trainer"]["plugins"]["init_args"])
        assert plugin.tokens == values["data"]["batch_size"] * values["data"]["sequence_length"]


def test_parsed_recipe_dumps_and_parses_to_itself(tokens, capsys):
    recipe = RECIPES[-1]
    with pytest.raises(SystemExit):
        SBNCLI(["fit", "--config", str(recipe), "--print_config"])
    first = capsys.readouterr().out
    Path("dumped.yaml").write_text(first)
    with pytest.raises(SystemExit):
        SBNCLI(["fit", "--config", "dumped.yaml", "--print_config"])
    assert capsys.readouterr().out == first
