"""Which kernel serves few tokens, against what an H200 was measured to take."""

import pytest
from sbn_kernels.decode import prefers_decode

# in, out, tokens, microseconds of the decode kernel and of the prefill kernel, 2:4 (docs/LOG.md, results/decode.csv)
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


@pytest.mark.parametrize(("inner", "out", "tokens", "decode", "prefill"), MEASURED)
def test_the_faster_kernel_is_chosen_within_a_tenth(inner, out, tokens, decode, prefill):
    chosen = decode if prefers_decode(tokens, out, processors=132) else prefill
    assert chosen <= 1.1 * min(decode, prefill)


def test_one_token_is_always_decoded():
    assert all(prefers_decode(1, out, 132) for out in (1, 128, 10**6))
