"""Kernels of the exchange between ranks equal their twins, and one rank's ``prepare_weight``, bit for bit."""

import pytest
import sbn_kernels as sk
import torch
from sbn_kernels.common.packing import pack_dense, pack_sparse24
from sbn_kernels.exchange.reference import decode_reference, encode_reference
from sbn_kernels.exchange.triton import decode_rows, encode_rows, gamma_of_parts
from sbn_kernels.prepare.reference import codes_reference, mask_bits_reference, mask_reference
from sbn_kernels.prepare.triton import sums_of_rows

pytestmark = pytest.mark.usefixtures("poisoned_buffers")


@pytest.mark.parametrize(
    ("out", "columns", "n", "m", "ranks", "layout", "held"),
    [
        (70, 136, 2, 4, 3, "sparse24", False),
        (1, 8, 6, 8, 4, "dense", False),  # fewer rows than ranks
        (9, 33, 3, 3, 2, "none", False),
        (5, 70, 3, 7, 2, "dense", True),
        (64, 128, 1, 2, 1, "dense", False),
    ],
)
def test_words_of_all_ranks_equal_one_process(
    out: int, columns: int, n: int, m: int, ranks: int, layout: str, held: bool
) -> None:
    weight = (4 * torch.randn(out, columns)).round() / 4  # with ties
    gamma = torch.rand(out) + 0.3
    mask = mask_reference(weight, n, m)
    codes = codes_reference(weight, gamma, mask)
    padded = -(-out // ranks)
    # The words of one rank lie between those of other layers.
    sent = torch.full((ranks, 16 + padded * -(-columns // 4) + 7), 201, dtype=torch.uint8)
    words = sent[:, 16:-7].unflatten(1, (padded, -1))
    for rank, (rows, scale, bits) in enumerate(
        zip(weight.split(padded), gamma.split(padded), mask_bits_reference(mask).split(padded), strict=True)
    ):
        made = encode_rows(rows, scale, n, m, bits if held else None)
        first = rank * padded
        assert torch.equal(made, encode_reference(*(whole[first : first + padded] for whole in (codes, mask))))
        words[rank, : len(made)] = made
    found, bits, packed = decode_rows(words, out, columns, layout)
    assert torch.equal(found, codes)
    assert torch.equal(bits, mask_bits_reference(mask))
    twin = decode_reference(words.flatten(0, 1)[:out], columns)
    assert torch.equal(found, twin[0])
    assert torch.equal(mask, twin[1])
    if layout == "dense":
        assert torch.equal(packed, pack_dense(codes))
    elif layout == "sparse24":
        assert torch.equal(packed, pack_sparse24(codes, mask))
    assert decode_rows(words, out, columns, want_mask=False)[1].numel() == 0


def test_no_rows() -> None:
    assert encode_rows(torch.empty(0, 12), torch.empty(0), 2, 4).shape == (0, 3)


def test_gamma_of_all_parts_in_one_launch() -> None:
    """Two weights on three ranks, the second with the mean over kept weights; neither divides by three."""
    sizes, ranks = [(5, 2, 4), (1,)], 3
    weights = [torch.randn(sum(parts), 24) for parts in sizes]
    bits = mask_bits_reference(mask_reference(weights[1], 1, 4))
    padded = [-(-len(weight) // ranks) for weight in weights]
    terms = torch.full((ranks, 16), float("nan"))
    for weight, mask, rows, at, at_count in (
        (weights[0], None, padded[0], 0, None),
        (weights[1], bits, padded[1], 8, 12),
    ):
        sums, counts = sums_of_rows(weight, mask, count=mask is not None)
        for row in range(len(weight)):
            terms[row // rows, at + row % rows] = sums[row]
            if at_count is not None:
                terms.view(torch.int32)[row // rows, at_count + row % rows] = counts[row]
    table = [[0, -1, padded[0], first, rows, 24, 0] for first, rows in ((0, 5), (5, 2), (7, 4))]
    table.append([8, 12, padded[1], 0, 1, 24, 12])
    gamma, scale = gamma_of_parts(terms, torch.tensor(table, dtype=torch.int32), 13)
    one = sk.prepare_weight(weights[0], 2, 4, sizes[0])
    other = sk.prepare_weight(weights[1], 1, 4, gamma_over="kept")
    assert torch.equal(gamma, torch.cat([one.gamma, other.gamma]))
    assert torch.equal(scale[:11], one.row_scale)
    assert torch.equal(scale[12:], other.row_scale)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_rows(torch.ones(2, 14), torch.ones(2), 3, 7), "3:7 of 14 weights in a row: give the mask"),
        (lambda: encode_rows(torch.ones(2, 8), torch.ones(3), 2, 4), r"row_scale must be contiguous float32 \[2\]"),
        (lambda: decode_rows(torch.ones(2, 2, 2, dtype=torch.uint8), 5, 8), "2 ranks with 2 rows each"),
        (lambda: decode_rows(torch.ones(2, 2, 2, dtype=torch.uint8), 4, 9), r"words must be uint8 \[ranks, rows, 3\]"),
        (lambda: gamma_of_parts(torch.ones(1, 4), torch.ones(1, 6), 4), r"table must be int32 \[parts, 7\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
