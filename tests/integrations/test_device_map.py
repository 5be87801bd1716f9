"""Models that accelerate has spread over devices (``device_map``) while transformers loaded them."""

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

from sbn_lightning.core.errors import ConfigError  # noqa: E402
from sbn_lightning.integrations.huggingface import SBNConfig  # noqa: E402
from sbn_lightning.layers.masked_linear import masked_layers  # noqa: E402
from tests.integrations.families import build  # noqa: E402

TOKENS = torch.arange(3, 15)[None]
PLACES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def spread(folder, tmp_path, on_disk, **options):
    places = dict.fromkeys(PLACES, "cpu") | dict.fromkeys(on_disk, "disk")
    return load(folder, device_map=places, offload_folder=tmp_path / "disk", **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_a_model_that_was_dispatched_before_its_conversion_is_sparse(name, tmp_path):
    build(name).save_pretrained(tmp_path / "dense")
    config = {"quantization_config": SBNConfig("2:4")}
    plain = load(tmp_path / "dense", **config)
    # transformers puts hooks on every layer, although only the head is on another "device".
    dispatched = spread(tmp_path / "dense", tmp_path, ["lm_head"], **config)
    name, layer = next(iter(masked_layers(dispatched)))
    assert "forward" in vars(layer) or "experts" in name
    assert torch.equal(logits(dispatched), logits(plain))
    plain.save_pretrained(tmp_path / "latent")
    assert torch.equal(logits(spread(tmp_path / "latent", tmp_path, ["lm_head"])), logits(plain))


@pytest.mark.parametrize("form", ["dense", "latent"])
@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_offloaded_latent_weights_are_refused_by_name(name, form, tmp_path):
    build(name).save_pretrained(tmp_path / "dense")
    config = {"quantization_config": SBNConfig("2:4")}
    if form == "latent":
        load(tmp_path / "dense", **config).save_pretrained(tmp_path / "latent")
    with pytest.raises(ConfigError, match=r"cannot be converted: .*its weights are offloaded"):
        spread(tmp_path / form, tmp_path, ["model.layers.1"], **(config if form == "dense" else {}))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_trainer_trains_a_model_that_is_spread_over_two_gpus(tmp_path):
    from sbn_lightning.integrations.huggingface import SparsityCallback

    build("qwen2").save_pretrained(tmp_path / "dense")
    places = dict.fromkeys(PLACES, 0) | {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    model = load(tmp_path / "dense", device_map=places, quantization_config=SBNConfig("2:4"))
    plain = load(tmp_path / "dense", device_map={"": 0}, quantization_config=SBNConfig("2:4"))
    torch.testing.assert_close(model(input_ids=TOKENS.to(0)).logits.to(0), plain(input_ids=TOKENS.to(0)).logits)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to=[]
    )
    rows = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 8
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[SparsityCallback()])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "sparsity/zeros" in entry]
    assert all(0.5 <= entry["sparsity/zeros"] < 1 for entry in logged)
    assert len(logged) == 3
