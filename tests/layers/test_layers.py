"""The layers against a brute force written from the formulas alone, and their life in a training loop."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from sbn_lightning.backends.reference import REFERENCE
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.sparse_linear import SparseBitLinear, SparseLinear
from sbn_lightning.sparsity.pattern import NMPattern, nonzeros_per_group, top_n_mask
from sbn_lightning.sparsity.ternary import quantize_activations


def relative_rms(actual, expected):
    return ((actual - expected).double().square().mean().sqrt() / expected.double().square().mean().sqrt()).item()


def brute_force(layer, x):
    """y, codes, mask and gammas of a SparseBitLinear, element by element in float64."""
    weight = layer.weight.detach().double()
    pattern, (rows, columns) = layer.pattern, weight.shape
    splits = layer.split_sizes or (rows,)
    part_of = [i for i, size in enumerate(splits) for _ in range(size)]

    def mean_gamma(part, keep):
        members = [(r, c) for r in range(rows) if part_of[r] == part for c in range(columns)]
        kept = [(r, c) for r, c in members if keep[r][c]]
        total = sum(abs(weight[r, c].item()) for r, c in kept)
        count = {"masked": len(members)}.get(layer.gamma_over, len(kept))
        return max(total / count, 1e-5)

    everything = [[True] * columns for _ in range(rows)]
    dense_gamma = []
    for part in range(len(splits)):
        values = [abs(weight[r, c].item()) for r in range(rows) if part_of[r] == part for c in range(columns)]
        dense_gamma.append(max(sum(values) / len(values), 1e-5))

    def code(r, c, gammas):
        return max(-1, min(1, round(weight[r, c].item() / gammas[part_of[r]])))  # round() is half to even

    mask = [[False] * columns for _ in range(rows)]
    for r in range(rows):
        for start in range(0, columns, pattern.m):
            scores = {
                c: abs(weight[r, c].item()) if layer.mask_source == "latent" else abs(code(r, c, dense_gamma))
                for c in range(start, start + pattern.m)
            }
            for c in sorted(scores, key=lambda c: (-scores[c], c))[: pattern.n]:
                mask[r][c] = True
    keep = mask if layer.gamma_over in ("kept", "masked") else everything
    gammas = [mean_gamma(part, keep) for part in range(len(splits))]
    codes = [[code(r, c, gammas) * mask[r][c] for c in range(columns)] for r in range(rows)]
    if layer.gamma_over == "nonzero":
        gammas = [mean_gamma(part, codes) for part in range(len(splits))]

    y = torch.empty(len(x), rows, dtype=torch.float64)
    for t in range(len(x)):
        token = [v.item() for v in x[t].double()]
        if layer.activation_bits == 8:
            scale = max(max(abs(v) for v in token), 1e-5) / 127
            token = [max(-128, min(127, round(v / scale))) for v in token]
        elif layer.activation_bits == 4:
            scale = max(sum(abs(v) for v in token) / columns, 1e-5) / 7**0.5
            token = [max(-8, min(7, round(v / scale))) for v in token]
        else:
            scale = 1.0
        for r in range(rows):
            total = sum(a * b for a, b in zip(token, codes[r], strict=True))
            y[t, r] = total * scale * gammas[part_of[r]] + (layer.bias[r].item() if layer.bias is not None else 0)
    return y, codes, mask, gammas


def straight_through(layer, x):
    """The same forward as fake quantisation in float64, so that autograd gives the gradients."""
    codes, gamma = layer.ternary()
    row_scale = gamma.repeat_interleave(torch.tensor(layer.split_sizes or (layer.out_features,)))
    effective = (codes * row_scale.unsqueeze(1)).requires_grad_()
    tokens = x.detach().clone()
    if layer.activation_bits is not None:
        quantized, scale = quantize_activations(x, layer.activation_bits)
        tokens = quantized * scale
    tokens.requires_grad_()
    return tokens, effective, tokens @ effective.t()


@pytest.mark.parametrize("activation_bits", [8, 4, None])
@pytest.mark.parametrize("gamma_over", ["dense", "kept", "masked", "nonzero"])
@pytest.mark.parametrize("mask_source", ["latent", "ternary"])
@pytest.mark.parametrize("split_sizes", [None, (3, 2, 4)])
def test_forward_equals_brute_force(activation_bits, gamma_over, mask_source, split_sizes):
    torch.manual_seed(3)
    layer = SparseBitLinear(
        24,
        9,
        pattern="3:6",
        split_sizes=split_sizes,
        activation_bits=activation_bits,
        mask_source=mask_source,
        gamma_over=gamma_over,
        dtype=torch.float64,
    )
    with torch.no_grad():
        layer.weight[0, :6] = 0.25  # all magnitudes of a group are equal
        layer.weight[3] *= 5  # the parts have different scales
    x = torch.randn(5, 24, dtype=torch.float64)
    y, codes, mask, gammas = brute_force(layer, x)
    assert layer.mask.tolist() == mask
    assert layer.ternary()[0].tolist() == codes
    torch.testing.assert_close(layer.ternary()[1], torch.tensor(gammas, dtype=torch.float64), rtol=1e-14, atol=0)
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation_bits", [8, 4, None])
@pytest.mark.parametrize("gradient", ["dense", "masked"])
@pytest.mark.parametrize("split_sizes", [None, (5, 7)])
def test_gradient_is_the_straight_through_formula_to_the_last_bit(activation_bits, gradient, split_sizes):
    torch.manual_seed(4)
    layer = SparseBitLinear(
        16,
        12,
        pattern="2:4",
        gradient=gradient,
        split_sizes=split_sizes,
        activation_bits=activation_bits,
        dtype=torch.float64,
    )
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(7, 12, dtype=torch.float64)
    layer(x).backward(dy)
    tokens, effective, y = straight_through(layer, x)
    y.backward(dy)
    expected = effective.grad * layer.mask if gradient == "masked" else effective.grad
    assert torch.equal(layer.weight.grad, expected)
    assert torch.equal(x.grad, tokens.grad)
    assert torch.equal(layer.bias.grad, dy.sum(0))
    assert (layer.weight.grad[~layer.mask] != 0).any() == (gradient == "dense")


@given(st.integers(1, 32), st.data(), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_any_pattern_is_ternary_and_keeps_at_most_n(m, data, seed):
    torch.manual_seed(seed)
    n = data.draw(st.integers(1, m))
    layer = SparseBitLinear(2 * m, 3, pattern=f"{n}:{m}")
    codes, gamma = layer.ternary()
    assert set(codes.unique().tolist()) <= {-1, 0, 1}
    assert (nonzeros_per_group(codes, m) <= n).all()
    assert (gamma > 0).all()
    assert torch.equal(layer.effective_weight(), codes * gamma)
    if n == m:
        assert layer.mask.all()
        assert torch.equal(codes, (layer.weight / gamma).round().clamp(-1, 1).to(torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 8), (0, 8), (8,)])
def test_any_leading_shape(dtype, shape):
    layer = SparseBitLinear(8, 6, pattern="2:4", dtype=dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 6)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.shape == shape


def test_bfloat16_autocast_loses_nothing_but_the_last_rounding():
    layer = SparseBitLinear(512, 64, pattern="6:8", bias=False)
    x = torch.randn(33, 512).bfloat16()
    exact = layer(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.float())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16())


def test_sparse_linear_is_the_masked_layer_with_a_dense_gradient():
    layer = SparseLinear(16, 12, pattern="2:4", dtype=torch.float64)
    x = torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 7, 12, dtype=torch.float64)
    layer(x).backward(dy)
    mask = top_n_mask(layer.weight, NMPattern(2, 4))
    torch.testing.assert_close(layer(x), x @ (layer.weight * mask).t() + layer.bias, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(layer.weight.grad, dy.flatten(0, 1).t() @ x.flatten(0, 1), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(x.grad, dy @ (layer.weight * mask), rtol=1e-14, atol=1e-14)
    assert layer.weight.grad[~mask].abs().min() > 0


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("make", [SparseBitLinear, SparseLinear])
def test_mask_and_codes_follow_every_optimiser(make, options):
    """A fused optimiser does not increment version counters. A stale cache would silently stop training."""
    torch.manual_seed(0)
    layer = make(32, 16, pattern="2:4")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, **options)
    x = torch.randn(8, 32)
    for _ in range(5):
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(layer.mask, top_n_mask(layer.weight, layer.pattern))
        fresh = copy.deepcopy(layer)
        fresh.refresh_mask()
        assert torch.equal(layer(x), fresh(x))


def test_codes_are_computed_once_an_optimiser_step(monkeypatch):
    layer = SparseBitLinear(32, 16)
    calls = []
    prepare = REFERENCE.prepare
    monkeypatch.setattr(REFERENCE, "prepare", lambda *args: calls.append(1) or prepare(*args))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        for _ in range(4):  # gradient accumulation
            layer(torch.randn(2, 32)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(calls) == 3


def test_held_mask_changes_only_when_told():
    layer = SparseBitLinear(32, 16, pattern="2:4")
    before = layer.mask
    layer.hold_mask = True
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
    layer(torch.randn(2, 32))
    assert torch.equal(layer.mask, before)
    layer.refresh_mask()
    assert torch.equal(layer.mask, top_n_mask(layer.weight, layer.pattern))


def test_regrow_off_masks_the_gradient():
    layer = SparseBitLinear(32, 16, pattern="2:4")
    layer.regrow = False
    layer(torch.randn(64, 32)).square().sum().backward()
    assert (layer.weight.grad[~layer.mask] == 0).all()
    assert (layer.weight.grad[layer.mask] != 0).any()


def test_density_rows_become_sparse_evenly_and_never_turn_back():
    layer = SparseBitLinear(16, 200, pattern="2:8")
    sparse_before = torch.zeros(200, dtype=torch.bool)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        layer.set_density(2, share)
        counts = nonzeros_per_group(layer.mask, 8)[:, 0]
        assert set(counts.tolist()) <= {2, 8}
        sparse = counts == 2
        assert abs(sparse.float().mean().item() - share) < 0.02
        assert (sparse | ~sparse_before).all()
        sparse_before = sparse
        # In every 20 consecutive rows the share of sparse rows is close to the target.
        assert (sparse.float().unfold(0, 20, 20).mean(-1) - share).abs().max() <= 0.1
    layer.set_density(5)
    assert (nonzeros_per_group(layer.mask, 8) == 5).all()


def test_forward_in_inference_mode_does_not_poison_training():
    layer = SparseBitLinear(16, 8)
    with torch.inference_mode():
        layer(torch.randn(2, 16))
    layer(torch.randn(2, 16)).sum().backward()
    assert layer.weight.grad is not None


def test_state_dict_holds_the_packed_mask_and_restores_it():
    layer = SparseBitLinear(24, 8, pattern="6:8")
    layer.hold_mask = True
    layer.mask_bits.fill_(0b00111111)  # not the mask that the weights would give
    state = layer.state_dict()
    assert sorted(state) == ["bias", "mask_bits", "weight"]
    assert state["mask_bits"].shape == (8, 3)
    other = SparseBitLinear(24, 8, pattern="6:8")
    other.load_state_dict(state)
    x = torch.randn(2, 24)
    assert torch.equal(other.mask, layer.mask)
    assert torch.equal(other(x), layer(x))


def test_dense_checkpoint_loads_with_a_fresh_mask():
    dense = nn.Linear(24, 8)
    layer = SparseBitLinear(24, 8, pattern="6:8")
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.mask, top_n_mask(dense.weight, layer.pattern))


def test_saving_saves_the_mask_of_the_weights_being_saved():
    layer = SparseBitLinear(24, 8, pattern="6:8")
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 24))
    other = SparseBitLinear(24, 8, pattern="6:8")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.mask, top_n_mask(layer.weight, layer.pattern))


@pytest.mark.parametrize("make", [SparseBitLinear, SparseLinear])
def test_compiled_layer_equals_eager_also_after_updates(make):
    torch.manual_seed(0)
    layer = make(32, 16, pattern="2:4")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, fused=True)
    x = torch.randn(8, 32)
    for _ in range(3):
        compiled(x).square().sum().backward()
        gradient = layer.weight.grad.clone()
        layer.weight.grad = None
        layer(x).square().sum().backward()
        assert relative_rms(gradient, layer.weight.grad) < 1e-6
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "6:8"}, "not a multiple of M=8"),
        ({"pattern": "2:4", "split_sizes": (3, 4)}, "do not add up"),
        ({"pattern": "2:4", "activation_bits": 7}, "activation_bits=7"),
        ({"pattern": "2:4", "mask_source": "gradient"}, "mask_source='gradient'"),
        ({"pattern": "2:4", "gradient": "sparse"}, "gradient='sparse'"),
        ({"pattern": "2:4", "gamma_over": "all"}, "gamma_over='all'"),
    ],
)
def test_impossible_options_name_the_layer(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        SparseBitLinear(20, 8, **options)
    assert "SparseBitLinear(20, 8)" in str(error.value)


def test_another_weight_is_told_from_one_that_is_gone():
    """Python may give the id of a deleted object to the next object."""
    layer, x = SparseBitLinear(64, 8, pattern="2:4"), torch.randn(2, 64)
    for _ in range(20):
        weight = torch.randn(8, 64)
        y = torch.func.functional_call(layer, {"weight": weight}, x)
        fresh = SparseBitLinear(64, 8, pattern="2:4")
        fresh.load_state_dict({"weight": weight, "bias": layer.bias})
        assert torch.equal(y, fresh(x))
        del weight


def test_codes_are_those_of_the_weight_in_its_new_dtype():
    torch.manual_seed(0)
    layer, x = SparseBitLinear(256, 128, pattern="2:4"), torch.randn(2, 256, dtype=torch.bfloat16)
    layer(x.float())
    layer.bfloat16()
    fresh = SparseBitLinear(256, 128, pattern="2:4", dtype=torch.bfloat16)
    fresh.load_state_dict({name: value for name, value in layer.state_dict().items() if name != "mask_bits"})
    assert torch.equal(layer.mask, fresh.mask)
    assert torch.equal(layer(x), fresh(x))


@pytest.mark.parametrize("change", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_a_weight_that_is_no_parameter_any_more_is_an_error(change):
    with pytest.raises(ConfigError, match=r"SparseBitLinear\(16, 8\): its weight is no parameter any more"):
        change(SparseBitLinear(16, 8, pattern="2:4"))(torch.randn(2, 16))


def test_a_layer_that_moves_leaves_no_ternary_weight_behind():
    layer = SparseBitLinear(16, 8, pattern="2:4")
    layer.prepare()
    codes = weakref.ref(layer.ternary()[0])
    layer.to("cpu")
    assert codes() is not None
    layer.to("meta")
    gc.collect()
    assert codes() is None
