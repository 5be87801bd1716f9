"""SwiGLU's backward with quantisation in one operation, and saved gates: equal to the operations that it joins."""

import pytest
import sbn_kernels as sk
import torch
from sbn_kernels.gradients.input_gradient import input_gradient_gemm
from sbn_kernels.swiglu.reference import (
    gates_of_codes,
    saved_gates_reference,
    swiglu_backward_reference,
    swiglu_quantize_reference,
)
from sbn_kernels.swiglu.rounded import (
    swiglu_backward_of_codes,
    swiglu_backward_of_rounded,
)
from sbn_kernels.swiglu.saved import swiglu_quantize_and_save

pytestmark = pytest.mark.usefixtures("poisoned_buffers")
SEED = torch.tensor([5])


def case(tokens: int, features: int) -> tuple[torch.Tensor, ...]:
    d, x = torch.randn(tokens, features) * 10 ** torch.rand(tokens, 1), 3 * torch.randn(tokens, 2 * features)
    return d, x, torch.rand(2 * features) + 0.01, torch.rand(tokens) + 0.01


def product(tokens: int, features: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """What the gradient of the SwiGLU's product is made of, and this gradient."""
    a8, codes_t = torch.randint(-127, 128, (tokens, 6)).char(), torch.randint(-1, 2, (features, 6)).char()
    operands = a8, 10 ** torch.rand(tokens), codes_t
    return operands, input_gradient_gemm(*operands, features, torch.float32)


@pytest.mark.parametrize(("tokens", "features"), [(1, 1), (9, 20), (9, 300), (0, 16)])
def test_rounded_backward(tokens: int, features: int) -> None:
    _, x, row_scale, token_scale = case(tokens, features)
    operands, d = product(tokens, features)
    one = swiglu_backward_of_rounded(*operands, x, None, row_scale, token_scale, SEED, torch.float32)
    two = sk.quantize_gradient(sk.swiglu_backward(d, x), row_scale, token_scale, SEED)
    for name, ours, expected in zip(one._fields, one, two, strict=True):
        assert torch.equal(ours, expected), name
    twin = sk.quantize_gradient_reference(swiglu_backward_reference(d, x), row_scale, token_scale, SEED)
    torch.testing.assert_close(one.token_scale, twin.token_scale)
    torch.testing.assert_close(one.channel_scale, twin.channel_scale)
    assert ((one.tokens.int() - twin.tokens.int()).abs() <= 1).all()


def test_non_finite_gradients_stay_visible() -> None:
    _, x, row_scale, token_scale = case(20, 30)
    x[13, 5] = float("nan")
    q = swiglu_backward_of_rounded(*product(20, 30)[0], x, None, row_scale, token_scale, SEED, torch.float32)
    assert (~q.token_scale.isfinite()).nonzero().tolist() == [[13]]
    assert (~q.channel_scale.isfinite()).nonzero().tolist() == [[5], [35]]


@pytest.mark.parametrize(("tokens", "features"), [(1, 1), (9, 20), (6, 300), (0, 16)])
def test_saved_gates(tokens: int, features: int) -> None:
    d, x, row_scale, token_scale = case(tokens, features)
    q, scale, codes, code_scale = swiglu_quantize_and_save(x)
    for ours, expected in zip((q, scale), sk.swiglu_quantize(x), strict=True):
        assert torch.equal(ours, expected)
    for ours, expected in zip((codes, code_scale), saved_gates_reference(x), strict=True):
        assert torch.equal(ours, expected)
    if tokens:
        torch.testing.assert_close(scale, swiglu_quantize_reference(x)[1])
    wide = gates_of_codes(codes, code_scale)
    dx = swiglu_backward_of_codes(d, codes, code_scale)
    torch.testing.assert_close(dx, swiglu_backward_reference(d, wide), rtol=1e-5, atol=1e-6)
    operands, d = product(tokens, features)
    one = swiglu_backward_of_rounded(*operands, codes, code_scale, row_scale, token_scale, SEED, torch.float32)
    two = sk.quantize_gradient(swiglu_backward_of_codes(d, codes, code_scale), row_scale, token_scale, SEED)
    for name, ours, expected in zip(one._fields, one, two, strict=True):
        assert torch.equal(ours, expected), name


def test_arguments_that_do_not_fit_are_refused() -> None:
    d, x, row_scale, token_scale = case(4, 8)
    codes, code_scale = saved_gates_reference(x)
    with pytest.raises(ValueError, match="scales of the codes"):
        swiglu_backward_of_codes(d, codes, code_scale.t())
    with pytest.raises(ValueError, match="must be int8"):
        swiglu_backward_of_codes(d, x, code_scale)
    with pytest.raises(ValueError, match="the gradient must be"):
        swiglu_backward_of_codes(d[:, 1:], codes, code_scale)
    a8, scale, weight_t = torch.ones(5, 6, dtype=torch.int8), torch.ones(5), torch.ones(8, 6, dtype=torch.int8)
    with pytest.raises(ValueError, match="4 tokens of x, not 5"):
        swiglu_backward_of_rounded(a8, scale, weight_t, x, None, row_scale, token_scale, SEED, torch.float32)
    given = a8[1:], scale[1:], weight_t, x, None
    with pytest.raises(ValueError, match="row_scale"):
        swiglu_backward_of_rounded(*given, row_scale[1:], token_scale, SEED, torch.float32)
    with pytest.raises(ValueError, match="seed must be"):
        swiglu_backward_of_rounded(*given, row_scale, token_scale, SEED.float(), torch.float32)
    with pytest.raises(ValueError, match="4 bits"):
        swiglu_quantize_and_save(x, 5)
