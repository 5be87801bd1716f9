"""The kernel of the losses against a teacher equals its twin in the interpreter."""

import pytest
import torch
from sbn_kernels.gradients import distillation_losses

from tests.kernels.distillation import check_distillation

pytestmark = pytest.mark.usefixtures("poisoned_buffers")


@pytest.mark.parametrize(("tokens", "classes"), [(1, 1), (3, 77), (2, 5000), (0, 16)])
def test_distillation(tokens: int, classes: int) -> None:
    torch.manual_seed(0)
    student = 5 * torch.randn(tokens, classes)
    check_distillation(student, student + 3 * torch.randn(tokens, classes), 1e-4)
    wide = torch.randn(tokens, 2 * classes).bfloat16()
    check_distillation(wide[:, :classes], wide[:, classes:], 1e-2)


def test_a_target_that_is_no_class_has_no_loss() -> None:
    loss, divergence, _ = distillation_losses(
        torch.randn(3, 4), torch.randn(3, 4), torch.tensor([1, -100, 4]), 1.0, 1.0
    )
    assert loss.isnan().tolist() == [False, True, True]
    assert divergence.isfinite().all()


def test_arguments_that_do_not_fit_are_refused() -> None:
    logits, target = torch.randn(3, 4), torch.zeros(3).long()
    with pytest.raises(ValueError, match="logits must be floats"):
        distillation_losses(logits.long(), logits, target, 1.0, 1.0)
    with pytest.raises(ValueError, match="the teacher's logits"):
        distillation_losses(logits, logits[:2], target, 1.0, 1.0)
    with pytest.raises(ValueError, match="target must be"):
        distillation_losses(logits, logits, target[:2], 1.0, 1.0)
