"""Plain PyTorch: one call chooses the kernels, and any converted model can be saved to a folder."""

import copy
import json
from importlib.util import find_spec
from inspect import signature

import pytest
import torch
from torch import nn

from sbn_lightning.backends.selection import Choice
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.formats import load_model
from sbn_lightning.integrations import load_sparse, pytorch, revert, save_sparse, use_kernels
from sbn_lightning.integrations.folder import conversion_options, describe
from sbn_lightning.integrations.pytorch import convert, convert_by_name
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.layers.sparse_linear import SparseLinear
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.training.distillation import Distillation, Distiller
from tests.helpers import imported


class Net(nn.Module):
    """A model with all that a folder must hold: a tied embedding, a buffer, a bias, a fused layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 32)
        self.qkv = nn.Linear(32, 48, bias=True)
        self.up = nn.Linear(48, 32, bias=False)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.norm(self.up(self.qkv(self.embed(tokens)).relu())))


def net(kind="ternary"):
    model = Net()
    options = {"pattern": "2:4", "kind": kind} | ({"split_sizes": (16, 16, 16)} if kind == "ternary" else {})
    convert_by_name(model, {"qkv": options, "up": {"pattern": "2:4", "kind": kind}})
    return model


TOKENS = torch.arange(12)


@pytest.mark.parametrize("form", ["packed", "latent"])
def test_a_folder_gives_the_same_outputs(tmp_path, form):
    model = net().eval()
    save_sparse(model, tmp_path / "saved", form)
    again = Net().eval()
    torch.nn.init.zeros_(again.up.weight)
    assert load_sparse(again, tmp_path / "saved") == ["qkv", "up"]
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert type(again.qkv) is (PackedTernaryLinear if form == "packed" else SparseBitLinear)
    assert again.qkv.split_sizes == (16, 16, 16)
    assert again.head.weight is again.embed.weight
    save_sparse(again, tmp_path / "twice", form)
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (
        tmp_path / "saved" / "model.safetensors"
    ).read_bytes()


def test_a_latent_folder_trains_on_as_the_model_itself(tmp_path):
    model = net()
    save_sparse(model, tmp_path / "saved", "latent")
    again = Net()
    load_sparse(again, tmp_path / "saved")
    for one in (model, again):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            one(TOKENS).square().mean().backward()
            optimizer.step()
    for (name, ours), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(again.qkv.mask, model.qkv.mask)


def test_sparse_layers_that_are_not_ternary(tmp_path):
    model = net("masked").eval()
    with pytest.raises(ConfigError, match=r"qkv is sparse, but not ternary.*form='latent'"):
        save_sparse(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    save_sparse(model, tmp_path / "saved", "latent")
    again = Net().eval()
    load_sparse(again, tmp_path / "saved")
    assert isinstance(again.up, SparseLinear)
    assert torch.equal(again(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model, "up", nn.Linear(48, 64, bias=False)), "up is 48 -> 32 in .*, 48 -> 64"),
        (lambda model: setattr(model, "up", nn.ReLU()), "the layer up, which is a ReLU in the model"),
        (lambda model: delattr(model, "up"), "has the layer up, Net has not"),
        (lambda model: setattr(model, "more", nn.Linear(2, 2)), "lacks 2 tensors of the model, the first is more.bias"),
        (lambda model: setattr(model, "norm", nn.Identity()), "5 tensors that the model lacks"),
    ],
)
def test_a_model_that_does_not_fit_stays_as_it_is(tmp_path, change, message):
    save_sparse(net(), tmp_path / "saved")
    again = Net()
    change(again)
    before = copy.deepcopy(again.state_dict())
    with pytest.raises(ConfigError, match=message):
        load_sparse(again, tmp_path / "saved")
    assert type(again.qkv) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


def test_a_damaged_folder_is_refused(tmp_path):
    save_sparse(net(), tmp_path / "saved")
    weights, manifest = tmp_path / "saved" / "model.safetensors", tmp_path / "saved" / "config.json"
    whole = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(whole) | {"form": "latent"}))
    with pytest.raises(DataError, match=r"config.json was changed or is damaged"):
        load_sparse(Net(), tmp_path / "saved")
    manifest.write_text(whole)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"model.safetensors was changed or cut short"):
        load_sparse(Net(), tmp_path / "saved")
    weights.unlink()
    with pytest.raises(DataError, match=r"model.safetensors is missing"):
        load_sparse(Net(), tmp_path / "saved")
    with pytest.raises(ConfigError, match="is there already"):
        save_sparse(net(), tmp_path / "saved")


def test_kernels_by_one_call_and_back():
    model = net()
    assert "reference" in use_kernels(model)
    with pytest.raises(ConfigError, match='backend "sparse" cannot run on the CPU'):
        use_kernels(model, backend="sparse")
    mixed = nn.Sequential(net(), PackedTernaryLinear(torch.ones(4, 8, dtype=torch.int8), torch.ones(1), pattern="8:8"))
    with pytest.raises(ConfigError, match="sparse"):
        use_kernels(mixed, backend="sparse")
    assert mixed[1].backend == "auto"  # A refused choice leaves every layer as it was.
    with pytest.raises(ConfigError, match="call convert"):
        use_kernels(Net())
    for options, message in (
        ({"backend": "reference", "gradients": "int8-dx"}, 'gradients="int8-dx" needs integer tensor cores'),
        ({"backend": "reference", "saved_gates": "int8"}, 'saved_gates="int8" needs integer tensor cores'),
        ({"gradients": "fp8"}, "gradients='fp8' is not one of bf16, int8, int8-dx, int8-dw"),
        ({"tokens": 0}, "tokens=0 must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            use_kernels(model, **options)
    effective = model.qkv.effective_weight()
    assert revert(model) == ["qkv", "up"]
    assert type(model.qkv) is nn.Linear
    assert torch.equal(model.qkv.weight, effective)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_a_gpu_that_is_not_there_is_one_line_with_the_way_out(device, tmp_path):
    model = nn.Sequential(nn.Linear(16, 16))
    convert(model, "2:4")
    reason = r"cannot be used here \(torch sees no GPU here\)"
    way_out = "leave device out: on a CPU every layer runs on the reference$"
    with pytest.raises(ConfigError, match=f"use_kernels: device '{device}' {reason}; {way_out}"):
        use_kernels(model, device)
    assert "reference" in use_kernels(model)
    with pytest.raises(ConfigError, match=f"load_model: device '{device}' {reason}; "):
        load_model(tmp_path, device=device)
    with pytest.raises(ConfigError, match=f"Distiller: device '{device}' {reason}; "):
        Distiller(Distillation(teacher=str(tmp_path)), device=device)


@pytest.mark.parametrize("device", ["meta", "gpu"])
def test_a_device_that_holds_no_values_leaves_the_model_where_it_is(device):
    model = nn.Sequential(nn.Linear(16, 16))
    convert(model, "2:4")
    with pytest.raises(ConfigError, match=f"use_kernels: device '{device}' cannot be used here"):
        use_kernels(model, device)
    assert model[0].weight.device.type == "cpu"


def test_kernels_get_the_modes_of_the_precision_plugin(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(pytorch, "choose", lambda layers, *rest: dict.fromkeys(layers, Choice("int8", "portable", "")))
    model = net()
    use_kernels(model, gradients="int8-dx", saved_gates="int8", join_layers=False)
    backend = model.qkv.backend
    assert (backend.gradients, backend.saved_gates, backend.joins) == ("int8-dx", True, False)
    assert model._forward_pre_hooks  # Rounding needs a seed for each pass.
    use_kernels(model)
    assert not model._forward_pre_hooks


def test_convert_is_public_and_survives_the_import_of_its_old_module():
    code = """
import warnings; warnings.simplefilter("ignore")
import sbn_lightning.convert
from sbn_lightning import convert
from torch import nn
model = nn.Sequential(nn.Linear(8, 8))
print(convert(model, "2:4").converted)
"""
    found, printed = imported(code, ["lightning", "litdata"])
    assert found == []
    assert printed.strip() == "['0']"


def test_every_way_in_has_one_default_pattern():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    convert(model)
    default = SparsityConfig().pattern
    assert model[0].pattern == default
    if find_spec("transformers"):
        from sbn_lightning.integrations.huggingface import CausalLM, SBNConfig

        assert SBNConfig().pattern == signature(CausalLM).parameters["pattern"].default == str(default)
    if find_spec("torchao"):
        from sbn_lightning.integrations.torchao import TernarySparseConfig

        assert TernarySparseConfig().pattern == str(default)


@pytest.mark.parametrize("make", [SparseBitLinear, SparseLinear])
def test_a_folder_records_every_option_of_a_layer(make):
    changed = {"mask_source": "ternary", "gradient": "masked", "gamma_over": "kept", "activation_bits": 4}
    layer = make(16, 8, pattern="2:4", split_sizes=(4, 4), **changed)
    recorded = json.loads(json.dumps(describe(layer)))
    assert SparsityConfig(**conversion_options(recorded)) == layer.sparsity
