import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.sparsity import pattern
from sbn_lightning.sparsity.pattern import (
    NMPattern,
    group_ranks,
    nonzeros_per_group,
    pack_mask,
    top_n_mask,
    unpack_mask,
)


@st.composite
def patterns(draw):
    m = draw(st.integers(1, 32))
    return NMPattern(draw(st.integers(1, m)), m)


def brute_force_mask(row, n, m):
    """The mask from the definition alone: sort by falling magnitude, then rising index; keep the first n of each m."""
    keep = [False] * len(row)
    for start in range(0, len(row), m):
        order = sorted(range(start, start + m), key=lambda i: (-abs(row[i]), i))
        for i in order[:n]:
            keep[i] = True
    return keep


@given(patterns(), st.data())
def test_mask_equals_brute_force_with_ties(pattern, data):
    # Few distinct values, so that ties are common.
    values = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    groups = data.draw(st.integers(1, 4))
    row = data.draw(st.lists(values, min_size=groups * pattern.m, max_size=groups * pattern.m))
    mask = top_n_mask(torch.tensor([row]), pattern)
    assert mask[0].tolist() == brute_force_mask(row, pattern.n, pattern.m)


@given(patterns(), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_exactly_n_of_every_m(pattern, rows, groups, seed):
    weight = torch.randn(rows, groups * pattern.m, generator=torch.Generator().manual_seed(seed))
    mask = top_n_mask(weight, pattern)
    assert (nonzeros_per_group(mask, pattern.m) == pattern.n).all()
    if pattern.is_dense:
        assert mask.all()


@pytest.mark.parametrize("m", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ranks_are_a_permutation_of_each_group(m, dtype):
    weight = torch.randn(6, 3 * m, dtype=dtype)
    ranks = group_ranks(weight, m).unflatten(-1, (-1, m))
    assert ranks.sort(-1).values.tolist() == torch.arange(m).expand(6, 3, m).tolist()


@pytest.mark.parametrize("m", range(1, 9))
def test_both_ways_to_rank_agree(m):
    """They agree on ties and NaN too, because a run may move between GPU and CPU, which rank in different ways."""
    groups = torch.randint(3, (7, 50, m)).float()
    groups[torch.rand(groups.shape) < 0.1] = float("nan")
    ranks = pattern._ranks_by_pairs(groups.movedim(-1, 0)).movedim(0, -1)
    assert torch.equal(pattern._ranks_at_once(groups), ranks)


def test_keep_may_differ_by_row():
    weight = torch.randn(5, 16)
    keep = torch.tensor([1, 2, 4, 8, 8])
    counts = nonzeros_per_group(top_n_mask(weight, NMPattern(1, 8), keep), 8)
    assert counts.tolist() == [[k, k] for k in keep.tolist()]


@given(st.integers(1, 4), st.integers(1, 70), st.integers(0, 2**31))
def test_packing_is_the_inverse_of_unpacking(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-columns // 8))
    assert torch.equal(unpack_mask(packed, columns), mask)


def test_packing_puts_the_first_weight_in_the_lowest_bit():
    assert pack_mask(torch.tensor([[True] + [False] * 8])).tolist() == [[1, 0]]


@pytest.mark.parametrize("text", ["6:8", " 6 : 8 "])
def test_parse(text):
    pattern = NMPattern.parse(text)
    assert (pattern.n, pattern.m, str(pattern)) == (6, 8, "6:8")
    assert NMPattern.parse(pattern) is pattern


@pytest.mark.parametrize("text", ["0:4", "5:4", "1:33", "2/4", "", "a:b", "2:4:8", None, 2.4])
def test_parse_refuses(text):
    with pytest.raises(ConfigError):
        NMPattern.parse(text)


def test_unquoted_yaml_is_told_to_be_quoted():
    import yaml

    value = yaml.safe_load("pattern: 6:8")["pattern"]
    assert value == 368
    with pytest.raises(ConfigError, match=r'quote it, pattern: "6:8"'):
        NMPattern.parse(value)


def test_pattern_that_does_not_divide_names_the_layer():
    with pytest.raises(ConfigError, match=r"mlp\.down: in_features=100 is not a multiple of M=8"):
        NMPattern(6, 8).check_divides(100, "mlp.down")
