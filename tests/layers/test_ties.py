"""Equal weights at the edge of a mask are found, and a little noise decides between them."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from sbn_lightning import NMPattern, SparseBitNet, TernarySparseConversion, break_ties, convert_linears
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.masked_linear import masked_layers
from sbn_lightning.layers.ties import find_ties, tied_groups
from tests.formats.models import make_model, save
from tests.helpers import ForeignModule, quiet_trainer, small_config


def round_weights(model, levels=8):
    """Rounds matrices to few magnitudes, as files with 4-bit weights do."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                step = weight.abs().max() / levels
                weight.copy_((weight / step).round() * step)


@pytest.mark.parametrize(
    ("group", "pattern", "tied"),
    [
        ([4.0, 3, 2, 1], "2:4", 0),
        ([4.0, -2, 2, 1], "2:4", 1),  # The signs do not matter.
        ([2.0, 2, 1, 0], "2:4", 0),  # Both are kept.
        ([3.0, 2, 1, 1], "2:4", 0),  # Neither is kept.
        ([3.0, 0, 0, 0], "2:4", 0),  # Zeros decide nothing.
        ([1.0, 1, 1, 1], "3:4", 1),
        ([1.0, 1, 1, 1], "4:4", 0),
    ],
)
def test_a_tie_lies_on_both_sides_of_the_edge(group, pattern, tied):
    other = [4.0, 3, 2, 1]
    assert tied_groups(torch.tensor([group + other] * 3), NMPattern.parse(pattern)) == tied / 2


def test_noise_breaks_ties_of_rounded_weights_and_of_no_others():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 512) for _ in range(3)))
    round_weights(model[0])
    model[1].weight.data = model[1].weight.data.bfloat16().float()
    with pytest.warns(UserWarning, match=r"1 layers, such as 0, .* in up to \d\d% of their groups.*; call break_ties"):
        report = convert_linears(model, "2:4")
    before = {name: layer.weight.clone() for name, layer in masked_layers(model)}
    mask = model[0].mask.clone()
    state = torch.get_rng_state()
    changed = break_ties(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert changed == report.tied
    assert list(changed) == ["0"]
    assert 0.1 < changed["0"] == tied_groups(before["0"][::2], NMPattern(2, 4))
    assert torch.equal(model[1].weight, before["1"])
    assert torch.equal(model[2].weight, before["2"])
    moved = (model[0].weight - before["0"]).std() / before["0"].std()
    assert moved.item() == pytest.approx(0.01, rel=0.02)
    assert not find_ties(model)
    assert not torch.equal(model[0].mask, mask)  # The mask follows the new weights.
    assert break_ties(model) == {}


def test_the_noise_depends_on_the_name_of_the_layer_alone():
    found = []
    for _ in range(2):
        model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
        for layer in model.values():
            nn.init.constant_(layer.weight, 1.0)
            layer.weight.data[:, 0] = 0.5  # A weight without deviation has no scale for its noise.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            convert_linears(model, "2:4")
        assert list(break_ties(model)) == ["a", "b"]
        found.append([layer.weight.detach().clone() for layer in model.values()])
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], found[0][1])


def test_zero_noise_and_weights_that_are_not_there_yet_change_nothing():
    model = nn.Sequential(nn.Linear(64, 64))
    round_weights(model)
    with pytest.warns(UserWarning, match="call break_ties"):
        convert_linears(model, "2:4")
    before = model[0].weight.clone()
    assert break_ties(model, 0) == {}
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ConfigError, match=r"break_ties=-0\.1 is a share"):
        break_ties(model, -0.1)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(64, 64))
    convert_linears(empty, "2:4")
    assert break_ties(empty) == {}


def test_sharded_weights_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64))
    round_weights(model)
    with pytest.warns(UserWarning, match="call break_ties"):
        convert_linears(model, "2:4")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model[0].weight = nn.Parameter(DTensor.from_local(model[0].weight.detach(), mesh))
        assert find_ties(model)
        with pytest.raises(ConfigError, match="the weight of 0 is sharded; call break_ties before shard"):
            break_ties(model)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("noise", [None, 0.0])
def test_a_run_from_rounded_weights(tmp_path, noise, caplog):
    source = make_model(linear="dense")
    round_weights(source)
    given = {} if noise is None else {"break_ties": noise}
    path = str(save(source, tmp_path / "dense.ckpt"))
    module = SparseBitNet(small_config(pattern="2:4"), init_from=path, **given)
    with caplog.at_level("INFO"):
        module.configure_model()
    wanted = dict(source.named_parameters())
    same = {name: torch.equal(value, wanted[name]) for name, value in module.model.named_parameters()}
    assert same["embed.weight"]
    assert all(same.values()) == (noise == 0)
    assert ("noise of 0.01 of the standard deviation decides" in caplog.text) == (noise is None)
    assert bool(find_ties(module.model)) == (noise == 0)


@pytest.mark.parametrize("family", ["gpt2", "qwen3-moe"])
def test_transposed_and_fused_weights(family):
    pytest.importorskip("transformers", minversion="5")
    from tests.integrations.families import build

    model = build(family)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((weight * 100).round() / 100)
    with pytest.warns(UserWarning, match="call break_ties"):
        report = convert_linears(model, "2:4", include="*.experts.*" if family == "qwen3-moe" else "*.c_attn")
    assert set(break_ties(model)) == set(report.converted)
    assert not find_ties(model)


def test_conversion_by_the_callback(recwarn):
    for stage, changes in (("fit", True), ("validate", False)):
        module = ForeignModule()
        round_weights(module)
        before = module.state_dict()
        before = {name: value.clone() for name, value in before.items()}
        callback = TernarySparseConversion(pattern="2:4")
        trainer = quiet_trainer([callback], max_steps=0)
        callback.setup(trainer, module, stage)
        module.configure_model()
        assert bool(find_ties(module)) != changes
        assert any(not torch.equal(module.state_dict()[name], value) for name, value in before.items()) == changes
        assert any("call break_ties" in str(one.message) for one in recwarn) != changes
        recwarn.clear()
