"""Attention of prompts on a Hopper GPU, in bfloat16: against its plain-PyTorch twin, of a whole prompt and its end."""

import pytest
import torch
from sbn_kernels.prompt import attention
from sbn_kernels.prompt.attention import attend
from sbn_kernels.prompt.reference import attend_reference
from sbn_kernels.runtime.capability import interpreting

if not torch.cuda.is_available() or interpreting() or attention.NEEDS.missing(0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 2), (3, 3)])
@pytest.mark.parametrize(("length", "before"), [(512, (0, 0)), (1, (700, 3)), (77, (1, 130)), (1500, (500, 0))])
def test_attention_of_a_cache_equals_its_twin(
    size: int, heads: int, kv_heads: int, length: int, before: tuple[int, int]
) -> None:
    torch.manual_seed(length)
    keys, values = torch.randn(2, 3, kv_heads, 2048, size, device="cuda").bfloat16()
    qkv = torch.randn(2, length, (heads + 2 * kv_heads) * size, device="cuda").bfloat16()
    q = qkv.unflatten(-1, (-1, size)).transpose(1, 2)[:, :heads]
    rows, numbers = torch.tensor([2, 0], device="cuda"), torch.tensor(before, device="cuda")
    ours = attend(q, keys, values, rows, numbers)
    torch.testing.assert_close(ours, attend_reference(q, keys, values, rows, numbers), rtol=2**-6, atol=2**-7)
    assert torch.equal(ours, attend(q, keys, values, rows, numbers))
    some = min(length, 60)
    last = attend(q[:, :, -some:], keys, values, rows, numbers + length - some)
    torch.testing.assert_close(last, ours[:, -some:], rtol=2**-7, atol=2**-9)
