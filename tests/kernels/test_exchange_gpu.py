"""On a GPU, what is made of the rows of several ranks equals what ``prepare_weight`` makes of the whole weight."""

from __future__ import annotations

import os

import pytest
import sbn_kernels as sk
import torch
from sbn_kernels.exchange.triton import decode_rows, encode_rows, gamma_of_parts
from sbn_kernels.prepare.rows import row_sums

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a CUDA GPU"
)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("out", "columns", "n", "m", "layout", "dtype"),
    [
        (2048, 1536, 2, 4, "sparse24", torch.float32),
        (1001, 896, 6, 8, "dense", torch.float32),
        (5, 136, 2, 4, "sparse24", torch.bfloat16),
        (300, 4096, 4, 4, "none", torch.float32),
    ],
)
def test_rows_of_ranks_equal_the_whole_weight(
    out: int, columns: int, n: int, m: int, layout: str, dtype: torch.dtype, ranks: int
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(out, columns, device="cuda", dtype=dtype)
    whole = sk.prepare_weight(weight, n, m, layout=layout)
    padded = -(-out // ranks)
    terms = torch.zeros(ranks, padded, device="cuda")
    terms.view(-1)[:out] = torch.cat([row_sums(rows)[0] for rows in weight.split(padded)])
    table = torch.tensor([[0, -1, padded, 0, out, columns, 0]], dtype=torch.int32, device="cuda")
    gamma, row_scale = gamma_of_parts(terms, table, out)
    assert torch.equal(gamma, whole.gamma)
    words = torch.full((ranks, padded, -(-columns // 4)), 77, dtype=torch.uint8, device="cuda")
    for rank, (rows, scale) in enumerate(zip(weight.split(padded), row_scale.split(padded), strict=True)):
        words[rank, : len(rows)] = encode_rows(rows, scale, n, m)
    codes, bits, packed = decode_rows(words, out, columns, layout)
    assert torch.equal(codes, whole.codes)
    assert torch.equal(bits, whole.mask_bits)
    assert torch.equal(packed, whole.packed)
