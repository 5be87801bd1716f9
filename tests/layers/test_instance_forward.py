"""Modules whose ``forward`` is an entry of the instance: they are converted correctly, or refused by name."""

import copy
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.conversion import convert_linears, revert_linears
from sbn_lightning.layers.instance_forward import why_class_stays
from sbn_lightning.layers.masked_linear import MaskedLinear
from sbn_lightning.layers.matching import convert_to_match
from sbn_lightning.layers.options import is_hooked
from sbn_lightning.layers.packed import PackedTernaryLinear, pack_layers
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.layers.swiglu_fusion import FusedSwiGLU

DEVICES = {"gate": "cpu", "up": "cpu", "down": "cpu", "lm_head": "cpu"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(16, 32, bias=False), nn.Linear(16, 32, bias=False)
        self.down, self.lm_head = nn.Linear(32, 16, bias=False), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def net():
    torch.manual_seed(0)
    return Net()


def tokens():
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def converted(model):
    convert_linears(model, "2:4")
    return model


def dispatched(model, device_map=DEVICES, **options):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(model, device_map, main_device="cpu", force_hooks=True, **options)


def test_a_model_with_the_hooks_of_accelerate_becomes_sparse_and_keeps_the_hooks():
    expected = converted(net())
    model = converted(dispatched(net()))
    assert torch.equal(model(tokens()), expected(tokens()))
    assert all(hasattr(layer, "_hf_hook") for layer in (model.gate, model.up, model.down))
    calls = []
    model.up._hf_hook.pre_forward = lambda module, *args, **kwargs: (calls.append(module), (args, kwargs))[1]
    model(tokens())
    assert calls == [model.up]


def test_hooks_of_accelerate_are_taken_off_before_and_after_a_conversion():
    hooks = pytest.importorskip("accelerate.hooks")
    expected = converted(net())(tokens())
    model = dispatched(net())
    hooks.remove_hook_from_submodules(model)
    assert "forward" in vars(model.up)  # accelerate leaves the method of the class behind.
    assert torch.equal(converted(model)(tokens()), expected)
    model = converted(dispatched(net()))
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(tokens()), expected)
    assert torch.equal(converted(copy.deepcopy(dispatched(net())))(tokens()), expected)


@pytest.mark.parametrize("hooks_first", [True, False])
def test_a_model_with_the_hooks_of_accelerate_is_reverted(hooks_first):
    expected = converted(net())
    revert_linears(expected)
    model = converted(dispatched(net())) if hooks_first else dispatched(converted(net()))
    assert len(revert_linears(model)) == 3
    assert type(model.up) is nn.Linear
    assert type(model) is Net
    assert torch.equal(model(tokens()), expected(tokens()))
    assert hasattr(model.up, "_hf_hook")


def test_a_state_dict_is_matched_by_a_model_with_hooks():
    trained = converted(net())
    state = trained.state_dict()
    model = dispatched(net())
    assert convert_to_match(model, state) == ["gate", "up", "down"]
    model.load_state_dict(state)
    assert torch.equal(model(tokens()), trained(tokens()))


def test_offloaded_weights_are_refused_by_name_and_nothing_changes(tmp_path):
    offloaded = DEVICES | {"down": "disk"}
    model = dispatched(net(), offloaded, offload_dir=str(tmp_path))
    before = model(tokens())
    with pytest.raises(ConfigError, match=r"cannot be converted: down: its weights are offloaded .*or exclude them"):
        convert_linears(model, "2:4")
    assert not any(isinstance(layer, MaskedLinear) for layer in model.modules())
    assert torch.equal(model(tokens()), before)
    assert convert_linears(model, "2:4", exclude=("lm_head", "down")).converted == ["gate", "up"]
    with pytest.raises(ConfigError, match="a mask for down, which cannot have one: its weights are offloaded"):
        convert_to_match(dispatched(net(), offloaded, offload_dir=str(tmp_path)), converted(net()).state_dict())
    model = dispatched(converted(net()), offloaded, offload_dir=str(tmp_path))
    assert torch.equal(model(tokens()), converted(net())(tokens()))
    with pytest.raises(ConfigError, match="cannot be reverted: down: its weights are offloaded"):
        revert_linears(model)
    assert isinstance(model.up, SparseBitLinear)


def test_a_forward_of_somebody_else_is_refused_by_name_and_nothing_changes():
    model = net()
    own = model.up.forward
    model.up.forward = lambda x: 2 * own(x)
    before = model(tokens())
    with pytest.raises(ConfigError, match=r"cannot be converted: up: somebody replaced its forward"):
        convert_linears(model, "2:4")
    assert torch.equal(model(tokens()), before)
    assert convert_linears(model, "2:4", exclude=("lm_head", "up")).converted == ["gate", "down"]

    model = converted(net())
    model.up.forward = lambda x: 2 * F.linear(x, model.up.weight)
    with pytest.raises(ConfigError, match=r"cannot be reverted: up: somebody replaced its forward"):
        revert_linears(model)
    assert isinstance(model.down, SparseBitLinear)


@pytest.mark.parametrize("patch", ["of liger", "of anybody"])
def test_a_fused_swiglu_whose_forward_was_replaced_is_reverted(patch):
    # Trainer(use_liger_kernel=True) binds a forward to each MLP of a converted model.
    expected = converted(net())
    revert_linears(expected)
    model = nn.Sequential(converted(net()))
    assert isinstance(model[0], FusedSwiGLU)
    own = model[0].forward
    bound = MethodType(lambda self, x: Net.forward(self, x), model[0])
    model[0].forward = bound if patch == "of liger" else lambda x: own(x)
    assert len(revert_linears(model)) == 3
    assert torch.equal(model(tokens()), expected(tokens()))
    del model[0].forward
    assert torch.equal(model(tokens()), expected(tokens()))
    again = copy.deepcopy(model)
    convert_linears(again, "2:4")
    assert torch.equal(again(tokens()), converted(expected)(tokens()))


def test_a_patch_above_or_below_the_hooks_of_accelerate_is_refused():
    model = net()
    model.up.forward = lambda x: x
    assert why_class_stays(dispatched(model).up) is not None
    model = dispatched(net())
    model.up.forward = lambda x: x
    assert why_class_stays(model.up) is not None
    assert why_class_stays(model.down) is None


def test_layers_with_a_forward_in_the_instance_are_called():
    # A product of several layers at once would not call the wrapper.
    assert not is_hooked(nn.Linear(4, 4))
    assert is_hooked(dispatched(net()).up)


def test_experts_with_the_hooks_of_accelerate(monkeypatch):
    pytest.importorskip("transformers", minversion="5")
    hooks = pytest.importorskip("accelerate.hooks")
    from tests.integrations.families import build

    ids = torch.arange(3, 15)[None]
    plain, model = build("mixtral").eval(), build("mixtral").eval()
    for module in model.modules():
        if type(module).__name__ == "MixtralExperts":
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu", io_same_device=True))
    assert len(convert_linears(model, "2:4").converted) == len(convert_linears(plain, "2:4").converted)
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert revert_linears(model) == revert_linears(plain)
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    block = next(module for module in model.modules() if type(module).__name__ == "MixtralExperts")
    block.forward = lambda *args: args[0]
    with pytest.raises(ConfigError, match=r"mlp.experts: somebody replaced its forward"):
        convert_linears(model, "2:4")


def test_packing_keeps_the_hooks_of_accelerate_and_refuses_what_it_would_lose(tmp_path):
    model = dispatched(converted(net()))
    expected = model(tokens())
    pack_layers(model)
    assert isinstance(model.up, PackedTernaryLinear)
    calls = []
    model.up._hf_hook.pre_forward = lambda module, *args, **kwargs: (calls.append(module), (args, kwargs))[1]
    assert torch.equal(model(tokens()), expected)
    assert calls == [model.up]

    model = converted(net())
    model.up.forward = lambda x: x
    with pytest.raises(ConfigError, match="up cannot be packed: somebody replaced its forward"):
        pack_layers(model)
    assert isinstance(model.gate, SparseBitLinear)
    model = dispatched(converted(net()), DEVICES | {"down": "disk"}, offload_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="down cannot be packed: its weights are offloaded"):
        pack_layers(model)
