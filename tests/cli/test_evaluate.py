"""``sbn evaluate`` as a user meets it."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sbn_lightning.checkpoints.lightning_file import contents
from sbn_lightning.cli import main
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.data import prepare
from sbn_lightning.data.tokenizer import byte_tokenizer, train_bpe
from sbn_lightning.evaluation import layer_reports, perplexity
from sbn_lightning.evaluation.layer_report import as_table
from sbn_lightning.evaluation.texts import text_of_files, text_of_folder
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.sparse_linear import masked_layers
from sbn_lightning.models.transformer import TernaryTransformer
from tests.helpers import small_config

DOCUMENTS = ["def f(x):\n    return x\n" * 12, "é = 'naïve 🙂'\n" * 9, "last one"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that ``prepare`` wrote with the byte tokenizer, in several small shards."""
    root = tmp_path_factory.mktemp("evaluate")
    for i in range(40):
        (root / f"{i:02d}.txt").write_text(DOCUMENTS[i % 3] + f"# {i}\n", encoding="utf-8")
    out = root / "prepared"
    prepare(input=str(root), output=str(out), pattern="*.txt", tokenizer="byte", val_fraction=0.3, chunk_bytes=1000)
    return out


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = TernaryTransformer(small_config(pattern="2:4"))
    torch.save(contents(model.config, model.state_dict()), tmp_path / "model.ckpt")
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "model.ckpt")


def run(capsys, *arguments):
    status = main(["evaluate", "--device", "cpu", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_files_end_to_end(checkpoint, capsys, tmp_path):
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / f"{i}.txt").write_text(document, encoding="utf-8")
    files = [str(tmp_path / f"{i}.txt") for i in range(3)]
    arguments = ["--checkpoint", checkpoint, "--text", *files, "--window", "32", "--stride", "8"]
    status, out, _ = run(capsys, *arguments, "--output", "results.json")
    assert status == 0
    results = json.loads((tmp_path / "results.json").read_text())
    whole = b"\xff".join(document.encode() for document in DOCUMENTS)
    ids = np.array([256 if byte == 0xFF else byte for byte in whole])
    from sbn_lightning.formats import load_model

    expected = perplexity(load_model(checkpoint).model, ids, window=32, stride=8)
    measured = results["perplexity"]
    assert measured["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert (measured["tokens"], measured["scored"]) == (len(ids), len(ids) - 1)
    size = sum(len(document.encode()) for document in DOCUMENTS)
    assert measured["bytes"] == size
    assert measured["bits_per_byte"] == pytest.approx(expected.loss / math.log(2) * len(ids) / size, rel=1e-5)
    assert len(results["layers"]) == 8
    assert results["model"]["format"] == "lightning"
    assert f"{measured['perplexity']:.4f}" in out
    assert "2 x gate_up" in out


def test_a_prepared_folder_is_read_whole(folder):
    meta = json.loads((folder / "meta.json").read_text())
    index = json.loads((folder / "val" / "index.json").read_text())
    assert len(index["chunks"]) > 2
    text = text_of_folder(str(folder), "val")
    assert meta["splits"]["val"]["tokens"] - len(text.tokens) < 64
    # Each document of the split appears exactly as it was written.
    decoded = byte_tokenizer().decode(text.tokens.tolist(), skip_special_tokens=False)
    documents = decoded.split("<|endoftext|>")
    written = {(folder.parent / f"{i:02d}.txt").read_text(encoding="utf-8") for i in range(40)}
    assert len(documents) > 5
    assert set(documents[:-1]) <= written
    assert text.bytes == pytest.approx(meta["splits"]["val"]["bytes"], rel=0.01)
    part = text_of_folder(str(folder), "val", max_tokens=100)
    assert np.array_equal(part.tokens, text.tokens[:100])
    assert part.bytes is None


def test_a_short_last_shard_leaves_no_holes_in_the_others(tmp_path):
    for i in range(60):
        (tmp_path / f"{i:02d}.txt").write_text(f"{i} " * 640, encoding="utf-8")
    out = tmp_path / "prepared"
    prepare(input=str(tmp_path), output=str(out), pattern="*.txt", tokenizer="byte", val_fraction=0.3, chunk_bytes=4096)
    sizes = [chunk["dim"] for chunk in json.loads((out / "val" / "index.json").read_text())["chunks"]]
    assert set(sizes[:-1]) == {2048}
    assert sizes[-1] < 1024
    text = text_of_folder(str(out), "val")
    assert len(text.tokens) == sum(sizes[:-1])
    written = {file.read_text(encoding="utf-8") for file in tmp_path.glob("*.txt")}
    documents = byte_tokenizer().decode(text.tokens.tolist(), skip_special_tokens=False).split("<|endoftext|>")
    assert set(documents[:-1]) <= written


def test_a_folder_from_the_command_line(checkpoint, folder, capsys):
    arguments = ["--checkpoint", checkpoint, "--data", str(folder), "--max_tokens", "200", "--output", "r.json"]
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    measured = json.loads(Path("r.json").read_text())["perplexity"]
    assert (measured["window"], measured["stride"], measured["tokens"]) == (64, 32, 200)
    assert measured["bits_per_byte"] is None
    assert "bits_per_byte is not known: max_tokens=200 cut the text" in out
    assert "(val)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "missing.txt"], "missing.txt"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--data", "FOLDER", "--split", "test"], "no split 'test', only train, val"),
        (["--data", "FOLDER", "--text", "x"], "not both"),
        (["--data", "FOLDER", "--window", "65"], "window=65"),
        (["--data", "FOLDER", "--stride", "0"], "stride=0"),
        (["--data", "s3://bucket/folder"], "not on this machine"),
        (["--data", "FOLDER", "--output", "no/such/r.json"], "there is no folder no/such"),
        (["--data", "FOLDER", "--output", "."], "output . is a folder"),
        (["--data", "FOLDER", "--max_tokens", "0"], "max_tokens=0 is below 2"),
        (["--limit", "3"], "name them with --tasks"),
        (["--data", "FOLDER", "--output", "/proc/r.json"], "cannot write output /proc/r.json"),
    ],
)
def test_errors_are_one_line(checkpoint, folder, capsys, arguments, message):
    arguments = [str(folder) if word == "FOLDER" else word for word in arguments]
    status, _, err = run(capsys, "--checkpoint", checkpoint, *arguments)
    assert status == 1
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert message in line


def test_data_of_another_tokenizer_are_refused(checkpoint, folder, capsys, tmp_path):
    train_bpe(DOCUMENTS * 20, 300).save("tokenizer.json")
    status, _, err = run(capsys, "--checkpoint", checkpoint, "--data", str(folder))
    assert status == 1
    assert f"{folder} was prepared with another one (token " in err


def test_a_shard_cut_short_is_named(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard = copy / "val" / "chunk-0-1.bin"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"chunk-0-1\.bin"):
        text_of_folder(str(copy), "val")
    with pytest.raises(ConfigError, match="not on this machine"):
        text_of_folder("s3://bucket/x", "val")


def test_line_ends_stay_as_they_are_and_text_can_be_cut(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb")
    text = text_of_files([str(tmp_path / "a.txt")], byte_tokenizer())
    assert (text.tokens.tolist(), text.bytes) == (list(b"a\r\nb"), 4)
    text = text_of_files([str(tmp_path / "a.txt")], byte_tokenizer(), max_tokens=3)
    assert (text.tokens.tolist(), text.bytes) == (list(b"a\r\n"), None)


def test_a_document_with_a_special_token_in_it_does_not_end_there(tmp_path):
    (tmp_path / "a.txt").write_text("a<|endoftext|>b")
    text = text_of_files([str(tmp_path / "a.txt")], byte_tokenizer())
    assert text.tokens.tolist() == list(b"a<|endoftext|>b")


@pytest.mark.parametrize("linear", ["ternary", "masked", "dense"])
def test_layer_reports(linear):
    torch.manual_seed(0)
    model = TernaryTransformer(small_config(linear=linear, pattern="2:4", tie_embeddings=linear != "dense"))
    reports = {report.name: report for report in layer_reports(model)}
    names = [f"blocks.{i}.{n}" for i in range(2) for n in ("attention.qkv", "attention.o", "mlp.gate_up", "mlp.down")]
    assert list(reports) == names + (["lm_head"] if linear == "dense" else [])
    report = reports["blocks.1.attention.qkv"]
    assert (report.kind, report.in_features, report.out_features, report.weights) == (linear, 32, 64, 2048)
    if linear == "dense":
        assert (report.pattern, report.zeros, report.follows_pattern, report.gamma) == (None, 0.0, None, [])
        return
    layer = model.blocks[1].attention.qkv
    values = layer.values()
    assert report.zeros == pytest.approx(float((values == 0).float().mean()))
    assert report.natural + report.enforced == pytest.approx(report.zeros)
    assert (report.pattern, report.most_in_group, report.follows_pattern) == ("2:4", 2, True)
    assert report.gamma == (layer.ternary()[1].tolist() if linear == "ternary" else [])
    assert report.activation_bits == (8 if linear == "ternary" else None)
    layer.set_density(4)  # as in the middle of a ramp
    if linear == "masked":
        report = layer_reports(model)[4]
        assert (report.most_in_group, report.follows_pattern) == (4, False)
        assert "2:4 (1 off)" in as_table(layer_reports(model))


def test_why_a_packed_folder_has_no_natural_zeros(checkpoint, capsys):
    assert main(["export", "--checkpoint", checkpoint, "--output", "packed"]) == 0
    for model, told in ((checkpoint, 0), ("packed", 1)):
        _, out, _ = run(capsys, "--checkpoint", model)
        assert out.count("packed weights do not tell zeros of the mask from rounded ones") == told


def test_without_a_text_the_way_to_one_is_told(checkpoint, capsys):
    status, out, _ = run(capsys, "--checkpoint", checkpoint)
    assert status == 0
    assert "no perplexity without a text: give --data FOLDER (of `prepare`) or --text FILE" in out


def test_a_byte_order_mark_is_no_token():
    Path("plain.txt").write_bytes(b"abc")
    Path("marked.txt").write_bytes(b"\xef\xbb\xbfabc")
    plain, marked = (text_of_files([name], byte_tokenizer()) for name in ("plain.txt", "marked.txt"))
    assert marked.tokens.tolist() == plain.tokens.tolist()
    assert marked.bytes == plain.bytes == 3


def test_packed_layers_are_reported_like_latent_ones():
    torch.manual_seed(0)
    model = TernaryTransformer(small_config())
    latent = layer_reports(model)
    for name, layer in list(masked_layers(model)):
        codes, gamma = layer.ternary()
        options = {"pattern": layer.pattern, "split_sizes": layer.split_sizes}
        model.set_submodule(name, PackedTernaryLinear(codes, gamma, layer.bias, **options))
    packed = layer_reports(model)
    assert [vars(a) | {"natural": None, "enforced": None} for a in latent] == [vars(b) for b in packed]
    rows = as_table(packed).splitlines()
    assert len(rows) == 5
    assert rows[1].split()[:6] == ["2", "x", "qkv", "ternary", "6:8", "4,096"]
    assert " - " in rows[1]
