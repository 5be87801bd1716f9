"""Fused experts compute what one layer for each expert computes; their state dict loads; they revert."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from sbn_lightning.core.errors import ConfigError  # noqa: E402
from sbn_lightning.integrations import convert, revert, save_sparse  # noqa: E402
from sbn_lightning.integrations.huggingface import save_packed  # noqa: E402
from sbn_lightning.layers.experts import ExpertsWeight  # noqa: E402
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


def test_a_copy_computes_the_same_and_folders_say_that_they_cannot(tmp_path):
    model = build("mixtral").eval()
    convert(model, "2:4")
    again = copy.deepcopy(model)
    assert torch.equal(again(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    for save in (save_sparse, save_packed):
        with pytest.raises(ConfigError, match="cannot hold the fused experts"):
            save(model, tmp_path / "folder")


def test_what_cannot_be_converted_says_why():
    model = build("mixtral")
    report = convert(model, "2:4", exclude=("experts", "lm_head"))
    assert report.skipped["model.layers.0.mlp.experts.down_proj"] == "excluded by name"
    model = build("mixtral")
    report = convert(model, "2:4", kind="masked")
    assert report.skipped["model.layers.0.mlp.experts.down_proj"] == "fused experts become ternary only"
