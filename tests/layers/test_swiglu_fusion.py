"""The SwiGLU of foreign models: what is found, what is not, and that nothing else changes."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbn_lightning.backends.reference import ReferenceBackend
from sbn_lightning.layers import convert_to_match
from sbn_lightning.layers.conversion import convert_linears, revert_linears
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear
from sbn_lightning.layers.swiglu_fusion import FusedSwiGLU


class Gated(nn.Module):
    """The formula, with layers of any name."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(16, 32), nn.Linear(16, 32, bias=False), nn.Linear(32, 16)
        self.act = activation or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Functional(Gated):
    def forward(self, x: Tensor, unused: Tensor | None = None) -> Tensor:
        gate = F.silu(self.w1(x))
        return self.w2(torch.mul(self.w3(x), gate))


class Swish(nn.Module):
    """SiLU under another name."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class Dropped(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.dropout(self.act(self.w1(x)) * self.w3(x), 0.1, self.training))


class Residual(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.w2(self.act(self.w1(x)) * self.w3(x))


class OtherInput(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x + 1))


class Branching(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class PairBackend(ReferenceBackend):
    """A backend that takes pairs, and counts them."""

    takes_pairs = True

    def __init__(self) -> None:
        self.pairs = 0

    def linear(self, x, latent, prepared, gradient_mask, activation_bits, swiglu=False, dtype=None):  # type: ignore[no-untyped-def, override]
        if isinstance(swiglu, Tensor):
            self.pairs += 1
            x, swiglu = F.silu(x) * swiglu, False
        return super().linear(x, latent, prepared, gradient_mask, activation_bits, swiglu, dtype)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 5, 16)


def converted(module: nn.Module) -> tuple[nn.Sequential, PairBackend]:
    model = nn.Sequential(module)
    convert_linears(model, "2:4")
    backend = PairBackend()
    for layer in model.modules():
        if isinstance(layer, SparseBitLinear):
            layer.backend = backend
    return model, backend


def _expect_32_features(module: nn.Module, args: tuple[Tensor]) -> None:
    assert args[0].shape == (2, 5, 32)


@pytest.mark.parametrize("module", [Gated(), Functional(), Gated(Swish())], ids=["modules", "functions", "other silu"])
def test_a_swiglu_is_found_and_computes_the_same(module: nn.Module, x: Tensor) -> None:
    model = nn.Sequential(copy.deepcopy(module))
    report = convert_linears(model, "2:4")
    assert report.swiglu == ["0"]
    assert "SwiGLU in *:" in str(report)
    assert type(model[0]).__name__ == type(module).__name__
    assert isinstance(model[0], type(module))
    fused, backend = converted(copy.deepcopy(module))
    y, own = fused(x), model(x)
    assert backend.pairs == 1
    assert torch.equal(y, own)
    for output in (y, own):
        output.square().sum().backward()
    for a, b in zip(fused.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "module", [Dropped(), Residual(), OtherInput(), Branching(), Gated(nn.GELU()), Gated(nn.PReLU())]
)
def test_anything_else_is_left_alone(module: nn.Module) -> None:
    model = nn.Sequential(module)
    assert convert_linears(model, "2:4").swiglu == []
    assert not isinstance(model[0], FusedSwiGLU)


def test_two_layers_are_no_swiglu() -> None:
    model = nn.Sequential(Gated())
    assert convert_linears(model, "2:4", exclude="*.w3").swiglu == []


def test_hooks_see_what_they_saw_before(x: Tensor) -> None:
    """With a hook on the last layer or on the activation the module runs its own forward."""
    for name in ("w2", "act"):
        model, backend = converted(Gated())
        handle = getattr(model[0], name).register_forward_pre_hook(_expect_32_features)
        model(x)
        assert backend.pairs == 0
        handle.remove()
        model(x)
        assert backend.pairs == 1


def test_on_the_reference_the_module_runs_its_own_forward(x: Tensor) -> None:
    calls: list[int] = []

    class Counting(Gated):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x)

    model = nn.Sequential(Counting())
    assert convert_linears(model, "2:4").swiglu == ["0"]
    calls.clear()
    model(x)
    assert calls == [1]


def test_copies_pickles_and_reversion(x: Tensor) -> None:
    model, _ = converted(Gated())
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert isinstance(other[0], FusedSwiGLU)
        assert torch.equal(other(x), expected)
    again = nn.Sequential(Gated())
    convert_to_match(again, model.state_dict())
    again.load_state_dict(model.state_dict())
    assert isinstance(again[0], FusedSwiGLU)
    assert torch.equal(again(x), expected)
    assert convert_linears(model, "2:4").swiglu == []  # There is nothing new in a second conversion.
    revert_linears(model)
    assert type(model[0]) is Gated
    assert set(vars(model[0])) == set(vars(Gated()))


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    assert convert_linears(model, "2:4").swiglu == ["model.layers.0.mlp", "model.layers.1.mlp"]
    gelu = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, hidden_act="gelu"))
    assert convert_linears(gelu, "2:4").swiglu == []


def test_a_compiled_model_computes_the_same(x: Tensor) -> None:
    model, backend = converted(Gated())
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)
    assert backend.pairs == 2
