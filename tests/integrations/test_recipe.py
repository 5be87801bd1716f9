"""recipes/from_hugging_face.yaml, from training to evaluation, text and every export."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from sbn_lightning.cli import main  # noqa: E402
from sbn_lightning.cli.model_class import model_class  # noqa: E402
from sbn_lightning.core.errors import DataError  # noqa: E402
from sbn_lightning.inference import Generator  # noqa: E402
from sbn_lightning.integrations.huggingface.causal_lm import CausalLM  # noqa: E402
from sbn_lightning.integrations.opening import open_any  # noqa: E402
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


def run(command, tokens, **options):
    values = SHRUNKEN | {"data.path": tokens} | {key.replace("__", "."): value for key, value in options.items()}
    words = [f"--{key}={value}" for key, value in values.items()]
    return main([command, "--config", str(RECIPES / "from_hugging_face.yaml"), *words])


@pytest.fixture(scope="module")
def last(tokens, tmp_path_factory):
    """The checkpoint of two steps of the recipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sbn"])
        patch.chdir(tmp_path_factory.mktemp("recipe"))
        options = {"trainer__max_steps": 2, "trainer__val_check_interval": 2, "checkpoint__every_n_train_steps": 2}
        assert run("fit", tokens, **options) == 0
        return next(Path("logs").rglob("last.ckpt")).absolute()


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sbn"])


def logits(hf):
    return hf.eval()(input_ids=torch.arange(12)[None]).logits


def test_a_checkpoint_holds_model_and_tokenizer(last):
    model = CausalLM.load_from_checkpoint(last, weights_only=True)
    assert model.config.hugging_face["model_type"] == "qwen3"
    assert sum(type(layer).__name__ == "SparseBitLinear" for layer in model.modules()) == 14
    assert model.text_files.tokenizer is not None


def test_fit_and_fabric_continue_it(last, tokens, capsys):
    steps = []
    for command in ("fit", "fabric"):
        assert run(command, tokens, trainer__max_steps=4, checkpoint__every_n_train_steps=4, ckpt_path=last) == 0
        assert "of linear FLOPs" in capsys.readouterr().out
        saved = [torch.load(file, weights_only=True) for file in Path("logs").rglob("*step=4*.ckpt")]
        steps += [saved[-1]["state_dict"]]
        assert saved[-1]["global_step"] == 4
    assert all(torch.equal(value, steps[1][name]) for name, value in steps[0].items())


def test_init_from_takes_weights_alone(last, tokens, capsys):
    options = {"trainer__max_steps": 1, "checkpoint__every_n_train_steps": 1, "model__optimizer__init_args__lr": 0.0}
    assert run("fit", tokens, model__init_from=last, model__pattern="1:4", **options) == 0
    new = torch.load(next(Path("logs").rglob("last.ckpt")), weights_only=True)
    old = torch.load(last, weights_only=True)
    name = "model.hf.model.layers.0.mlp.up_proj"
    assert new["global_step"] == 1
    assert torch.equal(new["state_dict"][f"{name}.weight"], old["state_dict"][f"{name}.weight"])
    assert not torch.equal(new["state_dict"][f"{name}.mask_bits"], old["state_dict"][f"{name}.mask_bits"])
    assert run("fit", tokens, model__init_from=last, model__source__intermediate_size=32, **options) != 0
    assert "set model.source to the configuration of the weights" in capsys.readouterr().err
    assert run("fit", tokens, model__source=last, **options) != 0
    assert "is a checkpoint: set model.source as it was" in capsys.readouterr().err


def test_every_format_that_can_hold_it_gives_the_same_tokens(last, capsys):
    places = {"checkpoint": last, "hf-sbn": Path("hf-sbn"), "packed": Path("packed")}
    texts = {}
    for format, place in places.items():
        if format != "checkpoint":
            card = ["--perplexity", "12.5"] if format == "hf-sbn" else []
            assert main(["export", "--checkpoint", str(last), "--output", format, "--format", format, *card]) == 0
        capsys.readouterr()
        words = ["--prompt", "def main(", "--prompt", "x", "--max_new_tokens", "6", "--json", "true"]
        assert main(["generate", "--checkpoint", str(place), *words]) == 0
        texts[format] = [row["text"] for row in json.loads(capsys.readouterr().out)]
    assert texts["checkpoint"] == texts["hf-sbn"] == texts["packed"]

    assert "| perplexity | 12.50 |" in Path("hf-sbn/README.md").read_text()
    hf = transformers.AutoModelForCausalLM.from_pretrained("hf-sbn")
    words = transformers.AutoTokenizer.from_pretrained("hf-sbn")
    assert words("x y").input_ids == CausalLM.load_from_checkpoint(last).text_files.tokenizer.encode("x y").ids
    assert hf.generation_config.eos_token_id == words.eos_token_id
    assert torch.equal(logits(hf), logits(CausalLM.load_from_checkpoint(last).model.hf))
    for format, message in [("hf", "use --format hf-sbn or packed"), ("gguf", "use --format hf-sbn or packed\n")]:
        assert main(["export", "--checkpoint", str(last), "--output", "other", "--format", format]) != 0
        assert message in capsys.readouterr().err
        assert not Path("other").exists()


def test_evaluate_measures_it(last, tokens, capsys):
    options = ["--data", str(tokens), "--max_tokens", "64", "--window", "16", "--output", "results.json"]
    assert main(["evaluate", "--checkpoint", str(last), *options]) == 0
    assert "2 x up_proj" in capsys.readouterr().out
    results = json.loads(Path("results.json").read_text())
    assert results["perplexity"]["scored"] == 63
    assert 200 < results["perplexity"]["perplexity"] < 400
    assert all(layer["follows_pattern"] for layer in results["layers"] if layer["kind"] == "ternary")


def test_chat_inspect_and_a_generator_read_it(last, monkeypatch, capsys):
    Path("template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    Path("text.txt").write_text("import os, sys\n" * 9)
    monkeypatch.setattr(sys, "stdin", io.StringIO("def main(\n"))
    words = ["--template", "template.jinja", "--max_new_tokens", "4"]
    assert main(["chat", "--checkpoint", str(last), *words]) == 0
    chat = capsys.readouterr().out
    opened = open_any(str(last))
    with Generator(opened) as generator:
        assert chat.startswith(generator.submit("def main(", max_new_tokens=4).result().text)
    with pytest.raises(DataError, match=r"holds a qwen3 of transformers: .*integrations.opening.open_any"):
        Generator.from_checkpoint(str(last))
    words = ["--data", "text.txt", "--window", "8", "--by", "whole", "--json", "true"]
    assert main(["inspect", "--checkpoint", str(last), *words]) == 0
    losses = [one["loss"] for one in json.loads(capsys.readouterr().out)["results"]]
    assert len(losses) == 4
    assert all(4 < loss < 7 for loss in losses)  # two steps of training: a uniform guess has ln 320 = 5.8


def test_an_architecture_that_is_not_ours_is_evaluated_with_transformers(capsys):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.StableLmConfig(**shape, num_key_value_heads=4, vocab_size=96, max_position_embeddings=64)
    transformers.StableLmForCausalLM(config).save_pretrained("dense")
    assert main(["evaluate", "--checkpoint", "dense"]) == 0
    shown = capsys.readouterr()
    assert "note: transformers runs this model, our own transformer cannot" in shown.err
    assert "down_proj" in shown.out


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
