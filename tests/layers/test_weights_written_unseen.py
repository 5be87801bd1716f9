"""Derived values follow a weight however it is changed, also by code that hides the change from autograd."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers import mask_tracker
from sbn_lightning.layers.conversion import convert_linears
from sbn_lightning.layers.mask_tracker import fingerprint
from sbn_lightning.layers.masked_linear import prepare_layers, weights_stay
from sbn_lightning.layers.sparse_linear import SparseBitLinear, SparseLinear
from sbn_lightning.sparsity.pattern import top_n_mask

KINDS = [SparseBitLinear, SparseLinear]


def fresh(layer):
    """A new layer with the same weight, which therefore has seen nothing."""
    other = type(layer)(layer.in_features, layer.out_features, sparsity=layer.sparsity, dtype=layer.weight.dtype)
    other.load_state_dict({name: value for name, value in layer.state_dict().items() if name != "mask_bits"})
    return other


def assert_follows(layer, x):
    assert torch.equal(layer(x), fresh(layer)(x))
    assert torch.equal(layer.mask, top_n_mask(layer.weight, layer.pattern))


def by_data(weight):
    weight.data.mul_(0.5).add_(torch.randn_like(weight))


def by_one_element(weight):
    weight.data[3, 5] = 7.0


def by_replacing(weight):
    weight.data = torch.randn_like(weight)


def by_vector(weight):
    vector_to_parameters(torch.randn_like(parameters_to_vector([weight])), [weight])


def by_initialisation(weight):
    nn.init.xavier_normal_(weight.data)


def by_swapping_rows(weight):
    weight.data.copy_(weight.data.flip(0))


def by_moving_columns(weight):
    weight.data.copy_(weight.data.roll(4, -1))


def by_numpy(weight):
    weight.detach().numpy()[:] = torch.randn_like(weight).numpy()


def by_the_other_sign(weight):
    weight.data.neg_()


WRITES = [
    by_data,
    by_one_element,
    by_replacing,
    by_vector,
    by_initialisation,
    by_swapping_rows,
    by_moving_columns,
    by_numpy,
    by_the_other_sign,
]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("make", KINDS)
def test_a_write_is_seen(make, grad, write):
    torch.manual_seed(0)
    layer, x = make(16, 8, pattern="2:4"), torch.randn(3, 16)
    with torch.set_grad_enabled(grad):
        before = layer(x)
        write(layer.weight)
        after = layer(x)
        assert not torch.equal(before, after)
        assert_follows(layer, x)


@pytest.mark.parametrize("make", KINDS)
def test_an_average_that_is_swapped_in_for_evaluation(make):
    """As diffusers and torch_ema do: store, copy into ``.data``, evaluate, restore, train on."""
    torch.manual_seed(0)
    layer, x = make(16, 8, pattern="2:4"), torch.randn(3, 16)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    average = layer.weight.detach().clone()
    for _ in range(3):
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.lerp_(layer.weight.detach(), 0.3)
    trained = layer(x)
    stored = layer.weight.detach().clone()
    layer.weight.data.copy_(average)
    with torch.no_grad():
        assert_follows(layer, x)
        assert not torch.equal(layer(x), trained)
    layer.weight.data.copy_(stored)
    assert torch.equal(layer(x), trained)


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("make", KINDS)
def test_a_momentum_teacher(make, compiled, loaded):
    """As DINO and MoCo have it: the teacher is no optimiser's, and its ``.data`` follows the student."""
    torch.manual_seed(0)
    student = make(16, 8, pattern="2:4")
    teacher = copy.deepcopy(student).requires_grad_(False)
    if loaded:
        teacher.load_state_dict(student.state_dict())
    forward = torch.compile(teacher, backend="aot_eager", fullgraph=True) if compiled else teacher
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    x = torch.randn(4, 16)
    for _ in range(3):
        with torch.no_grad():
            target = forward(x)
        torch.testing.assert_close(target, fresh(teacher)(x))
        (student(x) - target - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
            theirs.data.mul_(0.2).add_(ours.detach().data, alpha=0.8)
    with torch.no_grad():
        torch.testing.assert_close(forward(x), fresh(teacher)(x))
    assert torch.equal(teacher.mask, top_n_mask(teacher.weight, teacher.pattern))


@pytest.mark.parametrize("make", KINDS)
def test_a_hand_written_optimiser_trains(make):
    torch.manual_seed(0)
    layer, x = make(16, 8, pattern="2:4"), torch.randn(32, 16)
    target = torch.randn(32, 8)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        for parameter in layer.parameters():
            parameter.data -= 0.3 * parameter.grad.data
            parameter.grad = None
        assert_follows(layer, x)
    assert losses[-1] < 0.95 * losses[0]
    assert len(set(losses)) > 20


def test_a_converted_model_whose_weights_are_drawn_afterwards():
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)), torch.randn(3, 16)
    convert_linears(model, "2:4")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.02)
    model(x).sum().backward()
    for layer in (model[0], model[2]):
        assert_follows(layer, x)


def test_a_held_mask_stays_and_the_codes_follow():
    layer, x = SparseBitLinear(16, 8, pattern="2:4"), torch.randn(3, 16)
    layer.hold_mask, mask = True, layer.mask
    layer(x)
    layer.weight.data.neg_()
    codes = layer.ternary()[0]
    layer.refresh_mask()
    assert torch.equal(codes != 0, layer.ternary()[0] != 0)
    assert torch.equal(layer.mask, mask)
    layer.weight.data.copy_(torch.randn(8, 16))
    assert torch.equal(layer.mask, mask)
    assert not (layer.ternary()[0] != 0)[~mask].any()


def test_a_loaded_mask_goes_with_its_weight_to_another_dtype():
    layer, other = (SparseBitLinear(16, 8, pattern="2:4") for _ in range(2))
    layer.load_state_dict(layer.state_dict() | {"mask_bits": other.state_dict()["mask_bits"]})
    layer.double()
    layer(torch.randn(3, 16).double())
    assert torch.equal(layer.mask, other.mask)
    layer.weight.data.normal_()
    layer.float()  # the move must not hide the change
    assert torch.equal(layer.mask, top_n_mask(layer.weight, layer.pattern))


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        layer, x = SparseBitLinear(16, 8, pattern="2:4"), torch.randn(3, 16)
        before = layer(x)
        layer.weight.mul_(torch.randn(8, 16))
        assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 8), (4, 6), (3, 5), (1, 1)])
def test_every_bit_and_the_order_of_rows_and_columns_show_in_the_fingerprint(dtype, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    before = fingerprint(weight)
    for i in range(weight.numel()):
        other = weight.clone()
        other.view(-1)[i] += 0.01
        assert not torch.equal(fingerprint(other), before)
    if shape[0] > 1:
        assert not torch.equal(fingerprint(weight.flip(0)), before)
    for places in range(1, shape[1]):
        assert not torch.equal(fingerprint(weight.roll(places, -1)), before)
    assert torch.equal(fingerprint(weight.t().contiguous().t()), before)
    assert torch.equal(fingerprint(torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(shape)), before)


class Elsewhere(torch.Tensor):
    """A weight that says it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda")


@pytest.fixture
def elsewhere(monkeypatch):
    """Make trackers believe that weights are on a GPU; the lists count the comparisons and the fingerprints."""
    monkeypatch.setattr(mask_tracker._steps, "sharded", False)  # another test of this process may have sharded weights
    compared, taken = [], []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda *tensors: compared.append(1) or equal(*tensors))
    monkeypatch.setattr(mask_tracker, "fingerprint", lambda weight: taken.append(1) or fingerprint(weight))
    monkeypatch.setattr(mask_tracker, "_is_capturing", lambda weight: False)
    monkeypatch.setattr(mask_tracker.MaskTracker, "expected", lambda self, weight: self.fingerprint)
    return compared, taken


def test_a_gpu_waits_for_no_fingerprint_in_training(elsewhere):
    """Where comparing would make the host wait, weights of an optimiser are trusted from one step to the next."""
    compared, taken = elsewhere
    weight = torch.randn(4, 8).as_subclass(Elsewhere).requires_grad_()
    tracker = mask_tracker.MaskTracker()
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def look(**mode):
        compared.clear()
        changes = tracker.look(weight, mode.get("training", True))
        return changes, len(compared)

    def step():
        weight.grad = torch.ones(4, 8)
        optimizer.step()
        taken.clear()

    assert look() == (1, 0)
    assert look() == (1, 1)  # no optimiser has it yet
    step()
    assert look() == (2, 0)
    assert look() == (2, 0)
    assert not taken  # no training step reads the weight for a fingerprint
    with torch.no_grad():
        assert look() == (3, 0)  # there is none to compare with, so this counts as a change
        assert look() == (3, 1)
        weight.data.mul_(0.5)
        assert look() == (4, 1)
    assert look() == (4, 1)  # back from an evaluation, which may have swapped weights
    assert look() == (4, 0)
    compared.clear()
    tracker.weight_is_new(weight, True)
    assert not compared
    assert look() == (5, 0)
    assert look(training=False) == (6, 0)
    assert look(training=False) == (6, 0)
    with mask_tracker.trust_weights():
        assert look() == (6, 0)
    step()
    assert look() == (7, 0)
    tracker.mask_is_loaded(weight, True, (2, 1.0))
    assert torch.equal(tracker.fingerprint, fingerprint(weight))  # a compiled graph reads it


@pytest.mark.parametrize("owner", [True, False])
@pytest.mark.parametrize("make", KINDS)
def test_micro_batches_on_a_gpu_take_and_compare_no_fingerprint(make, owner, elsewhere, monkeypatch):
    """Codes are made without gradients, in training as well: the mode of the caller decides, not that of the layer."""
    compared, taken = elsewhere
    monkeypatch.setattr(
        mask_tracker,
        "_is_unwatched",
        lambda weight: torch.is_grad_enabled() and (weight in mask_tracker._owned or mask_tracker._steps.sharded),
    )
    layer, x = make(16, 8, pattern="2:4"), torch.randn(3, 16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(3):
        for _ in range(3):
            if owner:  # as a compiled transformer does before its blocks
                prepare_layers(layer)
            layer(x).square().sum().backward()
            if step == 0:
                continue
            assert not taken
            assert not compared
        optimizer.step()
        optimizer.zero_grad()
        taken.clear()
        compared.clear()
    assert_follows(layer, x)


def test_a_refresh_compares_nothing_and_leaves_the_next_forward_nothing_to_compare(monkeypatch):
    """A callback refreshes masks between two steps; the forward after that must find the mode of the refresh."""
    layer, compared = SparseBitLinear(16, 8, pattern="2:4"), []
    layer.weight.data.normal_()
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda *tensors: compared.append(1) or equal(*tensors))
    layer.refresh_mask()
    assert not compared
    monkeypatch.undo()
    assert layer.tracker._circumstances == mask_tracker._circumstances(layer.weight, layer.training)
    assert_follows(layer, torch.randn(3, 16))


def test_a_model_is_looked_at_once_in_a_block(monkeypatch):
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(3, 16)
    convert_linears(model, "2:4")
    model[1].weight.data.normal_()
    looks = []
    monkeypatch.setattr(mask_tracker, "fingerprint", lambda weight: looks.append(1) or fingerprint(weight))
    with torch.no_grad(), weights_stay(model):
        assert len(looks) == 3  # one a layer, and that of the new weight
        y = model(x)
        model(x)
        assert len(looks) == 3
    assert_follows(model[1], x)
    assert torch.equal(model(x), y)


def test_a_captured_graph_computes_its_own_codes(monkeypatch):
    layer, x, made = SparseBitLinear(16, 8, pattern="2:4"), torch.randn(3, 16), []
    prepare = layer.backend.prepare
    monkeypatch.setattr(type(layer.backend), "prepare", lambda self, *given: made.append(1) or prepare(*given))
    layer(x)
    monkeypatch.setattr(mask_tracker, "_is_capturing", lambda weight: True)
    with weights_stay(layer):
        layer(x)
    assert len(made) == 1
    layer(x)
    assert len(made) == 2
    monkeypatch.setattr(mask_tracker, "_is_capturing", lambda weight: False)
    layer(x)
    assert len(made) == 3  # what the graph made changes with every replay


@pytest.mark.parametrize("make", KINDS)
def test_a_functional_call_uses_the_weight_it_is_given_and_transforms_are_refused(make):
    torch.manual_seed(0)
    layer, x = make(16, 8, pattern="2:4"), torch.randn(3, 16)
    before, given = layer(x), {"weight": torch.randn(8, 16), "bias": torch.randn(8)}
    other = make(16, 8, pattern="2:4")
    other.load_state_dict(given)
    assert torch.equal(torch.func.functional_call(layer, given, (x,)), other(x))
    assert torch.equal(layer(x), before)
    with pytest.raises(ConfigError, match=r"torch\.func\.grad and vmap do not work on layers with a mask"):
        torch.func.grad(lambda weights: torch.func.functional_call(layer, weights, (x,)).sum())(given)
    assert torch.equal(layer(x), before)
