"""The two export commands start quickly, as every tool does."""

import pytest

from sbn_lightning.cli import main
from tests.helpers import imported, imported_by_help


@pytest.mark.parametrize("command", ["import-hf", "export"])
def test_help_waits_for_no_heavy_import(command):
    heavy, output = imported_by_help(command, ["torch", "lightning", "transformers", "safetensors", "gguf"])
    assert heavy == []
    assert "--output OUTPUT" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantization", "Q4_0"], "quantization=Q4_0 is for --format gguf, not for --format packed"),
        (["--linear_class", "autobitlinear", "--format", "hf-sbn"], "linear_class=autobitlinear is for --format hf-b"),
    ],
)
def test_an_option_of_another_format_is_refused(options, message, capsys):
    assert main(["export", "--checkpoint", "absent.ckpt", "--output", "out", *options]) == 1
    assert message in capsys.readouterr().err


def test_a_model_is_read_and_written_without_lightning(tmp_path):
    code = "import sys, torch\n"
    code += "from sbn_lightning.checkpoints import lightning_file\nfrom sbn_lightning.formats import load_model\n"
    code += "from sbn_lightning.cli import main\n"
    code += "from sbn_lightning.models.transformer import TernaryTransformer, TransformerConfig\n"
    code += "model = TernaryTransformer(TransformerConfig(vocab_size=64, d_model=32, n_layers=1, d_ffn=64))\n"
    code += "torch.save(lightning_file.contents(model.config, model.state_dict()), 'm.ckpt')\n"
    code += "assert main(['export', '--checkpoint', 'm.ckpt', '--output', 'out']) == 0\n"
    code += "load_model('out')\n"
    assert imported(code, ["lightning", "transformers", "litdata"], cwd=tmp_path)[0] == []
