"""What the two commands share with every tool: they start at once."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", ["import-hf", "export"])
def test_help_waits_for_no_heavy_import(command):
    code = f"import sys; sys.argv = ['sbn', '{command}', '--help']; from sbn_lightning.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print('HEAVY', sorted({'torch', 'lightning', 'transformers', 'safetensors', 'gguf'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "HEAVY []" in output
    assert "--output OUTPUT" in output


def test_a_model_is_read_and_written_without_lightning(tmp_path):
    code = "import sys, torch\n"
    code += "from sbn_lightning.checkpoint import lightning_file, load_model\n"
    code += "from sbn_lightning.cli import main\n"
    code += "from sbn_lightning.transformer import TernaryTransformer, TransformerConfig\n"
    code += "model = TernaryTransformer(TransformerConfig(vocab_size=64, d_model=32, n_layers=1, d_ffn=64))\n"
    code += "torch.save(lightning_file.contents(model.config, model.state_dict()), 'm.ckpt')\n"
    code += "assert main(['export', '--checkpoint', 'm.ckpt', '--output', 'out']) == 0\n"
    code += "load_model('out')\n"
    code += "print('HEAVY', sorted({'lightning', 'transformers', 'litdata'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "HEAVY []" in done.stdout
