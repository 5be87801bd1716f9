"""Fused experts compute what one layer for each expert computes; their state dict loads; they revert."""

import copy
import io

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers", minversion="5")

from lightning.pytorch import LightningModule, Trainer  # noqa: E402

from sbn_lightning.callbacks import MaskRefresh, SparsityPatternLogger, TernarySparseConversion  # noqa: E402
from sbn_lightning.core.errors import ConfigError  # noqa: E402
from sbn_lightning.integrations import convert, load_sparse, revert, save_sparse  # noqa: E402
from sbn_lightning.integrations.huggingface import SBNConfig, save_packed  # noqa: E402
from sbn_lightning.layers import convert_linears, pack_layers  # noqa: E402
from sbn_lightning.layers.audit import audit  # noqa: E402
from sbn_lightning.layers.experts import ExpertsWeight  # noqa: E402
from sbn_lightning.layers.experts_linear import PackedExperts  # noqa: E402
from sbn_lightning.layers.matching import convert_to_match  # noqa: E402
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear  # noqa: E402
from sbn_lightning.schedule import MaskedDecay, Ramp, Refresh, SparsitySchedule  # noqa: E402
from tests.integrations.families import build  # noqa: E402

MIXTURES = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v3"]
TOKENS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))


def experts_of(model):
    return next(module for name, module in model.named_modules() if name.endswith(".mlp.experts"))


def routed(experts):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10, 32, generator=generator)
    index = torch.stack([torch.randperm(experts.num_experts, generator=generator)[:2] for _ in range(10)])
    return x, index, torch.rand(10, 2, generator=generator)


def one_layer_an_expert(experts, x, index, weights):
    """The same experts as plain SparseBitLinear layers, gate and up apart, token by token."""

    def layer(weight):
        own = SparseBitLinear(weight.shape[1], weight.shape[0], bias=False, pattern="2:4")
        own.weight = torch.nn.Parameter(weight.detach().clone())
        return own

    half = experts.gate_up_proj.shape[1] // 2
    gates = [layer(w[:half]) for w in experts.gate_up_proj]
    ups = [layer(w[half:]) for w in experts.gate_up_proj]
    downs = [layer(w) for w in experts.down_proj]
    rows = []
    for token, chosen, share in zip(x, index, weights, strict=True):
        outs = [
            s * downs[e](experts.act_fn(gates[e](token)) * ups[e](token)) for e, s in zip(chosen, share, strict=True)
        ]
        rows.append(sum(outs))
    return torch.stack(rows), gates, ups, downs


def test_experts_compute_and_learn_as_separate_layers_do():
    experts = experts_of(build("qwen3-moe"))
    x, index, weights = routed(experts)
    expected, gates, ups, downs = one_layer_an_expert(experts, x, index, weights)
    expected.square().sum().backward()
    convert(experts, "2:4")
    got = experts(x, index, weights)
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()

    def grads(layers):
        return torch.stack(
            [torch.zeros_like(one.weight) if one.weight.grad is None else one.weight.grad for one in layers]
        )

    gate_up = torch.cat([grads(gates), grads(ups)], dim=1)
    torch.testing.assert_close(experts.gate_up_proj._parameters["weight"].grad, gate_up)
    torch.testing.assert_close(experts.down_proj._parameters["weight"].grad, grads(downs))
    assert experts.gate_up_proj.ternary()[1].shape == (8,)
    assert experts.down_proj.ternary()[1].shape == (4,)


@pytest.mark.parametrize("name", MIXTURES)
def test_state_dicts_fit_both_ways_and_routers_stay_dense(name):
    dense = build(name)
    state = copy.deepcopy(dense.state_dict())
    report = convert(dense, "2:4")
    fused = [layer for layer in report.converted if ".experts." in layer]
    assert fused
    assert not any("router" in layer or layer.endswith(".gate") for layer in report.converted)
    now = dense.state_dict()
    assert {key for key in now if not key.endswith("mask_bits")} == state.keys()
    assert all(torch.equal(now[key], value) for key, value in state.items())
    again = build(name)
    convert(again, "2:4")
    again.load_state_dict(state)  # a dense checkpoint gives fresh masks
    again.load_state_dict(now)
    plain = build(name)
    plain.load_state_dict({key: value for key, value in now.items() if not key.endswith("mask_bits")})
    assert set(revert(again)) == set(report.converted)
    assert again.state_dict().keys() == state.keys()


def test_the_schedule_governs_experts_and_an_optimiser_keeps_its_parameters():
    model = build("mixtral")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    convert(model, "2:4")
    options = {"ramp": Ramp("walk", end=0.5), "refresh": Refresh(2), "masked_decay": MaskedDecay(1.0)}
    schedule = SparsitySchedule(model, optimizer, total_steps=4, **options)
    losses = []
    for _ in range(4):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    experts = experts_of(model)
    assert isinstance(experts.down_proj, ExpertsWeight)
    assert experts.down_proj.mask.unflatten(-1, (-1, 4)).sum(-1).unique().tolist() == [2]
    assert schedule.statistics()["mask_density"] == 0.5


@pytest.fixture(scope="module")
def converted():
    """Converted models by family, and their logits."""
    models = {}
    for name in ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe"):
        model = build(name).eval()
        convert_linears(model, "2:4")
        models[name] = model, model(input_ids=TOKENS).logits.detach()
    return models


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def test_copies_pickles_and_packed_layers_compute_the_same(converted):
    model, expected = converted["mixtral"]
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    again = torch.load(stored, weights_only=False)
    assert torch.equal(logits(again), expected)
    revert(again)
    assert type(experts_of(again)) is type(experts_of(build("mixtral")))
    packed = pack_layers(copy.deepcopy(model))
    assert isinstance(experts_of(packed).down_proj, PackedExperts)
    assert torch.equal(logits(packed), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folders_hold_the_learned_scales_of_experts(dtype, tmp_path):
    load = transformers.AutoModelForCausalLM.from_pretrained
    build("qwen3-moe").save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=SBNConfig("2:4", learnable_scales=True))
    scales = {name: value for name, value in model.named_parameters() if name.endswith("proj.log_scale")}
    for i, scale in enumerate(scales.values()):
        torch.nn.init.uniform_(scale, -0.01 * (i + 1), 0.01 * (i + 1))
    assert "model.layers.0.mlp.experts.gate_up_proj.log_scale" in scales
    model.save_pretrained(tmp_path / "latent")
    loaded = load(tmp_path / "latent", dtype=dtype)
    for name, scale in scales.items():
        assert torch.equal(loaded.get_parameter(name), scale), name  # They stay float32.
    if dtype == torch.float32:
        assert torch.equal(logits(loaded), logits(model))
        save_packed(model, tmp_path / "packed")
        assert torch.equal(logits(load(tmp_path / "packed")), logits(model))
        save_sparse(model, tmp_path / "folder", "latent")
        again = build("qwen3-moe")
        load_sparse(again, tmp_path / "folder")
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["ternary", "masked"])
@pytest.mark.parametrize("form", ["packed", "latent"])
def test_a_folder_of_save_sparse_holds_experts(kind, form, tmp_path):
    model = build("qwen3-moe")
    convert(model, "2:4", kind=kind)
    if (kind, form) == ("masked", "packed"):
        with pytest.raises(ConfigError, match="not ternary"):
            save_sparse(model, tmp_path / "folder", form)
        return
    save_sparse(model, tmp_path / "folder", form)
    again = build("qwen3-moe")
    for parameter in again.parameters():
        parameter.data.zero_()
    names = load_sparse(again, tmp_path / "folder")
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert torch.equal(logits(again), logits(model))
    save_sparse(again, tmp_path / "again", form)
    files = [tmp_path / folder / "model.safetensors" for folder in ("folder", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = build("mixtral")
    with pytest.raises(ConfigError, match=r"gate_up_proj has 4 experts of 32 -> 128 in the model"):
        load_sparse(other, tmp_path / "folder")


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe"])
def test_a_packed_hugging_face_folder_gives_the_same_logits_and_the_same_file(name, converted, tmp_path):
    model, expected = converted[name]
    save_packed(model, tmp_path / "folder")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert isinstance(experts_of(again).gate_up_proj, PackedExperts)
    assert not any(parameter.ndim == 3 for parameter in again.parameters())
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("folder", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    codes = first["model.layers.1.mlp.experts.down_proj.codes"]
    assert (codes.dtype, codes.shape[0]) == (torch.uint8, 4 * 32)


def test_a_dense_folder_becomes_latent_trains_and_reloads(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "dense")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "dense", quantization_config=SBNConfig("2:4"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "latent")
    again = load(tmp_path / "latent")
    assert isinstance(experts_of(again).down_proj, ExpertsWeight)
    assert torch.equal(experts_of(again).down_proj.mask_bits, experts_of(model).down_proj.mask_bits)
    assert torch.equal(logits(again), logits(model))


def test_an_audit_counts_experts_and_finds_none_bypassed(converted):
    model, _ = converted["mixtral"]
    found = audit(model, lambda: model(input_ids=TOKENS))
    assert not found.bypassed
    assert not found.not_called
    places, one = 2 * TOKENS.numel(), 3 * 32 * 64  # two experts a token; gate, up and down of one expert
    experts = 2 * 2 * places * one  # two layers
    attention = 2 * 2 * TOKENS.numel() * (32 * 64 + 32 * 32)
    assert found.sparse_flops == experts + attention
    a_token = audit(model)
    assert a_token.sparse_flops * TOKENS.numel() == found.sparse_flops
    dense = audit(build("mixtral"))
    assert dense.skipped["model.layers.0.mlp.experts.down_proj"] == "fused experts that are not converted"
    assert dense.linear_flops == a_token.linear_flops


def test_a_checkpoint_of_a_converted_mixture_fits_a_new_model(converted):
    model, expected = converted["olmoe"]
    stored = io.BytesIO()
    torch.save({"state_dict": model.state_dict()}, stored)
    stored.seek(0)
    state = torch.load(stored, weights_only=True)["state_dict"]
    again = build("olmoe")
    names = convert_to_match(again, state)
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    again.load_state_dict(state)
    assert torch.equal(logits(again), expected)
    with pytest.raises(ConfigError, match="no plain layer"):
        convert_to_match(again, state)


def test_an_error_changes_no_experts():
    model = build("mixtral")
    with pytest.raises(ConfigError, match="split_sizes"):
        convert_linears(model, "2:4", split_sizes={"nowhere": (1, 2)})
    assert experts_of(model).down_proj.ndim == 3


def test_experts_without_tokens_and_numbers_without_experts():
    experts = experts_of(build("mixtral"))
    convert(experts, "2:4")
    x = torch.randn(3, 32)
    one = experts(x, torch.full((3, 1), 2), torch.ones(3, 1))
    both = experts(x, torch.tensor([[2, 4]] * 3), torch.ones(3, 2))  # there is no expert 4
    assert torch.equal(one, both)
    assert experts(x[:0], torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)).shape == (0, 32)


def test_what_cannot_be_converted_says_why():
    model = build("mixtral")
    report = convert(model, "2:4", exclude=("experts", "lm_head"))
    assert report.skipped["model.layers.0.mlp.experts.down_proj"] == "excluded by name"
    experts_of(model).has_bias = True
    report = convert(model, "2:4")
    assert report.skipped["model.layers.0.mlp.experts.down_proj"] == "its experts have biases"
    assert "model.layers.1.mlp.experts.down_proj" in report.converted
    with pytest.raises(ConfigError, match="in_features=32 of gate_up_proj is not a multiple of M=12"):
        convert(build("mixtral").model.layers[0].mlp.experts, "6:12")


class Mixtral(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = build("mixtral")

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_the_callbacks_reach_experts_and_a_checkpoint_continues(tmp_path):
    loader = torch.utils.data.DataLoader(list(TOKENS.repeat(4, 1)), batch_size=2)

    def train(steps, checkpoint=None):
        module, logger = Mixtral(), SparsityPatternLogger(interval=1)
        callbacks = [TernarySparseConversion("2:4"), MaskRefresh(interval=2), logger]
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = Trainer(max_steps=steps, callbacks=callbacks, enable_checkpointing=False, **options)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module, logger

    whole, logger = train(4)
    assert "model.model.layers.0.mlp.experts.gate_up_proj" in logger.counts
    assert logger.total().shares()["mask_density"] == 0.5
    train(2)
    again, _ = train(4, tmp_path / "2.ckpt")
    for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    fresh = Mixtral()
    TernarySparseConversion.load(fresh, tmp_path / "4.ckpt")
    assert torch.equal(logits(fresh.model), logits(whole.model))
