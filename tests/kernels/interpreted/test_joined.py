"""Layers that read the same tokens as one layer: the forward of single layers, and the gradients of a fused layer."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from sbn_kernels.common.packing import PANEL, pack_dense, pack_sparse24
from sbn_kernels.gemm import registry
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sbn_lightning.backends import joined
from sbn_lightning.backends.integer import Gradients, KernelBackend, KernelWeight
from sbn_lightning.integrations.folder import load_sparse, save_sparse
from sbn_lightning.layers.conversion import connect_layers, convert_linears, revert_linears
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.layers.sparse_linear import prepare_layers

SEED = 11


class Attention(nn.Module):
    """k, q and v of the same tokens, or k of others; v has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 32, bias=False), nn.Linear(16, 16, bias=False)
        self.v_proj = nn.Linear(16, 16)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        k = self.k_proj(x)
        q, v = self.q_proj(x if other is None else other), self.v_proj(x)
        return q[..., :16] * k + q[..., 16:] * v


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.down = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.fixture(autouse=True)
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The portable kernels have no panels, and the interpreter is slow."""
    monkeypatch.setattr(joined, "PANEL", 16)
    torch._dynamo.reset()


def on_kernels(module: nn.Module, gradients: Gradients, joins: bool = True) -> nn.Module:
    convert_linears(module, "2:4")
    for layer in module.modules():
        if isinstance(layer, SparseBitLinear):
            layer.backend = KernelBackend("portable", gradients=gradients, joins=joins)
            layer.backend.seed = torch.tensor([SEED])
            layer.owner_prepares = True
    prepare_layers(module)
    return module


def is_given_up(model: nn.Module) -> bool:
    layers = (model.q_proj, model.k_proj, model.v_proj)
    return all(layer.readers.layers == [] and layer.given is None for layer in layers)  # type: ignore[union-attr, operator]


def results_of(module: nn.Module, compiled: bool, *others: Tensor) -> list[Tensor]:
    """The result, and the gradients of the tokens and of all parameters."""
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(module, backend=counter, fullgraph=True) if compiled else module
    y = run(x, *others)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    assert counter.frame_count == compiled
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]  # type: ignore[list-item]


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers in each join."""
    calls: list[int] = []
    own = KernelBackend._join

    def counted(self, layers, backends):  # type: ignore[no-untyped-def]
        found = own(self, layers, backends)
        if found is not None:
            calls.append(len(layers))
        return found

    monkeypatch.setattr(KernelBackend, "_join", counted)
    return calls


@pytest.mark.parametrize(("module", "gradients"), [(Attention, "bf16"), (MLP, "int8")])
def test_joined_layers_compute_what_single_layers_do(
    module: type[nn.Module], gradients: Gradients, joins: list[int]
) -> None:
    """Exact gradients are the same up to the order of sums; rounded ones have noise."""
    torch.manual_seed(0)
    plain = module()
    expected = results_of(on_kernels(copy.deepcopy(plain), "bf16"), False)
    assert not joins
    found = results_of(on_kernels(plain, gradients), True)
    assert len(joins) == 1
    assert torch.equal(found[0], expected[0])
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert (ours - theirs).norm() < (1e-6 if gradients == "bf16" else 0.02) * theirs.norm()


def test_joined_layers_have_the_gradients_of_a_fused_layer(joins: list[int]) -> None:
    torch.manual_seed(0)
    own = on_kernels(Attention(), "int8")
    ours = results_of(own, True)
    assert joins == [3]
    fused = SparseBitLinear(16, 64, bias=False, pattern="2:4", split_sizes=(32, 16, 16))
    parts = (own.q_proj, own.k_proj, own.v_proj)
    with torch.no_grad():
        fused.weight.copy_(torch.cat([part.weight for part in parts]))
    fused.backend = KernelBackend("portable", gradients="int8")
    fused.backend.seed = torch.tensor([SEED])

    class Fused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = fused(x).split((32, 16, 16), -1)
            return q[..., :16] * k + q[..., 16:] * (v + own.v_proj.bias)

    theirs = results_of(Fused(), False)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(torch.cat([part.weight.grad for part in parts]), fused.weight.grad)  # type: ignore[arg-type]


def test_a_layer_that_gets_other_tokens_multiplies_itself(joins: list[int]) -> None:
    torch.manual_seed(0)
    plain, other = Attention(), torch.randn(3, 16)
    ours = on_kernels(copy.deepcopy(plain), "bf16")
    for a, b in zip(
        results_of(ours, True, other), results_of(on_kernels(plain, "bf16"), False, other), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert joins == [3]
    assert is_given_up(ours)


def test_a_group_with_a_layer_that_is_not_called_is_given_up(joins: list[int]) -> None:
    class WithoutValues(Attention):
        def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
            return self.q_proj(x)[..., :16] * self.k_proj(x)

    model = on_kernels(WithoutValues(), "bf16")
    results_of(model, True)
    assert model.v_proj.given is not None
    model.zero_grad()
    results_of(model, True)
    assert joins == [3]
    assert model.v_proj.weight.grad is None
    assert is_given_up(model)
    connect_layers(model)
    assert is_given_up(model)  # A second search would cost a step again.


def test_a_checkpoint_inside_of_a_compiled_model_keeps_layers_apart(joins: list[int]) -> None:
    """A result that one layer leaves for another would be a side effect, which breaks the graph there."""

    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = checkpoint(self.block, x, use_reentrant=False)
            return found

    torch.manual_seed(0)
    model = on_kernels(Checkpointed(Attention()), "bf16")
    ours = results_of(model, True)
    model.zero_grad()
    for a, b in zip(ours, results_of(model, False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not joins


def test_hooks_keep_layers_apart_and_a_reversion_leaves_nothing(joins: list[int]) -> None:
    model = on_kernels(Attention(), "bf16")
    model.v_proj.register_forward_hook(lambda module, args, output: output + 1)
    results_of(model, True)
    assert not joins
    revert_linears(model)
    assert set(vars(model.q_proj)) == set(vars(nn.Linear(16, 16)))


def test_an_option_keeps_layers_apart(joins: list[int]) -> None:
    model = on_kernels(Attention(), "bf16", joins=False)
    results_of(model, True)
    assert not joins


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.mlp(self.attention(x))
        return found


def test_a_model_that_was_saved_and_loaded_has_the_same_bits(joins: list[int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = on_kernels(Block(), "int8")
    save_sparse(model, tmp_path / "saved", "latent")
    again = Block()
    load_sparse(again, tmp_path / "saved")
    expected = results_of(model, True)
    for a, b in zip(results_of(on_kernels(again, "int8"), True), expected, strict=True):
        assert torch.equal(a, b)
    assert joins == [3, 2, 3, 2]


def test_blocks_share_one_compiled_function() -> None:
    """A guard on one block's own group would compile every block anew, and the later ones not at all."""
    counter = CompileCounterWithBackend("eager")
    x = torch.randn(3, 16).requires_grad_()
    for _ in range(2):
        block = on_kernels(Attention(), "bf16")
        block.compile(backend=counter, fullgraph=True)
        x = block(x)
    assert counter.frame_count == 1


def test_copies_have_groups_of_their_own(joins: list[int]) -> None:
    torch.manual_seed(0)
    model = on_kernels(Attention(), "int8")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.q_proj.readers.layers == [other.q_proj, other.k_proj, other.v_proj]
    for alone in (copy.deepcopy(model.k_proj), pickle.loads(pickle.dumps(model.k_proj))):
        assert alone.readers.layers == [None, alone, None]
    assert copy.copy(model.k_proj).readers is None
    prepare_layers(alone)
    x = torch.randn(3, 16)
    y = torch.compile(alone, backend="eager", fullgraph=True)(x)
    assert torch.equal(y, model.k_proj(x))
    assert not joins


def test_codes_that_one_layer_keeps_are_not_joined() -> None:
    """A layer with learned scales keeps its codes beside the words, and its siblings may have no such scales."""
    kernel = next(product.name for product in registry.products() if product.form == "dense")
    codes, words = torch.ones(16, 16, dtype=torch.int8), torch.ones(16, 4, dtype=torch.uint8)
    layers = [
        (torch.zeros(16, 16), KernelWeight(kept, torch.ones(16), words, words, words, kernel), None, 8)
        for kept in (codes, None)
    ]
    for order in (layers, layers[::-1]):
        found = joined.join(order)
        assert found is not None
        assert found[1].codes is None
        assert found[1].packed.shape == (32, 4)


def test_words_of_joined_layers_are_the_words_of_one() -> None:
    torch.manual_seed(0)
    codes = torch.zeros(3 * PANEL, 256, dtype=torch.int8)
    codes[:, ::2] = torch.randint(-1, 2, (3 * PANEL, 128), dtype=torch.int8)
    parts = codes.split((2 * PANEL, PANEL))
    assert torch.equal(torch.cat([pack_dense(part) for part in parts]), pack_dense(codes))
    mask = codes.new_ones(()).bool() & (torch.arange(256) % 2 == 0).expand_as(codes)
    packed = [pack_sparse24(part, keep) for part, keep in zip(parts, mask.split((2 * PANEL, PANEL)), strict=True)]
    assert torch.equal(torch.cat(packed), pack_sparse24(codes, mask))
    transposed = [pack_dense(part.t()) for part in parts]
    assert torch.equal(torch.cat(transposed, 1), pack_dense(codes.t()))
