"""GGUF files, read back with the gguf package. ``by_hand_llama.py`` runs such files in llama.cpp."""

import struct

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sbn_lightning.cli import main
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data.tokenizer import byte_tokenizer, train_bpe
from sbn_lightning.formats import load_model
from sbn_lightning.formats.gguf.blocks import blocks
from sbn_lightning.formats.gguf.names import interleave_halves
from sbn_lightning.formats.gguf.pre_tokenizers import PRE_TOKENIZERS, name_of, pre_tokenizer_of, way_named
from sbn_lightning.formats.gguf.tokenizer import check_tokenizer
from sbn_lightning.models.config import RopeScaling
from tests.formats.models import make_model, save

gguf = pytest.importorskip("gguf")

WIDE = {"d_model": 256, "d_ffn": 512, "n_layers": 1}
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def export(*more):
    return main(["export", "--checkpoint", "m.ckpt", "--output", "out", "--format", "gguf", *more])


def read(path):
    reader = gguf.GGUFReader(path)
    tensors = {t.name: (t, gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return reader, tensors


@pytest.mark.parametrize("quantization", ["TQ2_0", "TQ1_0", "Q4_0"])
@pytest.mark.parametrize(
    ("options", "architecture"),
    [
        ({"pattern": "2:4"}, "llama"),
        ({"qkv_bias": True, "tie_embeddings": False, "rope_theta": 1e6, "norm_eps": 1e-5}, "qwen2"),
    ],
)
def test_dequantised_weights_are_ours(tmp_path, quantization, options, architecture):
    """They are equal to the last bit, with gamma rounded to float16. One block has only zeros, and its scale is 0."""
    model = make_model(**WIDE, **options)
    with torch.no_grad():
        model.blocks[0].mlp.down.weight[3, 256:] = 0
    save(model, tmp_path / "m.ckpt")
    assert export("--quantization", quantization, "--dtype", "float32") == 0
    reader, tensors = read(tmp_path / f"out/model-{quantization}.gguf")
    head = model.config.head_size
    block = model.blocks[0]
    parts = [(block.attention.qkv, (256, 128, 128), ("attn_q", "attn_k", "attn_v"))]
    parts += [(block.attention.o, (256,), ("attn_output",)), (block.mlp.gate_up, (512, 512), ("ffn_gate", "ffn_up"))]
    parts += [(block.mlp.down, (256,), ("ffn_down",))]
    for layer, rows, names in parts:
        codes, gamma = layer.ternary()
        for name, piece, scale in zip(names, codes.split(rows), gamma, strict=True):
            expected = piece * scale.half().float()
            if architecture == "llama" and name in ("attn_q", "attn_k"):
                # Rows 2j and 2j + 1 of a head in the file are rows j and j + E/2 in our model.
                order = [
                    h * head + j + half * head // 2
                    for h in range(len(piece) // head)
                    for j in range(head // 2)
                    for half in (0, 1)
                ]
                expected = expected[order]
            tensor, values = tensors[f"blk.0.{name}.weight"]
            assert tensor.tensor_type.name == quantization
            assert np.array_equal(values, expected.numpy())
    assert np.array_equal(tensors["token_embd.weight"][1], model.embed.weight.detach().numpy())
    assert np.array_equal(tensors["blk.0.ffn_norm.weight"][1], block.mlp_norm.weight.detach().numpy())
    assert ("output.weight" in tensors) == (not model.config.tie_embeddings)
    if architecture == "qwen2":
        bias = np.concatenate([tensors[f"blk.0.attn_{name}.bias"][1] for name in "qkv"])
        assert np.array_equal(bias, block.attention.qkv.bias.detach().numpy())
    expected = {
        "general.architecture": architecture,
        f"{architecture}.block_count": 1,
        f"{architecture}.embedding_length": 256,
        f"{architecture}.feed_forward_length": 512,
        f"{architecture}.attention.head_count": 4,
        f"{architecture}.attention.head_count_kv": 2,
        f"{architecture}.rope.freq_base": model.config.rope_theta,
        f"{architecture}.attention.layer_norm_rms_epsilon": pytest.approx(model.config.norm_eps),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: reader.fields[key].contents() for key in expected} == expected
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == model.config.vocab_size
    assert [tokens[i] for i in (97, 256, 319)] == ["a", "<|endoftext|>", "[UNUSED319]"]
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    assert [types[i] for i in (97, 256, 319)] == [1, 3, 5]
    assert reader.fields["tokenizer.ggml.merges"].contents() == ["<|endoftext|> <|endoftext|>"]


def test_widths_that_256_does_not_divide(tmp_path):
    model = make_model(d_model=96, d_ffn=160)
    save(model, tmp_path / "m.ckpt")
    assert export("--quantization", "Q4_0") == 0
    _, tensors = read(tmp_path / "out/model-Q4_0.gguf")
    codes, gamma = model.blocks[1].mlp.down.ternary()
    assert np.array_equal(tensors["blk.1.ffn_down.weight"][1], (codes * gamma.half().float()).numpy())


def test_each_tensor_has_a_type_of_its_own(tmp_path, capsys):
    """If 256 does not divide the width of one layer, the other layers still get TQ2_0."""
    model = make_model(d_model=256, d_ffn=320, n_layers=1)
    save(model, tmp_path / "m.ckpt")
    assert export() == 0
    told = capsys.readouterr().out
    assert "1 tensors of width 320 are Q4_0, because the blocks of TQ2_0 hold 256" in told
    assert "--quantization Q2_0 fits them at 2.25 bits" in told
    _, tensors = read(tmp_path / "out/model-TQ2_0.gguf")
    assert tensors["blk.0.ffn_up.weight"][0].tensor_type.name == "TQ2_0"
    assert tensors["blk.0.ffn_down.weight"][0].tensor_type.name == "Q4_0"
    codes, gamma = model.blocks[0].mlp.down.ternary()
    assert np.array_equal(tensors["blk.0.ffn_down.weight"][1], (codes * gamma.half().float()).numpy())


def q2_0(data, rows, columns):
    """ggml's ``dequantize_row_q2_0``, written from its layout: a scale, then four codes a byte, low bits first."""
    block = data.reshape(rows, columns // 64, 18)
    scale = block[..., :2].copy().view(np.float16).astype(np.float32)
    codes = np.stack([block[..., 2:] >> shift & 3 for shift in (0, 2, 4, 6)], -1).reshape(rows, -1, 64)
    return ((codes.astype(np.float32) - 1) * scale).reshape(rows, columns)


def test_q2_0_is_exact():
    torch.manual_seed(0)
    codes, gamma = torch.randint(-1, 2, (6, 192), dtype=torch.int8), torch.tensor(0.0371)
    codes[2, 64:128] = 0
    expected = codes.numpy() * gamma.half().float().numpy()
    assert np.array_equal(q2_0(blocks(codes, gamma, "Q2_0"), 6, 192), expected)


def test_a_file_of_q2_0(tmp_path):
    """The gguf package does not know the type yet, so the test reads the place of the tensor from the header."""
    model = make_model(d_model=64, d_ffn=192, n_layers=1)
    save(model, tmp_path / "m.ckpt")
    assert export("--quantization", "Q2_0", "--embedding_bits", "8") == 0
    contents = (tmp_path / "out/model-Q2_0.gguf").read_bytes()
    codes, gamma = model.blocks[0].mlp.down.ternary()
    name = b"blk.0.ffn_down.weight"
    dimensions, width, height, kind = struct.unpack_from("<IQQI", contents, contents.index(name) + len(name))
    assert (dimensions, width, height, kind) == (2, 192, 64, 42)
    assert contents.count(blocks(codes, gamma, "Q2_0").tobytes()) == 1


@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"qkv_bias": True, "tie_embeddings": False}])
def test_a_written_file_is_read_back(tmp_path, options):
    """The weights come back as plain floats, and everything else comes back unchanged."""
    model = make_model(**WIDE, **options)
    save(model, tmp_path / "m.ckpt")
    assert export("--dtype", "float32") == 0
    loaded = load_model("out")  # a folder that holds a single file
    assert (loaded.format, loaded.config.linear) == ("gguf", "dense")
    weight = loaded.model.blocks[0].attention.qkv.weight
    expected = model.blocks[0].attention.qkv.effective_weight()
    torch.testing.assert_close(weight, expected, rtol=2**-11, atol=0)
    for name in ("embed.weight", "norm.weight", "blocks.0.mlp_norm.weight", "lm_head.weight"):
        assert torch.equal(loaded.model.get_parameter(name), model.get_parameter(name))
    if model.config.qkv_bias:
        assert torch.equal(loaded.model.blocks[0].attention.qkv.bias, model.blocks[0].attention.qkv.bias)
    assert loaded.need_tokenizer().encode("aé").ids == byte_tokenizer().encode("aé").ids
    assert loaded.text.stop_ids == [256]
    fixed = (
        "vocab_size",
        "d_model",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "d_ffn",
        "rope_theta",
        "norm_eps",
        "qkv_bias",
    )
    assert all(getattr(loaded.config, name) == getattr(model.config, name) for name in fixed)


def test_scaled_positions_come_back(tmp_path):
    scaling = RopeScaling(32.0, 1.0, 4.0, 8192)
    save(make_model(**WIDE, rope_scaling=scaling, rope_theta=5e5), tmp_path / "m.ckpt")
    assert export() == 0
    assert load_model("out").config.rope_scaling == scaling


def sentencepiece():
    """A small tokenizer like that of Llama 2: spaces become an underline, and bytes stand for unknown characters."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for token in ("\u2581", "a", "b", "c", "ab", "bc", "abc", "\u2581a", "\u2581ab"):
        words[token] = len(words)
    merges = [("a", "b"), ("b", "c"), ("\u2581", "a"), ("ab", "c"), ("a", "bc"), ("\u2581a", "b"), ("\u2581", "ab")]
    tokenizer = Tokenizer(models.BPE(words, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def test_sentencepiece_goes_out_and_comes_back(tmp_path):
    tokenizer = sentencepiece()
    save(make_model(**WIDE), tmp_path / "m.ckpt", tokenizer=False)
    tokenizer.save("tokenizer.json")
    assert export() == 0
    fields = {name: field.contents() for name, field in read(tmp_path / "out/model-TQ2_0.gguf")[0].fields.items()}
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("llama", "default")
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert fields["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 6]
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    assert scores["ab"] > scores["bc"] > scores["\u2581a"] > scores["abc"] > scores["\u2581ab"] > scores["a"]
    back = load_model("out").need_tokenizer()
    for text in ("abc ab", "cab  é", "", "bcb\n"):
        assert back.encode(text).ids == tokenizer.encode(text).ids
        assert back.decode(back.encode(text).ids) == tokenizer.decode(tokenizer.encode(text).ids)


def test_merges_that_scores_cannot_order_are_refused():
    tokenizer = Tokenizer(
        models.BPE(
            {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5},
            [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")],
            byte_fallback=True,
        )
    )
    with pytest.raises(ConfigError, match="makes 'abc' both before and after 'bc'"):
        check_tokenizer(tokenizer)


def test_embeddings_in_bfloat16(tmp_path):
    model = make_model(**WIDE)
    save(model, tmp_path / "m.ckpt")
    assert export("--dtype", "bfloat16") == 0
    _, tensors = read(tmp_path / "out/model-TQ2_0.gguf")
    assert tensors["token_embd.weight"][0].tensor_type.name == "BF16"
    assert export("--overwrite=true") == 0  # the default
    assert read(tmp_path / "out/model-TQ2_0.gguf")[1]["token_embd.weight"][0].tensor_type.name == "BF16"
    expected = model.embed.weight.detach().bfloat16().float().numpy()
    assert np.array_equal(tensors["token_embd.weight"][1], expected)


def test_interleaving_undoes_the_halves():
    """Rotating neighbours of the reordered rows is rotating halves of the rows as they were."""
    torch.manual_seed(0)
    rows, angles = torch.randn(2 * 8), torch.randn(4)
    left, right = rows.view(2, 2, 4).unbind(1)
    halves = torch.stack((left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()), 1)
    even, odd = interleave_halves(rows.unsqueeze(-1), 8).view(2, 4, 2).unbind(-1)
    pairs = torch.stack((even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()), -1)
    assert torch.equal(interleave_halves(halves.flatten().unsqueeze(-1), 8).flatten(), pairs.flatten())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 48}, "blocks.0.attention.qkv: in_features=48 fits no ternary type of GGUF"),
        ({"d_model": 256, "d_ffn": 328}, "use --format packed or hf-bitnet, or train with a width of 352"),
        ({**WIDE, "activation_bits": None}, "activation_bits=None"),
        ({**WIDE, "linear": "dense"}, "use --format hf"),
    ],
)
def test_what_has_no_home_is_refused_before_writing(tmp_path, capsys, options, message):
    save(make_model(**options), tmp_path / "m.ckpt")
    assert export() == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_scales_that_float16_cannot_hold_are_refused(tmp_path, capsys):
    model = make_model(**WIDE)
    with torch.no_grad():
        model.blocks[0].attention.o.weight.mul_(1e-3)
    save(model, tmp_path / "m.ckpt")
    assert export() == 1
    assert "blocks.0.attention.o: gamma=" in capsys.readouterr().err


def test_a_tokenizer_is_needed(tmp_path, capsys):
    save(make_model(**WIDE), tmp_path / "m.ckpt", tokenizer=False)
    assert export() == 1
    assert "pass --tokenizer" in capsys.readouterr().err
    byte_tokenizer().save("tokenizer.json")
    assert export("--tokenizer", "tokenizer.json") == 0


def test_a_token_before_each_text_is_known_there(tmp_path):
    """The tokenizer is like that of Llama 3: different tokens begin and end a text."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<start>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", tokenizer.token_to_id("<start>"))]
    )
    save(make_model(**WIDE), tmp_path / "m.ckpt", tokenizer=False)
    tokenizer.save("tokenizer.json")
    assert export() == 0
    fields = read(tmp_path / "out/model-TQ2_0.gguf")[0].fields
    ids = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos")]
    assert ids == [tokenizer.token_to_id("<start>"), tokenizer.token_to_id("<|endoftext|>")]
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True


@pytest.mark.parametrize("format", ["gguf", "packed"])
def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, capsys, format):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"more{i}" for i in range(100)])
    save(make_model(**WIDE), tmp_path / "m.ckpt", tokenizer=False)
    tokenizer.save("tokenizer.json")
    assert export("--format", format) == 1
    assert f"has {tokenizer.get_vocab_size()} tokens, the model's vocab_size is 320" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_package_is_asked_for_by_name(tmp_path, capsys, monkeypatch):
    import sys

    save(make_model(**WIDE), tmp_path / "m.ckpt")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert export() == 1
    assert 'pip install -e ".[export]"' in capsys.readouterr().err


def merged(pre_tokenizer, ignore_merges=False, **parts):
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")], ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def split(pattern):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def test_ways_to_cut_text_are_known_by_name():
    assert check_tokenizer(train_bpe(["some text " * 50], 270))[1] == "gpt-2"
    assert check_tokenizer(merged(split(QWEN2_WORDS)))[1] == "qwen2"
    llama_3 = split(QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|"))
    assert check_tokenizer(merged(llama_3))[1] == "dbrx"
    assert check_tokenizer(merged(llama_3, ignore_merges=True))[1] == "llama-bpe"
    smollm = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    assert check_tokenizer(merged(smollm))[1] == "smollm"


@pytest.mark.parametrize("way", PRE_TOKENIZERS, ids=lambda way: way.name)
def test_each_way_to_cut_is_told_from_the_others_and_comes_back(way):
    """The way comes back by its own name, and by any other name that llama.cpp has for the same cut."""
    tokenizer = merged(pre_tokenizer_of(way), ignore_merges=way.ignores_merges)
    assert name_of(tokenizer, way.ignores_merges) == way.name
    assert all(way_named(name) is way for name in (way.name, *way.also))
    names = [name for one in PRE_TOKENIZERS for name in (one.name, *one.also)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (merged(split(r"\w+")), r"cuts text \(\\w\+\)"),
        (merged(pre_tokenizers.Whitespace()), "Whitespace"),
        (merged(split(QWEN2_WORDS), normalizer=normalizers.Lowercase()), "this tokenizer does .Lowercase"),
        (
            merged(split(QWEN2_WORDS), post_processor=processors.TemplateProcessing("$A b", special_tokens=[("b", 1)])),
            "adds one token before a text; this tokenizer adds others",
        ),
        (merged(pre_tokenizers.ByteLevel(add_prefix_space=True)), "with add_prefix_space"),
        (Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "byte-level BPE"),
    ],
)
def test_tokenizers_without_a_name_there_are_refused(tokenizer, message):
    with pytest.raises(ConfigError, match=message):
        check_tokenizer(tokenizer)
