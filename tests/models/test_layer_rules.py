"""Which layers stay dense, masked or ternary: in the model, in checkpoints, in exports, in recipes."""

import pytest
import torch
import yaml

from sbn_lightning import SparseBitNet, TernaryTransformer, TransformerConfig
from sbn_lightning.cli import main
from sbn_lightning.cli.training import SBNCLI
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.formats.load import load_model
from sbn_lightning.layers.sparse_linear import SparseBitLinear, SparseLinear
from tests.helpers import quiet_trainer, small_config, token_loader

RULES = (
    {"match": "blocks.0.*", "linear": "dense"},
    {"match": "*.down", "linear": "masked"},
    {"match": "blocks.0.mlp.gate_up", "linear": "ternary"},
)
KINDS = {
    "blocks.0.attention.qkv": torch.nn.Linear,
    "blocks.0.attention.o": torch.nn.Linear,
    "blocks.0.mlp.gate_up": SparseBitLinear,
    "blocks.0.mlp.down": SparseLinear,
    "blocks.1.attention.qkv": SparseBitLinear,
    "blocks.1.attention.o": SparseBitLinear,
    "blocks.1.mlp.gate_up": SparseBitLinear,
    "blocks.1.mlp.down": SparseLinear,
}


def kinds(model):
    return {name: type(layer) for name, layer in model.named_modules() if name in KINDS}


def test_the_last_rule_that_matches_counts_and_fused_layers_keep_their_parts():
    config = small_config(layers=RULES, qkv_bias=True)
    model = TernaryTransformer(config)
    assert kinds(model) == KINDS
    plain = TernaryTransformer(small_config(qkv_bias=True))
    assert {name: value.shape for name, value in model.named_parameters()} == {
        name: value.shape for name, value in plain.named_parameters()
    }
    layer = TernaryTransformer(small_config(linear="masked", layers=({"match": "*", "linear": "ternary"},)))
    assert layer.blocks[0].attention.qkv.split_sizes == (32, 16, 16)
    assert layer.blocks[0].mlp.gate_up.split_sizes == (64, 64)
    assert TransformerConfig(**config.to_dict()) == config


def test_training_checkpoint_resume_and_export_keep_the_kinds(tmp_path):
    torch.manual_seed(0)
    module = SparseBitNet(small_config(layers=RULES), warmup_steps=1)
    quiet_trainer(max_steps=3).fit(module, loader := token_loader(batches=3))
    trainer = quiet_trainer(max_steps=3)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "mixed.ckpt", weights_only=True)
    loaded = load_model(tmp_path / "mixed.ckpt")
    assert kinds(loaded.model) == KINDS
    batch = next(iter(loader))
    expected = module.model.eval()(batch)
    assert torch.equal(loaded.model(batch), expected)
    words = ["export", "--checkpoint", str(tmp_path / "mixed.ckpt"), "--output", str(tmp_path / "packed")]
    assert main([*words, "--format", "packed", "--embedding_bits", "32"]) == 0
    packed = load_model(tmp_path / "packed").model(batch)  # values of the masked layers are stored in 16 bits
    torch.testing.assert_close(packed, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("format", ["gguf", "hf-bitnet", "hf-sbn"])
def test_a_format_for_ternary_layers_alone_refuses_and_names_the_way_out(format, tmp_path, capsys):
    from sbn_lightning.checkpoints import lightning_file
    from sbn_lightning.checkpoints.text_files import TextFiles

    model = TernaryTransformer(small_config(layers=RULES[:1]))
    lightning_file.write(model.config, model.state_dict(), tmp_path / "mixed.ckpt", TextFiles())
    words = ["export", "--checkpoint", str(tmp_path / "mixed.ckpt"), "--output", str(tmp_path / "out")]
    assert main([*words, "--format", format]) == 1
    assert "model.config.layers makes some of another kind: use --format packed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ({"match": "blocks.7.*", "linear": "dense"},)}, "no linear layer has a name like 'blocks.7"),
        ({"layers": ({"match": "*", "linear": "float"},)}, "linear='float' is not one of"),
        ({"linear": "dense", "layers": ({"match": "*", "linear": "ternary"},)}, "make no layer sparse"),
    ],
)
def test_rules_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TernaryTransformer(small_config(**changes))


def test_a_recipe_has_the_rules(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["sbn"])
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"model": {"config": {"layers": list(RULES)}}}))
    words = ["fit", "--config", "sparse_pretrain", "--config", str(tmp_path / "rules.yaml"), "--print_config"]
    with pytest.raises(SystemExit):
        SBNCLI(words)
    values = yaml.safe_load(capsys.readouterr().out)["model"]["config"]
    assert values["layers"] == list(RULES)
    assert TransformerConfig(**values).kind_of("blocks.0.attention.o") == "dense"
