"""How long a loaded or copied mask is kept."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from sbn_lightning.layers.sparse_linear import SparseBitLinear, SparseLinear
from sbn_lightning.sparsity.pattern import top_n_mask, unpack_mask


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("kind", [SparseBitLinear, SparseLinear])
def test_copies_have_the_mask_of_a_checkpoint_and_then_their_own(kind, duplicate):
    layer, other = (kind(16, 8, pattern="2:4") for _ in range(2))
    state = layer.state_dict() | {"mask_bits": other.state_dict()["mask_bits"]}  # the mask is older than the weights
    layer.load_state_dict(state)
    layer(torch.randn(2, 16))
    twin = duplicate(layer)
    assert torch.equal(twin.mask_bits, state["mask_bits"])
    assert torch.equal(twin.mask, other.mask)
    assert torch.equal(twin.effective_weight(), layer.effective_weight())
    with torch.no_grad():
        twin.weight.mul_(-torch.rand(8, 16))
    twin.refresh_mask()
    assert torch.equal(twin.mask, top_n_mask(twin.weight, twin.pattern))
    assert torch.equal(layer.mask, other.mask)


@pytest.fixture
def with_a_mask_of_its_own():
    """A layer with a loaded mask that differs from the mask its weights would give."""
    layer, other = (SparseBitLinear(16, 8, pattern="2:4") for _ in range(2))
    layer.load_state_dict(layer.state_dict() | {"mask_bits": other.state_dict()["mask_bits"]})
    assert not torch.equal(layer.mask, top_n_mask(layer.weight, layer.pattern))
    return layer, other.mask


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_loaded_mask_stays_while_other_models_train(with_a_mask_of_its_own, grad, compiled):
    """A teacher keeps its mask while the student trains, frozen or not."""
    layer, mask = with_a_mask_of_its_own
    forward = torch.compile(layer, backend="aot_eager") if compiled else layer
    student, x = nn.Linear(16, 8), torch.randn(4, 16)
    optimizer = torch.optim.AdamW(student.parameters(), fused=True)
    expected = forward(x)
    for frozen in (False, True):
        layer.requires_grad_(not frozen)
        with torch.set_grad_enabled(grad):
            target = forward(x)
        (student(x) - target.detach()).square().sum().backward()
        optimizer.step()
        assert torch.equal(forward(x), expected)
    assert torch.equal(layer.mask, mask)
    assert torch.equal(layer.state_dict()["mask_bits"], layer.mask_bits)


@pytest.mark.parametrize("duplicate", [lambda layer: layer, copy.deepcopy])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_loaded_mask_follows_the_weights_once_they_train(with_a_mask_of_its_own, duplicate, compiled):
    layer, mask = with_a_mask_of_its_own
    layer = duplicate(layer)
    forward = torch.compile(layer, backend="aot_eager") if compiled else layer
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    for _ in range(2):
        forward(torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            assert torch.equal(unpack_mask(layer.state_dict()["mask_bits"], 16), layer.mask)
            assert torch.equal(layer.mask, top_n_mask(layer.weight, layer.pattern))
            torch.testing.assert_close(forward(torch.eye(16)), layer(torch.eye(16)))
    assert not torch.equal(layer.mask, mask)


def test_a_loaded_mask_follows_weights_that_are_set(with_a_mask_of_its_own):
    layer, _ = with_a_mask_of_its_own
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 16))
    assert torch.equal(layer.mask, top_n_mask(layer.weight, layer.pattern))


def test_a_loaded_mask_under_fsdp2(with_a_mask_of_its_own, tmp_path):
    """Under FSDP2 a forward sees another parameter object than the one that was loaded."""
    layer, mask = with_a_mask_of_its_own
    expected, state = layer(torch.eye(16)), {f"0.{name}": value for name, value in layer.state_dict().items()}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = fully_shard(nn.Sequential(SparseBitLinear(16, 8, pattern="2:4")))
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(model(torch.eye(16)), expected)
            assert torch.equal(model[0].mask, mask)
        model(torch.eye(16)).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            assert not torch.equal(model(torch.eye(16)), expected)
        assert torch.equal(model[0].mask, top_n_mask(model[0].latent(), layer.pattern))
    finally:
        dist.destroy_process_group()
