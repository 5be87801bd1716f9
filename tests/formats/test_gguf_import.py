"""``import-hf`` reads dense GGUF files of the usual types, with the tokenizer, and the model computes the same."""

import numpy as np
import pytest
import torch

from sbn_lightning.checkpoints.text_files import TextFiles
from sbn_lightning.cli import main
from sbn_lightning.data.tokenizer import byte_tokenizer
from sbn_lightning.formats import load_model
from sbn_lightning.formats.gguf.names import interleave_halves, restore_halves
from sbn_lightning.formats.gguf.tokenizer import add_tokenizer
from tests.formats.models import logits, make_model, some_tokens

gguf = pytest.importorskip("gguf")

# The bytes of a block that hold its float16 scales. Without them, random bytes can be a scale that is not a number.
SCALES = {"Q4_K": slice(0, 4), "Q5_K": slice(0, 4), "Q6_K": slice(208, 210)}


def quantised(weight, name):
    """The data of a tensor in a type, and the values that they stand for."""
    kind = gguf.GGMLQuantizationType[name]
    if name in SCALES:  # gguf reads these types and does not write them
        rows, width = weight.shape
        _, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.random.default_rng(rows).integers(0, 256, (rows, width // 256, size), dtype=np.uint8)
        places = data[..., SCALES[name]]
        places[:] = np.full((*places.shape[:-1], places.shape[-1] // 2), 1e-3, np.float16).view(np.uint8)
        data = data.reshape(rows, -1)
    else:
        data = gguf.quants.quantize(weight.numpy(), kind)
    return data, torch.from_numpy(gguf.quants.dequantize(data, kind).copy())


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_0", "Q4_K", "Q5_K", "Q6_K"])
def test_a_dense_file_is_imported(tmp_path, name, architecture, capsys):
    bias = architecture == "qwen2"
    model = make_model(d_model=256, d_ffn=256, n_layers=1, linear="dense", qkv_bias=bias, tie_embeddings=False)
    config, size = model.config, model.config.head_size
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, config.max_sequence_length),
        (writer.add_embedding_length, 256),
        (writer.add_feed_forward_length, 256),
        (writer.add_head_count, config.n_heads),
        (writer.add_head_count_kv, config.n_kv_heads),
        (writer.add_layer_norm_rms_eps, config.norm_eps),
        (writer.add_rope_freq_base, config.rope_theta),
        (writer.add_vocab_size, config.vocab_size),
    ):
        add(value)
    add_tokenizer(writer, TextFiles({"tokenizer.json": byte_tokenizer().to_str()}), config.vocab_size)
    block = model.blocks[0]
    splits = block.attention.splits
    q, k, v = block.attention.qkv.weight.detach().split(splits)
    gate, up = block.mlp.gate_up.weight.detach().chunk(2)
    weights = {"attn_q": q, "attn_k": k, "attn_v": v, "ffn_gate": gate, "ffn_up": up}
    weights |= {"attn_output": block.attention.o.weight.detach(), "ffn_down": block.mlp.down.weight.detach()}
    read = {}
    for part, weight in weights.items():
        turned = architecture == "llama" and part in ("attn_q", "attn_k")
        data, values = quantised(interleave_halves(weight, size) if turned else weight, name)
        read[part] = restore_halves(values, size) if turned else values
        writer.add_tensor(f"blk.0.{part}.weight", data, raw_dtype=gguf.GGMLQuantizationType[name])
    plain = {"token_embd": model.embed, "output": model.lm_head, "output_norm": model.norm}
    plain |= {"blk.0.attn_norm": block.attention_norm, "blk.0.ffn_norm": block.mlp_norm}
    for part, module in plain.items():
        writer.add_tensor(f"{part}.weight", module.weight.detach().numpy())
    if bias:
        for part, values in zip("qkv", block.attention.qkv.bias.detach().split(splits), strict=True):
            writer.add_tensor(f"blk.0.attn_{part}.bias", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    assert main(["import-hf", "--input", str(tmp_path / "model.gguf"), "--output", str(tmp_path / "m.ckpt")]) == 0
    assert "tokenizer:" in capsys.readouterr().out
    loaded = load_model(tmp_path / "m.ckpt")
    own = loaded.model.blocks[0]
    qkv = torch.cat([read[part] for part in ("attn_q", "attn_k", "attn_v")])
    assert torch.equal(own.attention.qkv.weight, qkv)
    assert torch.equal(own.attention.o.weight, read["attn_output"])
    assert torch.equal(own.mlp.gate_up.weight, torch.cat([read["ffn_gate"], read["ffn_up"]]))
    assert torch.equal(own.mlp.down.weight, read["ffn_down"])
    assert loaded.need_tokenizer().encode("aé").ids == byte_tokenizer().encode("aé").ids
    if name == "F32":
        assert torch.equal(logits(loaded.model, some_tokens()), logits(model, some_tokens()))
