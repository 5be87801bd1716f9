"""Equal weights at the edge of a mask are found, and a little noise decides between them."""

import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from sbn_lightning import NMPattern, SparseBitNet, TernarySparseConversion, break_ties, convert_linears
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers import ties
from sbn_lightning.layers.masked_linear import masked_layers
from sbn_lightning.layers.ties import find_ties, tied_groups
from tests.formats.models import make_model, save
from tests.helpers import ForeignModule, quiet_trainer, regression_loader, small_config, token_loader


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


def rounded(*sizes, pattern="2:4", **options):
    """Masked layers with rounded weights."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, height) for height, width in sizes))
    round_weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert_linears(model, pattern, **options)
    return model


def test_the_noise_is_the_same_where_other_devices_and_dtypes_are_the_default(monkeypatch):
    """A Trainer configures a model in such a context: on the GPU, and in bfloat16 with ``precision="bf16-true"``."""
    usual, other = rounded((64, 64)), rounded((64, 64))
    break_ties(usual)
    torch.set_default_dtype(torch.bfloat16)
    monkeypatch.setattr(ties, "_AT_ONCE", 640)  # Ten rows at a time.
    try:
        with torch.device("meta"):
            assert list(break_ties(other)) == ["0"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(other[0].weight, usual[0].weight)


def test_masks_that_noise_does_not_decide():
    model = rounded((64, 64), (64, 64))
    model[1].requires_grad_(False)  # A teacher, for example.
    assert list(find_ties(model)) == list(break_ties(model)) == ["0"]
    assert not find_ties(rounded((64, 64), mask_source="ternary"))


@pytest.mark.parametrize("pattern", ["1:4", "6:8", "4:8", "2:8", "8:16", "4:16"])
def test_weights_in_bfloat16_have_too_few_ties_at_each_size_of_a_group(pattern):
    torch.manual_seed(0)
    weight = torch.randn(256, 2048)
    few = weight.bfloat16().float()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2048, 256))
    model[0].weight = nn.Parameter(few)
    convert_linears(model, pattern)
    assert tied_groups(few, NMPattern.parse(pattern)) > 0.003
    assert not find_ties(model)
    step = weight.abs().max() / 8
    model[0].weight.data = (weight / step).round() * step
    assert list(find_ties(model)) == ["0"]


def test_sharded_weights_get_the_same_noise(tmp_path):
    model, whole = rounded((64, 32), (32, 64)), rounded((64, 32), (32, 64))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model:
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        assert break_ties(model) == find_ties(whole)
        assert not find_ties(model)
        break_ties(whole)
        for layer, other in zip(model, whole, strict=True):
            assert torch.equal(layer.weight.full_tensor(), other.weight)
    finally:
        dist.destroy_process_group()


def run_of(module, how, callbacks=()):
    """Let a Trainer validate a module, or train it at the learning rate 0; return what is in its parameters."""
    trainer = quiet_trainer(callbacks, max_steps=1)
    tokens = isinstance(module, SparseBitNet)
    data = token_loader(vocab_size=module.config.vocab_size) if tokens else regression_loader()
    trainer.validate(module, data, verbose=False) if how == "validate" else trainer.fit(module, data)
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def layers_that_differ(one, other):
    return {name for name, value in one.items() if not torch.equal(value, other[name])}


@pytest.mark.parametrize("noise", [None, 0.0])
@pytest.mark.parametrize("first", ["validate", "fit"])
def test_a_run_from_rounded_weights(tmp_path, noise, first, caplog):
    source = make_model(linear="dense")
    round_weights(source)
    given = {} if noise is None else {"break_ties": noise}
    path = str(save(source, tmp_path / "dense.ckpt"))
    stays = partial(torch.optim.SGD, lr=0.0)
    module = SparseBitNet(small_config(pattern="2:4"), stays, init_from=path, **given)
    wanted = {f"model.{name}": value for name, value in source.named_parameters()}
    told = "noise of 0.01 of the standard deviation decides"
    with caplog.at_level("INFO"):
        if first == "validate":
            assert not layers_that_differ(run_of(module, "validate"), wanted)
            assert told not in caplog.text
        trained = run_of(module, "fit")
    differing = layers_that_differ(trained, wanted)
    masked = {f"model.{name}.weight" for name, _ in masked_layers(module.model)}
    assert differing == (masked if noise is None else set())
    assert (told in caplog.text) == (noise is None)
    assert bool(find_ties(module.model)) == (noise == 0)
    round_weights(module.model)
    rounded_again = dict(module.named_parameters())
    assert not layers_that_differ(run_of(module, "fit"), rounded_again)  # A training that goes on is no first one.


def test_a_network_of_transformers_from_a_folder(tmp_path, recwarn):
    pytest.importorskip("transformers", minversion="5")
    from sbn_lightning.integrations.huggingface.causal_lm import CausalLM
    from tests.integrations.families import build

    network = build("llama")
    round_weights(network)
    network.save_pretrained(tmp_path)
    module = CausalLM(str(tmp_path), pattern="2:4", optimizer=partial(torch.optim.SGD, lr=0.0))
    wanted = {f"model.hf.{name}": value for name, value in network.named_parameters()}
    assert not layers_that_differ(run_of(module, "validate"), wanted)
    masked = {f"model.{name}.weight" for name, _ in masked_layers(module.model)}
    assert layers_that_differ(run_of(module, "fit"), wanted) == masked
    assert not any("break_ties" in str(one.message) for one in recwarn)  # The module sees to them.


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


@pytest.mark.parametrize("stages", [("fit",), ("validate", "fit")])
def test_conversion_by_the_callback(stages, recwarn):
    class Module(ForeignModule):
        def validation_step(self, batch, batch_idx):
            self.training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Module()
    round_weights(module)
    given = {name: value.detach().clone() for name, value in module.named_parameters()}
    callbacks = [TernarySparseConversion(pattern="2:4")]
    for stage in stages:
        found = run_of(module, stage, callbacks)
        assert layers_that_differ(found, given) == ({"net.0.weight", "net.2.weight"} if stage == "fit" else set())
    assert not find_ties(module)
    assert not any("break_ties" in str(one.message) for one in recwarn)  # The callback sees to them.
