"""The kernel of the losses against a teacher on a GPU: it equals its twin, and the loss of a model that uses it."""

import os

import pytest
import torch

from sbn_lightning.backends.teacher_losses import kernel_for
from sbn_lightning.models import distillation
from sbn_lightning.models.distillation import LogitsLoss, linear_distillation
from tests.kernels.distillation import check_distillation

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a CUDA GPU"
)


@pytest.mark.parametrize(("tokens", "classes"), [(1, 1), (77, 300), (300, 49152), (64, 151936)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-4)])
def test_distillation(tokens: int, classes: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    student = 5 * torch.randn(tokens, classes, device="cuda")
    check_distillation(student.to(dtype), (student + 3 * torch.randn_like(student)).to(dtype), tolerance)


def test_the_loss_of_hidden_states_is_that_of_the_compiled_function(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(500, 64, device="cuda").bfloat16().requires_grad_()
    weight = (0.3 * torch.randn(3000, 64, device="cuda")).requires_grad_()
    theirs = torch.randn(500, 64, device="cuda").bfloat16()
    target = torch.randint(3000, (500,), device="cuda")
    assert kernel_for(hidden, 1.0) is not None
    assert kernel_for(hidden, 2.0) is None
    found = []
    for by_kernel in (True, False):
        if not by_kernel:
            monkeypatch.setattr(distillation, "kernel_for", lambda logits, temperature: None)
        total, language, divergence = linear_distillation(
            hidden, weight, theirs, weight.detach(), target, LogitsLoss(0.5, 1.0), 128
        )
        found.append((total, language, divergence, *torch.autograd.grad(total, (hidden, weight))))
    for ours, expected in zip(*found, strict=True):
        assert (ours - expected).norm() <= 1e-2 * expected.norm()
