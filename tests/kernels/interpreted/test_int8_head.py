"""The head's products in 8 bits by kernels, in the interpreter: equal to the twins, bit for bit."""

import pytest
import torch

from sbn_lightning.backends import int8_head


@pytest.mark.usefixtures("poisoned_buffers")
def test_kernels_equal_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    # In float32, because the interpreter does not round results to the nearest bfloat16.
    hidden, weight = torch.randn(70, 48), torch.randn(101, 48)
    target, gradient = torch.randint(101, (70,)), torch.randn(70, 101) / 70
    assert int8_head._arithmetic(hidden) is not int8_head._TWINS
    found = []
    for twins in (False, True):
        if twins:
            monkeypatch.setattr(int8_head, "_arithmetic", lambda tensor: int8_head._TWINS)
        head = int8_head.Int8Head(hidden, weight, target)
        parts = [slice(0, 64), slice(64, 128)]
        found.append([head.class_scale, *(head.logits(part) for part in parts)])
        found[-1] += [g for i, part in enumerate(parts) for g in head.gradients(gradient[part], part, i)]
    for by_kernels, by_twins in zip(*found, strict=True):
        assert by_kernels.dtype == by_twins.dtype
        assert torch.equal(by_kernels, by_twins)
