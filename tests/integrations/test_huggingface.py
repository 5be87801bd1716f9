"""The quantisation method "sbn" of transformers: folders in and out, generation, training."""

import copy
import json

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402

from sbn_lightning.core.errors import ConfigError, DataError  # noqa: E402
from sbn_lightning.formats.huggingface.sbn import pack_codes, unpack_codes  # noqa: E402
from sbn_lightning.integrations.huggingface import SBNConfig, save_packed  # noqa: E402
from sbn_lightning.integrations.huggingface.packed_linear import TernaryLinear2Bit  # noqa: E402
from sbn_lightning.integrations.huggingface.quantizer import config_of  # noqa: E402
from sbn_lightning.integrations.pytorch import convert  # noqa: E402
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear  # noqa: E402
from sbn_lightning.layers.swiglu_fusion import FusedSwiGLU  # noqa: E402
from tests.integrations.families import build  # noqa: E402

TOKENS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
DENSE_FAMILIES = ["llama-attention-bias", "qwen2-tied", "qwen3", "phi3", "gemma2", "gpt-neox", "gpt2", "cohere"]


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def ternary(name="qwen2-tied", pattern="2:4"):
    model = build(name)
    convert(model, pattern, exclude=("lm_head", "embed_out"))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_codes_in_two_bits():
    codes = torch.randint(-1, 2, (5, 11), dtype=torch.int8)
    packed = pack_codes(codes)
    assert packed.shape == (5, 3)
    assert torch.equal(unpack_codes(packed, 11), codes)
    assert pack_codes(torch.tensor([[1, 0, -1, 1]], dtype=torch.int8)).tolist() == [[0b10_00_01_10]]


@pytest.mark.parametrize("name", DENSE_FAMILIES)
def test_a_packed_folder_loads_into_its_architecture_and_saves_the_same_bytes(name, tmp_path):
    model = ternary(name)
    expected = logits(model)
    save_packed(model, tmp_path / "packed", perplexity=12.5)
    again = load(tmp_path / "packed")
    assert sum(isinstance(layer, TernaryLinear2Bit) for layer in again.modules()) == sum(
        isinstance(layer, SparseBitLinear) for layer in model.modules()
    )
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "packed" / file).read_bytes(), file
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "| pattern | 2:4: at most 2 of every 4 weights" in card
    assert "| perplexity | 12.50 |" in card
    assert type(model).__name__ in card


@pytest.mark.parametrize("name", ["qwen2-tied", "gpt2"])
def test_a_latent_folder_keeps_weights_and_masks(name, tmp_path):
    model = ternary(name)
    for layer in model.modules():
        if isinstance(layer, SparseBitLinear):
            layer.set_density(3)  # a mask from the middle of a ramp must come back unchanged
    expected = logits(model)
    model.config.quantization_config = config_of(model, "latent")
    model.save_pretrained(tmp_path / "latent")
    again = load(tmp_path / "latent")
    assert torch.equal(logits(again), expected)
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    for own, loaded in zip(model.modules(), again.modules(), strict=True):  # What computes together, does so again.
        assert isinstance(own, FusedSwiGLU) == isinstance(loaded, FusedSwiGLU)
        assert (getattr(own, "readers", None) is None) == (getattr(loaded, "readers", None) is None)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "latent" / "model.safetensors"
    ).read_bytes()


def test_a_dense_folder_is_converted_while_it_loads(tmp_path):
    build("qwen2-tied").save_pretrained(tmp_path / "dense")
    config = SBNConfig("2:4", exclude=("lm_head", "model.layers.0"), gamma_over="kept")
    model = load(tmp_path / "dense", quantization_config=config)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseBitLinear)}
    assert len(layers) == 7
    assert all(name.startswith("model.layers.1.") and layer.gamma_over == "kept" for name, layer in layers.items())
    model.save_pretrained(tmp_path / "latent")
    assert torch.equal(logits(load(tmp_path / "latent")), logits(model))


def test_packed_layers_keep_gamma_exact_in_bfloat16(tmp_path):
    model = ternary()
    save_packed(model, tmp_path / "packed", dtype=torch.bfloat16)
    again = load(tmp_path / "packed", dtype=torch.bfloat16)
    name = "model.layers.0.mlp.down_proj"
    layer, latent = again.get_submodule(name), model.get_submodule(name)
    assert layer.gamma.dtype == torch.float32
    assert torch.equal(layer.gamma, latent.ternary()[1])
    assert again.model.embed_tokens.weight.dtype == torch.bfloat16
    assert again(input_ids=TOKENS).logits.dtype == torch.bfloat16


def test_generate_with_both_caches_and_a_pipeline(tmp_path):
    model = ternary("qwen3")
    save_packed(model, tmp_path / "packed")
    again = load(tmp_path / "packed")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(TOKENS, **options)
    assert torch.equal(again.generate(TOKENS, **options), expected)
    assert torch.equal(again.generate(TOKENS, cache_implementation="static", **options), expected)
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.int64), TOKENS], dim=1)
    mask = (padded > 0).long()
    assert torch.equal(again.generate(padded, attention_mask=mask, **options)[:, 2:], expected)


def test_a_text_generation_pipeline(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, **{f"w{i}": i for i in range(3, 96)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    save_packed(ternary(), tmp_path / "packed")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")
    pipe = transformers.pipeline("text-generation", str(tmp_path / "packed"), tokenizer=tokenizer, device="cpu")
    text = pipe("w5 w6 w7", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    ids = load(tmp_path / "packed").generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert text.replace(" ", "") == "".join(list(vocabulary)[i] for i in ids[0].tolist())


def test_torch_compile_sees_one_graph(tmp_path):
    save_packed(ternary(), tmp_path / "packed")
    model = load(tmp_path / "packed")
    expected = logits(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99 of the format"),
        ({"modules": {"model.layers.9.mlp.up_proj": {}}}, "the sparse layer model.layers.9.mlp.up_proj"),
        ({"modules": {"model.norm": {}}}, "model.norm, which is a Qwen2RMSNorm"),
        ({"modules": {"lm_head": {}}}, "lacks the codes or the gamma of lm_head"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, change, message):
    save_packed(ternary("qwen2"), tmp_path / "packed")
    file = tmp_path / "packed" / "config.json"
    values = json.loads(file.read_text())
    values["quantization_config"] |= change
    file.write_text(json.dumps(values))
    with pytest.raises(DataError, match=message):
        load(tmp_path / "packed")


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"has no sparse layer; call convert"):
        save_packed(build("qwen2"), tmp_path / "packed")
    masked = build("qwen2")
    convert(masked, "2:4", kind="masked")
    with pytest.raises(ConfigError, match="is sparse, but not ternary"):
        save_packed(masked, tmp_path / "packed")
    with pytest.raises(ConfigError, match="no option 'patern'"):
        SBNConfig(patern="2:4")


def rows(count=8):
    tokens = torch.randint(3, 96, (count, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer_of(model, folder, callbacks=(), **options):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        **{"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True}
        | {"report_to": [], "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no", "seed": 0}
        | options,
    )
    return Trainer(model, arguments, train_dataset=rows(), callbacks=list(callbacks))


def test_learned_scales_are_saved_with_latent_weights_and_go_into_gamma_when_packed(tmp_path):
    build("qwen2").save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=SBNConfig("2:4", learnable_scales=True))
    scales = {name: value for name, value in model.named_parameters() if name.endswith("log_scale")}
    for i, scale in enumerate(scales.values()):
        scale.data.fill_(0.01 * (i + 1))
    tokens = rows()[0]["input_ids"][None]
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "latent")
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load(tmp_path / "latent", dtype=dtype)
        for name, scale in scales.items():
            assert torch.equal(loaded.get_parameter(name), scale), name  # They stay float32.
        assert dtype != torch.float32 or torch.equal(loaded(tokens).logits, expected)
    save_packed(model, tmp_path / "packed")
    assert torch.equal(load(tmp_path / "packed")(tokens).logits, expected)
    file = tmp_path / "latent" / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name not in scales}, file, {"format": "pt"})
    loaded = load(tmp_path / "latent")  # Scales that a folder does not have begin at zero.
    assert all(loaded.get_parameter(name).count_nonzero() == 0 for name in scales)


def test_the_trainer_trains_a_loaded_latent_model_with_the_schedule(tmp_path):
    from sbn_lightning.integrations.huggingface import SparsityCallback
    from sbn_lightning.schedule import MaskedDecay, Ramp, Refresh, Rounding

    build("qwen2-tied").save_pretrained(tmp_path / "dense")

    def start():
        model = load(tmp_path / "dense", quantization_config=SBNConfig("2:4"))
        options = {"refresh": Refresh(2), "masked_decay": MaskedDecay(0.5), "rounding": Rounding(0.8, shape="layers")}
        return model, SparsityCallback(ramp=Ramp("walk", end=0.6), **options)

    model, callback = start()
    trainer = trainer_of(model, tmp_path / "run", [callback], save_strategy="steps", save_steps=3)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "sparsity/mask_density" in entry]
    assert [entry["sparsity/mask_density"] for entry in logged][:2] == [1.0, 0.75]
    assert logged[-1]["sparsity/mask_density"] == 0.5
    assert callback.schedule.steps == 6
    dense = trainer_of(load(tmp_path / "dense"), tmp_path / "run0", max_steps=1)
    dense.train()  # Before the first step nothing is rounded.
    assert logged[0]["loss"] == pytest.approx(dense.state.log_history[0]["loss"], abs=1e-4)

    again, callback = start()
    resumed = trainer_of(again, tmp_path / "run2", [callback])
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for (name, ours), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name

    save_packed(model, tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed")), logits(model.eval()))


def test_the_trainer_refuses_packed_weights_without_adapters(tmp_path):
    save_packed(ternary(), tmp_path / "packed")
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_of(load(tmp_path / "packed"), tmp_path / "run")


def test_lora_on_a_frozen_ternary_base(tmp_path):
    peft = pytest.importorskip("peft")
    save_packed(ternary(), tmp_path / "packed")
    base = load(tmp_path / "packed")
    before = copy.deepcopy(base.state_dict())
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    trainer = trainer_of(model, tmp_path / "run", max_steps=40, learning_rate=0.3)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.4
    assert all(torch.equal(value, before[name]) for name, value in _base_state(model).items())
    trained = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "packed"), tmp_path / "adapter")
    assert torch.equal(logits(again), trained)
    with pytest.raises(ConfigError, match="cannot take in a LoRA update"):
        again.merge_and_unload()


def _base_state(model):
    state = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): v for name, v in model.state_dict().items()
    }
    return {name: value for name, value in state.items() if "lora_" not in name}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_trl_trains_latent_weights(method, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, **{f"w{i}": i for i in range(3, 96)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")
    build("qwen2-tied").save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=SBNConfig("2:4"))
    before = model.get_submodule("model.layers.0.mlp.up_proj").weight.detach().clone()
    options = {"output_dir": str(tmp_path / "run"), "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True}
    options |= {"report_to": [], "save_strategy": "no", "learning_rate": 1e-2, "bf16": False, "disable_tqdm": True}
    if method == "sft":
        data = Dataset.from_list([{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(3, 11)])
        trainer = trl.SFTTrainer(model, trl.SFTConfig(**options), train_dataset=data, processing_class=tokenizer)
    else:
        data = Dataset.from_list(
            [{"prompt": f"w{i}", "chosen": f" w{i + 1}", "rejected": f" w{i + 2}"} for i in range(3, 11)]
        )
        trainer = trl.DPOTrainer(model, args=trl.DPOConfig(**options), train_dataset=data, processing_class=tokenizer)
    trainer.train()
    layer = trainer.model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, SparseBitLinear)
    assert not torch.equal(layer.weight, before)
    assert layer.mask.unflatten(-1, (-1, 4)).sum(-1).max() == 2


def test_packed_layers_are_linear_layers_to_read():
    model = ternary()
    layer = TernaryLinear2Bit.empty(nn.Linear(8, 4), "fc", {"pattern": "2:4", "activation_bits": 8})
    assert isinstance(layer, nn.Linear)
    assert layer.codes.is_meta
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), nn.Linear)
