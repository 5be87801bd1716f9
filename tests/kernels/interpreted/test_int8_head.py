"""The head's products in 8 bits by kernels, in the interpreter: equal to the twins."""

import pytest
import torch
from sbn_kernels.gradients import cross_entropy_rounded

from sbn_lightning.backends import int8_head
from tests.kernels.int8_head import check_cross_entropy, parts_by_kernels_and_twins


@pytest.mark.usefixtures("poisoned_buffers")
def test_kernels_equal_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    # In float32, because the interpreter does not round results to the nearest bfloat16.
    hidden, weight, target = torch.randn(70, 48), torch.randn(101, 48), torch.randint(101, (70,))
    assert int8_head._arithmetic(hidden) is not int8_head._TWINS
    for by_kernels, by_twins in parts_by_kernels_and_twins(monkeypatch, hidden, weight, target, 64):
        assert by_kernels.dtype == by_twins.dtype
        # Exponentials differ in their last bits, so a few codes differ by one.
        assert (by_kernels - by_twins).norm() < 1e-3 * by_twins.norm()


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize(("tokens", "classes"), [(1, 1), (70, 300), (9, 20), (0, 5)])
def test_cross_entropy(tokens: int, classes: int) -> None:
    check_cross_entropy(5 * torch.randn(tokens, classes), {}, 1e-4)


def test_a_target_that_is_no_class_makes_its_loss_nan() -> None:
    target = torch.tensor([-100, 3, 4])
    seed = torch.zeros(1).long()
    loss, _ = cross_entropy_rounded(torch.randn(3, 4), torch.ones(4), target, 1.0, torch.ones(3), seed)
    assert loss.isnan().tolist() == [True, False, True]


def test_what_does_not_fit_is_refused() -> None:
    logits, one = torch.randn(3, 4), torch.ones(3)
    with pytest.raises(ValueError, match="target must be"):
        cross_entropy_rounded(logits, torch.ones(4), torch.zeros(2).long(), 1.0, one, torch.zeros(1).long())
    with pytest.raises(ValueError, match="seed must be"):
        cross_entropy_rounded(logits, torch.ones(4), torch.zeros(3).long(), 1.0, one, torch.zeros(1))
    with pytest.raises(ValueError, match="class_scale"):
        cross_entropy_rounded(logits, one, torch.zeros(3).long(), 1.0, one, torch.zeros(1).long())
