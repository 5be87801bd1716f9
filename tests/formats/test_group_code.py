import itertools
import math

import pytest
import torch

from sbn_lightning.formats.group_code import GroupCode, best_code, choose_code, decode, encode, states
from sbn_lightning.sparsity.pattern import NMPattern, top_n_mask


def random_codes(n, m, rows=37, groups=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (rows, m * groups), generator=generator, dtype=torch.int8)
    return codes * top_n_mask(torch.rand(codes.shape, generator=generator), NMPattern(n, m))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 4), (1, 4), (6, 8), (3, 8)])
def test_states_are_counted(n, m):
    assert states(n, m) == sum(sum(map(abs, g)) <= n for g in itertools.product((-1, 0, 1), repeat=m))


@pytest.mark.parametrize(
    ("n", "m", "bits"), [(1, 1, 1.6), (2, 4, 56 / 44), (1, 4, 0.8), (4, 8, 1.4), (2, 8, 1.0), (3, 8, 56 / 48)]
)
def test_bits_a_weight(n, m, bits):
    code = best_code(n, m)
    assert code.bits_per_weight == pytest.approx(bits)
    assert math.log2(states(n, m)) / m <= code.bits_per_weight
    assert states(n, m) ** code.groups <= 256**code.bytes
    codes = random_codes(n, m, 64, 77)
    assert 8 * len(encode(codes, code)) / codes.numel() == pytest.approx(bits, rel=0.01)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (2, 4), (3, 4), (4, 8), (7, 8), (5, 7)])
def test_round_trip(n, m):
    code = best_code(n, m)
    codes = random_codes(n, m)
    codes[0] = 0
    assert torch.equal(decode(encode(codes, code), code, *codes.shape), codes)


def test_every_group_of_2_4_survives():
    groups = [g for g in itertools.product((-1, 0, 1), repeat=4) if sum(map(abs, g)) <= 2]
    codes = torch.tensor(groups, dtype=torch.int8)
    code = best_code(2, 4)
    assert torch.equal(decode(encode(codes, code), code, *codes.shape), codes)


def test_five_trits_a_byte_is_plain_base_three():
    codes = torch.tensor([[0, 1, -1, 1, 0]], dtype=torch.int8)
    # The digits 0, 1, 2 stand for 0, +1, -1. The first weight is the lowest digit.
    assert encode(codes, best_code(1, 1)).tolist() == [0 + 1 * 3 + 2 * 9 + 1 * 27 + 0 * 81]


@pytest.mark.parametrize(
    ("n", "m", "pattern_m", "expected"),
    [
        (2, 4, 4, (2, 4)),
        (6, 8, 8, (1, 1)),  # 5,281 states take no fewer bits than single weights
        (4, 8, 8, (4, 8)),
        (4, 4, 4, (1, 1)),  # in the middle of a ramp to 2:4
        (8, 16, 16, (1, 1)),  # too large for a table
    ],
)
def test_the_densest_exact_code_is_chosen(n, m, pattern_m, expected):
    codes = random_codes(n, m)
    chosen = choose_code(codes, pattern_m)
    assert (chosen.n, chosen.m) == expected
    assert torch.equal(decode(encode(codes, chosen), chosen, *codes.shape), codes)


def test_zeros_alone():
    codes = torch.zeros(3, 8, dtype=torch.int8)
    code = choose_code(codes, 4)
    assert torch.equal(decode(encode(codes, code), code, 3, 8), codes)


def test_what_cannot_be_is_refused():
    code = best_code(2, 4)
    with pytest.raises(ValueError, match="more than 2 non-zeros"):
        encode(torch.ones(1, 4, dtype=torch.int8), code)
    data = encode(random_codes(2, 4), code)
    with pytest.raises(ValueError, match="bytes where"):
        decode(data[:-7], code, 37, 92)
    with pytest.raises(ValueError, match="larger than any weights give"):
        decode(torch.full_like(data, 255), code, 37, 92)
    assert GroupCode(2, 4, 11, 7) == code
