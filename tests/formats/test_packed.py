import json

import pytest
import torch
from torch import nn

from sbn_lightning import SparseBitLinear
from sbn_lightning.cli import main
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.formats import load_model
from sbn_lightning.layers import PackedTernaryLinear
from sbn_lightning.layers.packed import pack_layers, packed_layer
from sbn_lightning.layers.sparse_linear import masked_layers
from tests.formats.models import logits, make_model, save, some_tokens


def export(path, output, *more):
    return main(["export", "--checkpoint", str(path), "--output", str(output), *more])


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "2:4"},
        {"pattern": "6:8", "qkv_bias": True, "tie_embeddings": False},
        {"pattern": "8:8", "activation_bits": 4},
        {"pattern": "4:8", "activation_bits": None, "gamma_over": "kept"},
    ],
)
def test_logits_are_those_of_the_training_model_to_the_last_bit(tmp_path, options, capsys):
    model = make_model(**options)
    assert export(save(model, tmp_path / "m.ckpt"), "out", "--dtype", "float32") == 0
    loaded = load_model("out")
    assert loaded.format == "packed"
    assert loaded.config == model.config
    assert loaded.need_tokenizer().get_vocab_size() == 257
    assert not any(isinstance(layer, SparseBitLinear) for layer in loaded.model.modules())
    tokens = some_tokens()
    assert torch.equal(logits(loaded.model, tokens), logits(model, tokens))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(loaded.model, tokens), logits(model, tokens))


def test_bits_are_reported_and_true(tmp_path, capsys):
    model = make_model(pattern="2:4", d_model=128, d_ffn=256)
    export(save(model, tmp_path / "m.ckpt"), "out")
    weights = sum(layer.weight.numel() for _, layer in masked_layers(model))
    reported = json.loads((tmp_path / "out/config.json").read_text())["bits_per_weight"]
    assert f"{reported['linear_bits']:.3f} bits a weight in the ternary layers" in capsys.readouterr().out
    assert 1.272 < reported["linear_bits"] < 1.29
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    dense = 2 * model.embed.weight.numel() + 4 * norms
    file_bytes = (tmp_path / "out/model.safetensors").stat().st_size
    assert file_bytes == pytest.approx(dense + weights * reported["linear_bits"] / 8, rel=0.05)
    parameters = sum(p.numel() for p in model.parameters())
    assert reported["file_bits"] == pytest.approx(8 * file_bytes / parameters, rel=1e-3)


def test_a_mask_of_the_middle_of_a_ramp_is_kept(tmp_path):
    model = make_model(pattern="2:4")
    for _, layer in masked_layers(model):
        layer.set_density(3, 0.5)
    export(save(model, tmp_path / "m.ckpt"), "out", "--dtype", "float32")
    tokens = some_tokens()
    expected = logits(model, tokens)
    assert torch.equal(logits(load_model("out").model, tokens), expected)
    assert torch.equal(logits(load_model("m.ckpt").model, tokens), expected)
    assert not torch.equal(logits(make_model(pattern="2:4"), tokens), expected)


def test_smaller_embeddings(tmp_path):
    model = make_model(qkv_bias=True)
    path = save(model, tmp_path / "m.ckpt")
    export(path, "whole", "--dtype", "float32")
    export(path, "half", "--dtype", "bfloat16")
    whole, half = (tmp_path / name / "model.safetensors" for name in ("whole", "half"))
    assert half.stat().st_size < 0.7 * whole.stat().st_size
    loaded = load_model("half", dtype=torch.float32).model
    assert torch.equal(loaded.embed.weight, model.embed.weight.bfloat16().float())
    again = load_model("half", dtype=torch.float16).model
    assert {p.dtype for p in again.parameters()} == {again.blocks[0].attention.qkv.bias.dtype} == {torch.float16}
    # The ternary part does not change with the dtype of the rest.
    for name, layer in masked_layers(model):
        codes, gamma = loaded.get_submodule(name).ternary()
        assert torch.equal(codes, layer.ternary()[0])
        assert torch.equal(gamma, layer.ternary()[1])


def test_embeddings_take_16_bits_unless_told_otherwise(tmp_path, capsys):
    """They are stored in bfloat16, so a model that computes in bfloat16 gives the same logits."""
    model = make_model(pattern="2:4", tie_embeddings=False)
    path = save(model, tmp_path / "m.ckpt")
    assert export(path, "out") == 0
    assert "embeddings" in capsys.readouterr().out
    loaded = load_model("out").model
    assert (loaded.embed.weight.dtype, loaded.lm_head.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(loaded.embed.weight, model.embed.weight.bfloat16())
    assert torch.equal(loaded.norm.weight, model.norm.weight)
    assert json.loads((tmp_path / "out/config.json").read_text())["version"] == 1  # older versions read this file too
    tokens = some_tokens()
    expected = logits(load_model(path, dtype=torch.bfloat16).model, tokens)
    assert torch.equal(logits(load_model("out", dtype=torch.bfloat16).model, tokens), expected)


def test_embeddings_in_8_bits(tmp_path):
    model = make_model(pattern="2:4", d_model=64)
    with torch.no_grad():
        model.embed.weight[7] = 0
    path = save(model, tmp_path / "m.ckpt")
    export(path, "half")
    assert export(path, "out", "--embedding_bits", "8") == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["version"] == 2
    half, small = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "out"))
    assert half - small == pytest.approx(model.embed.weight.numel(), rel=0.1)
    loaded = load_model("out").model
    error = (loaded.embed.weight - model.embed.weight).abs()
    assert bool((error <= model.embed.weight.abs().amax(1, keepdim=True) / 254 + 1e-9).all())
    assert torch.equal(loaded.lm_head.weight, loaded.embed.weight)
    export("out", "again", "--embedding_bits", "8")
    assert torch.equal(load_model("again").model.embed.weight, loaded.embed.weight)


def test_a_masked_model_is_packed_to_its_values_and_its_mask(tmp_path, capsys):
    model = make_model(linear="masked", pattern="2:4", qkv_bias=True, d_model=128, d_ffn=256)
    path = save(model, tmp_path / "m.ckpt")
    assert export(path, "out") == 0
    assert "9.000 bits a weight in the masked layers" in capsys.readouterr().out  # 16 of 2 in 4, plus a mask bit
    loaded = load_model("out")
    assert loaded.config == model.config
    tokens = some_tokens()
    expected = logits(load_model(path, dtype=torch.bfloat16).model, tokens)
    assert torch.equal(logits(load_model("out", dtype=torch.bfloat16).model, tokens), expected)
    for name, layer in masked_layers(model):
        again = loaded.model.get_submodule(name)
        assert torch.equal(again.mask, layer.mask)
        assert torch.equal(again.effective_weight(), layer.effective_weight().bfloat16())
    assert export(path, "whole", "--dtype", "float32") == 0
    assert torch.equal(logits(load_model("whole").model, tokens), logits(model, tokens))
    assert export("out", "hf", "--format", "hf") == 0


def test_8_bits_are_refused_where_no_reader_has_them(tmp_path, capsys):
    path = save(make_model(linear="masked"), tmp_path / "m.ckpt")
    assert export(path, "out", "--format", "hf", "--embedding_bits", "8") == 1
    assert "embedding_bits is for --format packed and gguf" in capsys.readouterr().err


def test_packed_again_is_the_same(tmp_path):
    export(save(make_model(), tmp_path / "m.ckpt"), "once")
    export("once", "twice")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "twice"))
    assert first == second


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-20]),
        lambda file: file.write_bytes(b""),
        lambda file: file.unlink(),
        lambda file: file.write_bytes(file.read_bytes().replace(b"0", b"1", 1)),
        lambda file: file.write_bytes(file.read_bytes()[:-40] + b"0" * 40),
    ],
    ids=["cut", "empty", "gone", "changed", "end"],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path, name, damage):
    export(save(make_model(), tmp_path / "m.ckpt"), "out")
    load_model("out")
    damage(tmp_path / "out" / name)
    gone = name == "config.json" and not (tmp_path / "out" / name).exists()
    with pytest.raises(DataError, match="holds no model: .*config.json" if gone else f"out/{name}"):
        load_model("out")


def test_what_cannot_be_packed_is_refused(tmp_path, capsys):
    path = save(make_model(linear="dense"), tmp_path / "m.ckpt")
    assert export(path, "out") == 1
    assert "'dense', not ternary or masked" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir() if "out" in file.name] == []


def test_what_is_there_stays_unless_told_otherwise(tmp_path, capsys):
    path = save(make_model(), tmp_path / "m.ckpt")
    (tmp_path / "out").mkdir()
    assert export(path, "out") == 0  # an empty folder may be written to
    before = (tmp_path / "out/model.safetensors").read_bytes()
    save(make_model(seed=1), path)
    assert export(path, "out") == 1
    assert "--overwrite to replace it" in capsys.readouterr().err
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert export(path, "out", "--overwrite=true") == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() != before
    assert export("out", "out", "--overwrite=true") == 1
    assert "holds the model that is to be exported" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.ckpt", "m.tokenizer.json", "out"]
    (tmp_path / "out/notes.txt").write_text("mine")
    assert export(path, "out", "--overwrite=true") == 1
    assert "out holds notes.txt, which is no export's" in capsys.readouterr().err
    assert export(path, ".", "--overwrite=true") == 1
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_a_file_is_not_replaced_by_a_folder_and_a_link_stays_one(tmp_path, capsys):
    path = save(make_model(), tmp_path / "m.ckpt")
    (tmp_path / "notes.txt").write_text("mine")
    assert export(path, "notes.txt", "--overwrite", "true") == 1
    assert "notes.txt is a file" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    assert export(path, "link") == 0
    assert export(path, "link", "--overwrite", "true") == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()


def test_in_the_folder_at_hand(tmp_path, monkeypatch):
    path = save(make_model(), tmp_path / "m.ckpt")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert export(path, ".") == 0
    assert load_model(tmp_path / "empty").format == "packed"


def test_ctrl_c_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    path = save(make_model(), tmp_path / "m.ckpt")
    monkeypatch.setattr("sbn_lightning.formats.packed.save_tensors", interrupted)
    assert export(path, "out") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert not list(tmp_path.glob("out*"))


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    path = save(make_model(), tmp_path / "m.ckpt")
    export(path, "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sbn_lightning.formats.packed.save_tensors", full)
    assert export(path, "out", "--overwrite=true") == 1
    assert "cannot write out: No space left on device" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.ckpt", "m.tokenizer.json", "out"]


@pytest.mark.parametrize("bits", [8, 4, None])
@pytest.mark.parametrize("splits", [None, (24, 8, 8)])
def test_layer_equals_the_one_it_was_made_of(bits, splits):
    torch.manual_seed(0)
    layer = SparseBitLinear(64, 40, pattern="2:4", split_sizes=splits, activation_bits=bits)
    packed = packed_layer(layer)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 64, dtype=dtype)
        assert torch.equal(packed(x), layer(x))
    assert torch.equal(packed.effective_weight(), layer.effective_weight())
    gamma = packed.gamma
    packed.bfloat16()
    assert packed.codes.dtype == torch.int8
    assert torch.equal(packed.gamma, gamma)
    torch.manual_seed(1)
    other = packed_layer(SparseBitLinear(64, 40, pattern="2:4", split_sizes=splits, activation_bits=bits))
    packed.load_state_dict(other.state_dict())
    packed.bias = other.bias
    assert torch.equal(packed(x), other(x))


def test_pack_layers_replaces_ternary_layers_only():
    model = nn.Sequential(nn.Linear(8, 16), nn.Sequential(SparseBitLinear(16, 8), nn.ReLU())).eval()
    x = torch.randn(4, 8)
    expected = model(x)
    pack_layers(model, backend="reference")
    assert isinstance(model[1][0], PackedTernaryLinear)
    assert isinstance(model[0], nn.Linear)
    assert model[1][0].backend == "reference"
    assert torch.equal(model(x), expected)


def test_a_packed_model_compiles():
    model = pack_layers(make_model(pattern="2:4", qkv_bias=True))
    expected = logits(model, some_tokens())
    model.compile_blocks(backend="aot_eager")
    torch.testing.assert_close(logits(model, some_tokens()), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels can run here")
def test_kernels_are_not_replaced_silently():
    layer = packed_layer(SparseBitLinear(16, 8))
    for layer.backend in ("kernels", "int8"):
        with pytest.raises(ConfigError, match=rf"{layer.backend}.*cannot run a packed layer.*'auto' or 'reference'"):
            layer(torch.randn(2, 16))
    layer = packed_layer(SparseBitLinear(16, 8, activation_bits=None))
    layer.backend = "int8"
    with pytest.raises(ConfigError, match="activation_bits is null"):
        layer(torch.randn(2, 16))
