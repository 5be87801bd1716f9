"""``sbn inspect``: each number is that of the model that it names, and the model stays as it was."""

import json

import pytest
import torch

from sbn_lightning.checkpoints import lightning_file
from sbn_lightning.checkpoints.text_files import TextFiles
from sbn_lightning.cli import main
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.evaluation.inspection import PARTS, Inspection, as_records, as_tables, dense_twin, variant_of
from sbn_lightning.layers.conversion import convert_linears
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.transformer import TernaryTransformer
from sbn_lightning.sparsity.config import SparsityConfig

SHAPE = {"vocab_size": 64, "d_model": 32, "n_layers": 3, "n_heads": 2, "n_kv_heads": 1, "d_ffn": 48}
SPARSITY = SparsityConfig("2:4")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TernaryTransformer(TransformerConfig(**SHAPE, linear="dense", qkv_bias=True, init_std=0.3)).eval()


@pytest.fixture(scope="module")
def rows():
    return torch.randint(0, 64, (3, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def results(model, rows):
    with torch.inference_mode():
        return list(Inspection(model, rows, SPARSITY).measure())


def loss_of(model, rows):
    with torch.no_grad():
        return model.loss(rows[:, :-1], rows[:, 1:]).item()


SIZES = {"*.qkv": (32, 16, 16), "*.gate_up": (48, 48)}


def converted(model, names, variant="ternary", sizes=SIZES):
    """A copy of the model with whole layers converted, by the ordinary conversion."""
    other = TernaryTransformer(model.config).eval()
    other.load_state_dict(model.state_dict())
    convert_linears(other, variant_of(SPARSITY, variant), include=names, split_sizes=sizes)
    return other


@pytest.mark.parametrize("variant", ["masked", "rounded", "ternary"])
def test_the_whole_model_is_the_ordinary_conversion(model, rows, results, variant):
    found = {(one.section, one.converted, one.variant): one.loss for one in results}
    assert found["whole", "nothing", None] == pytest.approx(loss_of(model, rows))
    expected = loss_of(converted(model, ["blocks.*"], variant), rows)
    assert found["whole", "everything", variant] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - loss_of(model, rows)) > 1e-4


def test_parts_and_blocks_are_those_that_they_name(model, rows, results):
    found = {(one.section, one.converted): one.loss for one in results if one.variant == "ternary"}
    down = loss_of(converted(model, ["blocks.*.mlp.down"], sizes=None), rows)
    assert found["parts", "down"] == pytest.approx(down, rel=1e-5)
    block = loss_of(converted(model, ["blocks.1.*"]), rows)
    assert found["blocks", "block 1"] == pytest.approx(block, rel=1e-5)
    two = loss_of(converted(model, ["blocks.[01].*"]), rows)
    assert found["cumulative", "blocks 0 to 1"] == pytest.approx(two, rel=1e-5)
    whole = found["whole", "everything"]
    assert found["cumulative", "blocks 0 to 2"] == pytest.approx(whole, rel=1e-5)


def test_a_part_of_a_fused_layer_leaves_the_other_parts_dense(model, rows, results):
    other = TernaryTransformer(model.config).eval()
    other.load_state_dict(model.state_dict())
    twin = converted(model, ["blocks.*.attention.qkv"], sizes={"*.qkv": SIZES["*.qkv"]})
    for own, their in zip(other.blocks, twin.blocks, strict=True):
        own.attention.qkv.register_forward_hook(
            lambda module, inputs, output, their=their: torch.cat(
                (output[..., :32], their.attention.qkv(inputs[0])[..., 32:48], output[..., 48:]), -1
            )
        )
    k = next(one.loss for one in results if one.converted == "k" and one.variant == "ternary")
    assert k == pytest.approx(loss_of(other, rows), rel=1e-5)


def test_the_model_stays_as_it_was_and_the_tables_have_every_number(model, rows, results):
    before = loss_of(model, rows)
    with torch.inference_mode():
        list(Inspection(model, rows, SPARSITY).measure(["parts"]))
    assert loss_of(model, rows) == before
    assert not any(module._forward_hooks for module in model.modules())
    count = 1 + 3 * (1 + sum(map(len, PARTS.values()))) + 3 + 3
    assert len(results) == len(as_records(results)) == count
    tables = as_tables(results)
    assert all(f"{one.loss:.3f}" in tables for one in results)


def test_latent_weights_of_a_ternary_model_are_inspected_as_dense_ones(model, rows):
    torch.manual_seed(2)
    ternary = TernaryTransformer(TransformerConfig(**SHAPE, pattern="2:4", init_std=0.3)).eval()
    twin = dense_twin(ternary)
    assert twin.config.linear == "dense"
    with torch.inference_mode():
        found = {one.variant: one.loss for one in Inspection(twin, rows, SPARSITY).measure(["whole"])}
    assert found["ternary"] == pytest.approx(loss_of(ternary, rows), rel=1e-5)
    assert found[None] != pytest.approx(loss_of(ternary, rows), rel=1e-3)


def test_a_pattern_that_does_not_fit_is_refused(model, rows):
    with pytest.raises(ConfigError, match=r"attention\.qkv"):
        Inspection(model, rows, SparsityConfig("3:5"))


def test_the_command_reads_a_bare_text_file(model, tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<eos>": 0, "<unk>": 1} | {chr(97 + i): i + 2 for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text = TextFiles({"tokenizer.json": tokenizer.to_str()})
    lightning_file.write(model.config, model.state_dict(), tmp_path / "dense.ckpt", text)
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 10)
    words = ["--checkpoint", str(tmp_path / "dense.ckpt"), "--data", str(tmp_path / "text.txt"), "--pattern", "2:4"]
    assert main(["inspect", *words, "--window", "15", "--by", "whole", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["tokens"] == 75
    assert [one["variant"] for one in printed["results"]] == [None, "masked", "rounded", "ternary"]
    assert main(["inspect", *words, "--window", "100"]) == 1
    assert "fewer than a window of 100" in capsys.readouterr().err
    assert main(["inspect", *words, "--window", "15"]) == 0
    assert "one part alone" in capsys.readouterr().out
