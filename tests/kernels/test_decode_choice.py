"""For few tokens the fastest kernel by the times of an H200 is chosen, and long sums over K are split."""

import pytest
from sbn_kernels.decode.triton import prefers_decode
from sbn_kernels.gemm.sm90.split_k import choose_parts, choose_splits, split_tile, whole_parts

# in, out, tokens, microseconds of the decode kernel and of the prefill kernel, K in one piece, 2:4 (docs/LOG.md)
MEASURED = [
    (1536, 2048, 8, 3.78, 5.54), (1536, 2048, 16, 4.29, 4.58), (1536, 2048, 32, 5.39, 4.63),
    (1536, 17920, 8, 7.71, 8.94), (1536, 17920, 16, 15.53, 7.81), (1536, 17920, 32, 22.92, 8.19),
    (8960, 1536, 8, 6.34, 15.77), (8960, 1536, 16, 9.77, 14.62), (8960, 1536, 64, 29.42, 14.71),
    (896, 1152, 8, 2.68, 4.71), (896, 1152, 16, 3.11, 3.74), (896, 1152, 64, 5.69, 3.77),
    (4864, 896, 8, 4.33, 9.82), (4864, 896, 16, 6.11, 8.91), (4864, 896, 32, 9.81, 8.94),
    (2048, 22016, 8, 10.63, 10.53), (2048, 22016, 16, 19.44, 9.39),
    (11008, 2048, 8, 7.95, 18.73), (11008, 2048, 16, 10.93, 17.63), (11008, 2048, 64, 33.81, 17.57),
    (896, 4864, 8, 3.78, 3.58), (2048, 11008, 8, 6.83, 6.27), (4096, 14336, 8, 11.99, 9.11),
    (4096, 14336, 4, 8.43, 9.10), (14336, 4096, 8, 12.52, 22.59),
]  # fmt: skip


# Three shapes, each in one run with the prefill kernel also in parts of K: 2:4, then dense ternary words
# (benchmarks/results/decode.csv).
WITH_PARTS = [
    (8960, 1536, 8, 7.29, 15.39, 6.54), (8960, 1536, 16, 10.22, 15.39, 6.58),
    (8960, 1536, 32, 15.50, 15.40, 6.90), (8960, 1536, 64, 29.84, 15.06, 7.18),
    (11008, 2048, 8, 8.62, 18.25, 7.30), (11008, 2048, 16, 11.10, 18.28, 7.33),
    (11008, 2048, 32, 18.22, 18.27, 8.55), (11008, 2048, 64, 35.55, 18.22, 8.68),
    (4864, 896, 8, 4.23, 8.93, 4.31), (4864, 896, 16, 6.05, 8.94, 4.30),
    (4864, 896, 32, 9.95, 9.00, 4.96), (4864, 896, 64, 19.15, 9.05, 5.89),
    (8960, 1536, 8, 7.63, 20.58, 7.05), (8960, 1536, 16, 11.29, 20.63, 7.08),
    (8960, 1536, 32, 15.51, 20.60, 7.44), (8960, 1536, 64, 32.10, 20.62, 8.70),
    (11008, 2048, 8, 8.96, 24.57, 7.99), (11008, 2048, 16, 12.38, 24.60, 8.05),
    (11008, 2048, 32, 17.90, 24.60, 9.58), (11008, 2048, 64, 35.92, 24.62, 9.78),
    (4864, 896, 8, 4.25, 11.92, 4.51), (4864, 896, 16, 6.21, 11.92, 4.51),
    (4864, 896, 32, 10.08, 11.95, 5.19), (4864, 896, 64, 19.89, 12.00, 6.35),
]  # fmt: skip


def picked(inner, out, tokens):
    if prefers_decode(tokens, out, inner, processors=132):
        return "decode"
    return "parts" if choose_splits(tokens, out, inner, 132) > 1 else "prefill"


@pytest.mark.parametrize(("inner", "out", "tokens", "decode", "prefill"), MEASURED)
def test_the_faster_kernel_is_chosen_within_a_tenth(inner, out, tokens, decode, prefill):
    times = {"decode": decode, "prefill": prefill}
    if (kernel := picked(inner, out, tokens)) in times:  # these were timed before the sum over K could be split
        assert times[kernel] <= 1.1 * min(times.values())


@pytest.mark.parametrize(("inner", "out", "tokens", "decode", "prefill", "parts"), WITH_PARTS)
def test_the_fastest_of_three_is_chosen_within_a_tenth(inner, out, tokens, decode, prefill, parts):
    times = {"decode": decode, "prefill": prefill, "parts": parts}
    assert times[picked(inner, out, tokens)] <= 1.1 * min(times.values())


def test_one_token_is_always_decoded():
    assert all(prefers_decode(1, out, inner, 132) for out in (1, 128, 10**6) for inner in (64, 8960, 28672))


@pytest.mark.parametrize(
    ("inner", "out", "least", "most"),
    [(8960, 1536, 6, 16), (11008, 2048, 6, 16), (4864, 896, 6, 16), (14336, 4096, 4, 8), (8192, 8192, 3, 4)],
)
def test_long_sums_of_few_features_are_split(inner, out, least, most):
    for tokens in (8, 9, 16, 17, 32, 33, 64):
        splits = choose_splits(tokens, out, inner, 132)
        assert least <= splits <= most
        assert splits * -(-out // 128) <= 2 * 132, "all programs run at once"
        assert choose_splits(64, out, inner, 132) <= splits, "parts of more tokens are more traffic"


@pytest.mark.parametrize("tokens", [1, 9, 16, 64])
@pytest.mark.parametrize(
    ("inner", "out"), [(1536, 17920), (2048, 22016), (14336, 14336), (1536, 2048), (896, 1152), (64, 64), (1, 1)]
)
def test_wide_outputs_and_short_sums_stay_in_one_piece(inner, out, tokens):
    assert choose_splits(tokens, out, inner, 132) == 1


def test_more_tokens_stay_in_one_piece():
    assert all(choose_splits(tokens, 1536, 8960, 132) == 1 for tokens in (65, 128, 8192))


def test_no_part_is_empty_and_every_token_has_room():
    for steps in range(1, 130):
        for wanted in range(1, 17):
            splits, per_split = whole_parts(steps, wanted)
            assert splits <= wanted
            assert (splits - 1) * per_split < steps <= splits * per_split
    assert [split_tile(tokens) for tokens in (1, 16, 17, 32, 33, 64)] == [16, 16, 32, 32, 64, 64]


def test_long_sums_of_short_prompts_are_cut_into_parts() -> None:
    """Parts fill the 132 multiprocessors of an H200. Long prompts fill them anyway, and short sums are not worth it."""
    assert choose_parts(512, 1536, 8960, 132) == (2, 128)
    assert choose_parts(2048, 1536, 8960, 132) == (1, 0)
    assert choose_parts(512, 1536, 1536, 132)[0] == choose_parts(512, 17920, 1536, 132)[0] == 1
    for tokens in range(65, 1025, 5):
        parts, tile = choose_parts(tokens, 1536, 8960, 132)
        assert parts == 1 or 60 <= 12 * -(-tokens // tile) * parts <= 132
