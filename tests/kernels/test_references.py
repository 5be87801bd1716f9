"""The plain-PyTorch twins of the kernels: they need no Triton, and they agree with the reference that layers train on.

The two references are written independently: the twins as plainly as possible, ``sbn_lightning.sparsity`` to train.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sbn_kernels.common.packing import pack_dense, pack_sparse24
from sbn_kernels.decode.reference import decode_reference
from sbn_kernels.gemm.reference import gemm_reference
from sbn_kernels.prepare.reference import codes_reference, gamma_reference, mask_bits_reference, mask_reference
from sbn_kernels.quantize.reference import quantize_tokens_reference
from sbn_kernels.swiglu.reference import swiglu_backward_reference, swiglu_quantize_reference

from sbn_lightning.sparsity.pattern import NMPattern, pack_mask, top_n_mask
from sbn_lightning.sparsity.ternary import apply_swiglu, quantize_activations, ternary_weight

KERNELS = Path(__file__).parents[2] / "kernels"


def test_they_need_no_triton() -> None:
    names = ["quantize", "prepare", "swiglu", "gradients", "decode", "gemm"]
    code = "import sys; sys.modules['triton'] = None\n" + "\n".join(
        f"import sbn_kernels.{name}.reference" for name in names
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(KERNELS)}, timeout=120)


@pytest.mark.parametrize("bits", [8, 4])
def test_tokens(bits: int) -> None:
    x = torch.randn(17, 40)
    x[3] = 0
    q, scale = quantize_tokens_reference(x, bits)
    expected, expected_scale = quantize_activations(x, bits)
    assert torch.equal(q, expected)
    assert torch.equal(scale, expected_scale[:, 0])


@pytest.mark.parametrize("gamma_over", ["dense", "kept", "masked", "nonzero"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (6, 8), (3, 7), (5, 16)])
def test_weights(n: int, m: int, gamma_over: str) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(30, 112) * 2).round() / 2  # magnitudes with ties
    mask = mask_reference(weight, n, m)
    assert torch.equal(mask, top_n_mask(weight, NMPattern(n, m)))
    assert torch.equal(mask_bits_reference(mask), pack_mask(mask))
    keep = torch.randint(0, m + 1, (30,))
    assert torch.equal(mask_reference(weight, n, m, keep), top_n_mask(weight, NMPattern(n, m), keep))
    gamma = gamma_reference(weight, mask, (20, 10), gamma_over)
    codes, row_scale = ternary_weight(weight, mask, (20, 10), gamma_over)  # type: ignore[arg-type]
    torch.testing.assert_close(gamma, row_scale[[0, 20]], rtol=1e-6, atol=0)
    dense = gamma_reference(weight, mask, (20, 10), "dense" if gamma_over == "nonzero" else gamma_over)
    assert torch.equal(codes_reference(weight, dense.repeat_interleave(torch.tensor([20, 10])), mask), codes)


def test_swiglu() -> None:
    x = torch.randn(5, 2 * 24, requires_grad=True)
    d = torch.randn(5, 24)
    q, scale = swiglu_quantize_reference(x.detach())
    expected, expected_scale = quantize_activations(apply_swiglu(x), 8)
    assert torch.equal(q, expected)
    assert torch.equal(scale, expected_scale[:, 0])
    (gradient,) = torch.autograd.grad(apply_swiglu(x), x, d)
    torch.testing.assert_close(swiglu_backward_reference(d, x), gradient)


@pytest.mark.parametrize("layout", ["dense", "sparse24"])
def test_products(layout: str) -> None:
    x8 = torch.randint(-128, 128, (9, 140), dtype=torch.int8)
    codes = torch.randint(-1, 2, (130, 140), dtype=torch.int8)
    mask = torch.rand(130, 35, 4).argsort(-1).flatten(1) < 2 if layout == "sparse24" else torch.ones(130, 140).bool()
    codes *= mask
    packed = pack_sparse24(codes, mask) if layout == "sparse24" else pack_dense(codes)
    scale, row_scale, bias = torch.rand(9), torch.rand(130), torch.randn(130)
    y = decode_reference(x8, scale, packed, row_scale, 130, bias, layout=layout)
    assert torch.equal(y, gemm_reference(x8, scale, codes, row_scale, bias))
    exact = (x8.long() @ codes.long().t()).double() * scale.double()[:, None] * row_scale.double() + bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tile", [256, 128, 64, 32, 16])
@pytest.mark.parametrize("size", [2, 4])
def test_a_tile_fills_the_buffers_of_its_epilogue_evenly(tile: int, size: int) -> None:
    """A store may be on its way for each buffer but the one that is written, so the oldest must be that one's."""
    pytest.importorskip("triton")
    from sbn_kernels.gemm.sm90.gemm import launch_shape

    chunk, buffers, stages = launch_shape(tile, size)
    assert tile % (chunk * buffers) == 0
    assert stages >= 4
    scales = 2 * tile * 4
    assert stages * (128 * tile + 4096) + 2 * buffers * chunk * 64 * size + scales <= 232448 - 2048
