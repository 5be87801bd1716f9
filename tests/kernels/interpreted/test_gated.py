"""Two layers around a SwiGLU as one function: the bits of the two layers, and gradients near them with saved gates."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sbn_lightning.backends import joined as joined_layers
from sbn_lightning.backends.integer import KernelBackend
from sbn_lightning.backends.reference import REFERENCE
from sbn_lightning.distributed.packed import PackedRows
from sbn_lightning.distributed.rows import RowCut
from sbn_lightning.layers.gated import swiglu_between, swiglu_of_pair
from sbn_lightning.layers.sparse_linear import SparseBitLinear

FEATURES, HIDDEN = 16, 24


def layers(
    saved_gates: bool = False, gradient: str = "dense", bias: bool = False, **more: object
) -> list[SparseBitLinear]:
    torch.manual_seed(0)
    options = {"pattern": "2:4", "gradient": gradient, **more}
    first = SparseBitLinear(FEATURES, 2 * HIDDEN, bias, split_sizes=(HIDDEN, HIDDEN), **options)  # type: ignore[arg-type]
    pair = [first, SparseBitLinear(HIDDEN, FEATURES, True, **options)]  # type: ignore[arg-type]
    for i, layer in enumerate(pair):
        layer.backend = backend = KernelBackend("portable", gradients="int8", saved_gates=saved_gates)
        backend.seed = torch.tensor([i + 7])
    return pair


def run(pair: list[SparseBitLinear], joined: bool) -> list[Tensor]:
    first, last = pair
    torch.manual_seed(1)
    x = torch.randn(2, 4, FEATURES).requires_grad_()
    y = swiglu_between(first, last, x) if joined else last(first(x), swiglu=True)
    y.backward(torch.randn_like(y))
    return [y, x.grad, first.weight.grad, last.weight.grad, last.bias.grad]  # type: ignore[list-item]


@pytest.mark.parametrize(("gradient", "saved_gates"), [("dense", True), ("masked", False)])
def test_joined_layers_have_the_bits_of_two(gradient: str, saved_gates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(layers(saved_gates, gradient), joined=False)
    calls = []
    own = KernelBackend.gated
    monkeypatch.setattr(KernelBackend, "gated", lambda self, *args: calls.append(1) or own(self, *args))
    for ours, wanted in zip(run(layers(saved_gates, gradient), joined=True), expected, strict=True):
        assert torch.equal(ours, wanted)
    assert calls == [1]


def test_learned_scales_of_joined_layers() -> None:
    """The gradients of the factors come from those of the weights, which int8 kernels round."""
    found = []
    for joined in (True, False):
        pair = layers(learnable_scales=True)
        for layer in pair:
            torch.nn.init.constant_(layer.log_scale, 0.3)
        found.append([*run(pair, joined), *(layer.log_scale.grad for layer in pair)])
    for ours, wanted in zip(*found, strict=True):
        assert torch.equal(ours, wanted)
    first, last = pair
    gradient = (last.weight.grad * last.effective_weight()).sum()
    torch.testing.assert_close(last.log_scale.grad, gradient.reshape(1))
    assert first.log_scale.grad.abs().min() > 0


def test_saved_gates_change_the_gradients_a_little_and_the_forward_not() -> None:
    exact, near = run(layers(False), joined=True), run(layers(True), joined=True)
    assert torch.equal(exact[0], near[0])
    assert torch.equal(exact[3], near[3])  # the last layer's weight
    for a, b in zip(exact[1:3], near[1:3], strict=True):
        assert not torch.equal(a, b)
        assert (a - b).norm() < 0.03 * a.norm()


def test_hooks_biases_and_passes_without_gradients_take_one_layer_after_the_other() -> None:
    pair = layers()
    seen = []
    handle = pair[0].register_forward_hook(lambda *given: seen.append(given[2].shape))
    with_hook = run(pair, joined=True)
    assert seen == [(2, 4, 2 * HIDDEN)]
    handle.remove()
    for ours, wanted in zip(with_hook, run(layers(), joined=True), strict=True):
        assert torch.equal(ours, wanted)
    for ours, wanted in zip(run(layers(bias=True), joined=True), run(layers(bias=True), joined=False), strict=True):
        assert torch.equal(ours, wanted)
    with torch.no_grad():
        assert swiglu_between(*pair, torch.randn(2, FEATURES)).shape == (2, FEATURES)


def three_layers() -> list[SparseBitLinear]:
    torch.manual_seed(0)
    made = [SparseBitLinear(16, 16, bias, pattern="2:4") for bias in (False, False, True)]
    for i, layer in enumerate(made):
        layer.backend = KernelBackend("portable", gradients="int8")
        layer.backend.seed = torch.tensor([i])
    return made


def run_three(three: list[SparseBitLinear]) -> list[Tensor]:
    torch.manual_seed(1)
    for layer in three:
        layer.prepare()
        layer.owner_prepares = True
    x = torch.randn(2, 4, 16).requires_grad_()
    y = swiglu_of_pair(*three, x)
    y.backward(torch.randn_like(y))
    return [y, x.grad, three[2].bias.grad]  # type: ignore[list-item]


def shard_alone(layer: SparseBitLinear) -> Tensor:
    """Wrap the backend as for a weight that is sharded by rows over one rank; returns what takes the gradient."""
    leaf = layer.weight.detach().clone().requires_grad_()
    exchange = SimpleNamespace(prepare=lambda due: [backend.inner.prepare(*request) for backend, *request in due])
    cut = RowCut(layer.out_features, 0, 1)
    layer.wrap_backend(lambda inner: PackedRows(inner, cut, exchange, leaf, None))  # type: ignore[arg-type]
    return leaf


@pytest.mark.parametrize("count", [2, 3])
def test_gradients_of_sharded_layers_go_where_their_exchange_begins(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if count == 3:  # Gate and up are joined in a compiled step alone.
        for name in ("is_compiling", "is_dynamo_compiling"):
            monkeypatch.setattr(torch.compiler, name, lambda: True)
        monkeypatch.setattr(joined_layers, "PANEL", 16)
    whole, sharded = (layers() if count == 2 else three_layers() for _ in range(2))
    leaves = [shard_alone(layer) for layer in sharded]
    expected, found = (run(them, True) if count == 2 else run_three(them) for them in (whole, sharded))
    assert torch.equal(found[0], expected[0])
    for leaf, layer, own in zip(leaves, whole, sharded, strict=True):
        assert torch.equal(leaf.grad, layer.weight.grad)  # type: ignore[arg-type]
        assert own.weight.grad is None


def test_sharded_layers_of_which_one_has_no_kernel_take_one_layer_after_the_other() -> None:
    found = []
    for joined in (True, False):
        first, last = layers()
        last.backend = REFERENCE
        leaves = [shard_alone(layer) for layer in (first, last)]
        found.append([run([first, last], joined)[0], *(leaf.grad for leaf in leaves)])
    for ours, wanted in zip(*found, strict=True):
        assert torch.equal(ours, wanted)
