"""The recorded preparation of weights, as far as a CPU goes: a recording that runs its function again in a replay."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sbn_lightning.backends.base import Keep, TernaryWeight
from sbn_lightning.backends.reference import ReferenceBackend
from sbn_lightning.layers import preparation
from sbn_lightning.layers.sparse_linear import SparseBitLinear, prepare_layers
from sbn_lightning.sparsity.config import SparsityConfig


class InPlace(ReferenceBackend):
    """Writes to the same tensors each time, as a replay does."""

    records = True
    own: TernaryWeight | None = None

    def prepare(
        self, latent: torch.Tensor, mask_bits: torch.Tensor | None, keep: Keep, sparsity: SparsityConfig
    ) -> TernaryWeight:
        made = super().prepare(latent, mask_bits, keep, sparsity)
        if self.own is None:
            self.own = TernaryWeight(*(tensor.clone() for tensor in made))
        for tensor, value in zip(self.own, made, strict=True):
            tensor.copy_(value)
        return self.own


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls = []

    def record(function, pool):  # type: ignore[no-untyped-def]
        calls.append("recorded")
        function()

        def replay() -> None:
            calls.append("replayed")
            function()

        return replay

    monkeypatch.setattr(preparation, "record", record)
    monkeypatch.setattr(preparation, "can_record", lambda layer: getattr(layer.backend, "records", False))
    return calls


def model_of(recordable: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(SparseBitLinear(16, 24, pattern="2:4"), nn.ReLU(), SparseBitLinear(24, 8, pattern="2:4"))
    for layer in model:
        if recordable and isinstance(layer, SparseBitLinear):
            layer.backend = InPlace()
    return model


def train(model: nn.Module, steps: int, hold_from: int = 99, interval: int = 1) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    x, losses = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)), []
    for step in range(steps):
        for layer in model:
            if isinstance(layer, SparseBitLinear):
                layer.hold_mask = step >= hold_from or step % interval > 0
        for part in x.chunk(2):  # The second micro-batch prepares nothing.
            prepare_layers(model)
            loss = model(part).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("hold_from", [99, 4])
def test_replays_train_like_launches(recorded: list[str], hold_from: int) -> None:
    plain, model = model_of(False), model_of(True)
    assert train(model, 8, hold_from) == train(plain, 8, hold_from)
    for (name, value), other in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    # One preparation without a recording for each state. In the first step, and when it is held, a mask is there.
    assert recorded.count("recorded") == (1 if hold_from == 99 else 2)
    assert recorded.count("replayed") == (6 if hold_from == 99 else 2 + 3)


@pytest.mark.parametrize(("interval", "recordings"), [(2, 2), (3, 2), (5, 1)])
def test_masks_that_are_held_for_some_steps_have_two_recordings(
    recorded: list[str], interval: int, recordings: int
) -> None:
    """A mask that is refreshed in every fifth step is prepared without a recording."""
    plain, model = model_of(False), model_of(True)
    assert train(model, 12, interval=interval) == train(plain, 12, interval=interval)
    assert recorded.count("recorded") == recordings


def test_a_backward_with_the_codes_of_an_earlier_step_is_refused(recorded: list[str]) -> None:
    model = model_of(True)
    train(model, 3)
    prepare_layers(model)
    loss = model(torch.randn(2, 16)).sum()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    prepare_layers(model)
    assert recorded[-1] == "replayed"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_another_backend_or_copy_is_prepared_on_its_own(recorded: list[str]) -> None:
    model = model_of(True)
    train(model, 3)
    before = recorded.count("recorded")
    train(copy.deepcopy(model), 3)
    assert recorded.count("recorded") == before + 1
    for layer in model:
        if isinstance(layer, SparseBitLinear):
            layer.backend = ReferenceBackend()
    calls = list(recorded)
    prepare_layers(model)
    assert recorded == calls
    assert torch.equal(model[0].ternary()[0], copy.deepcopy(model[0]).ternary()[0])


def test_a_model_that_is_moved_gives_its_recordings_back(recorded: list[str]) -> None:
    model = model_of(True)
    train(model, 3)
    latent, written = weakref.ref(model[0].weight.untyped_storage()), weakref.ref(model[0]._prepared.row_scale)
    model.to("meta")
    model[0].backend = ReferenceBackend()  # The backend of this test holds its tensors itself.
    gc.collect()
    assert latent() is None
    assert written() is None


def test_a_recording_keeps_no_layer_and_no_latent_weight(recorded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Unlike the recording of the other tests, a CUDA graph does not hold its function.
    monkeypatch.setattr(
        preparation, "record", lambda function, pool: function() or (lambda: recorded.append("replayed"))
    )
    layer = SparseBitLinear(16, 24, pattern="2:4")
    layer.backend = InPlace()
    for _ in range(3):
        prepare_layers(layer)
        with torch.no_grad():
            layer.weight.mul_(0.5)
    assert recorded == ["replayed"]
    latent, gone = weakref.ref(layer.weight.untyped_storage()), weakref.ref(layer)
    layer.weight.data = layer.weight.data.clone()
    assert latent() is None
    del layer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("current", [0, 1])
def test_only_weights_on_the_current_gpu_are_recorded(current: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph records one GPU. The kernels for another one would run once, and no replay would repeat them."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    weight = SimpleNamespace(is_cuda=True, requires_grad=True, get_device=lambda: 1)
    layer = SimpleNamespace(_parameters={"weight": weight}, backend=InPlace())
    assert preparation.can_record(layer) == (current == 1)
