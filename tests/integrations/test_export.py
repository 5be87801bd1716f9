"""``export --format hf-sbn``: our own transformer as a Hugging Face folder with the same logits."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

import sbn_lightning.integrations.huggingface  # noqa: E402, F401 (makes the method known)
from sbn_lightning.checkpoints import lightning_file  # noqa: E402
from sbn_lightning.cli import main  # noqa: E402
from sbn_lightning.formats import load_model  # noqa: E402
from tests.helpers import small_module  # noqa: E402

TOKENS = torch.randint(320, (2, 12), generator=torch.Generator().manual_seed(0))


def checkpoint(folder, **options):
    module = small_module(pattern="2:4", **options)
    lightning_file.write(module.config, module.model.state_dict(), folder / "model.ckpt")
    return folder / "model.ckpt"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": True, "tie_embeddings": True},
        {"activation_bits": None},
        {"sub_norms": True, "activation": "relu2"},
        {
            "qk_norm": "head",
            "head_dim": 16,
            "sliding_window": 5,
            "sliding_layers": (1,),
            "qkv_bias": True,
            "o_bias": True,
        },
        {"qk_norm": "projection", "post_norm": True},
        {"layers_without_rope": (1,), "mlp_bias": True},
    ],
    ids=str,
)
def test_the_folder_has_the_same_logits_and_a_card(tmp_path, options):
    file = checkpoint(tmp_path, **options)
    arguments = ["--checkpoint", str(file), "--output", str(tmp_path / "folder"), "--format", "hf-sbn"]
    assert main(["export", *arguments]) == 0
    ours = load_model(file).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=TOKENS).logits, ours(TOKENS), rtol=1e-4, atol=1e-5)
    named = json.loads((tmp_path / "folder" / "config.json").read_text())["quantization_config"]["modules"]
    assert len(named) == 14
    assert "| pattern | 2:4" in (tmp_path / "folder" / "README.md").read_text()
    assert main(["export", *arguments, "--overwrite"]) == 0


def test_a_dense_model_is_refused(tmp_path, capsys):
    file = checkpoint(tmp_path, linear="dense")
    assert main(["export", "--checkpoint", str(file), "--output", str(tmp_path / "f"), "--format", "hf-sbn"]) != 0
    assert "--format hf-sbn is for ternary models" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()
