"""On a GPU: the choice of tokens equals its twin, and a CUDA graph of it reads settings that change."""

import os

import pytest
import torch

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from sbn_kernels.sampling.reference import noise

from sbn_lightning.inference.sampling import GREEDY, Sampler, Sampling
from tests.kernels.sampling_cases import (
    check_against_twin,
    check_lowest_of_random_logits,
    check_lowest_of_special_values,
    check_special_values,
)


@pytest.mark.parametrize("vocab", [1, 1023, 1025, 50_257, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_its_twin(vocab: int, dtype: torch.dtype) -> None:
    check_against_twin(vocab, dtype, "cuda")


def test_special_values() -> None:
    check_special_values("cuda")


@pytest.mark.parametrize("vocab", [1, 1025, 50_257, 151_936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_lowest_logit_equals_its_twin(vocab: int, dtype: torch.dtype) -> None:
    check_lowest_of_random_logits(vocab, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_lowest_logit_of_special_values(dtype: torch.dtype) -> None:
    check_lowest_of_special_values(dtype, "cuda")


def test_the_noise_on_a_gpu_is_that_of_a_cpu_up_to_the_logarithms() -> None:
    seeds, positions = torch.arange(4), torch.tensor([0, 1, 2**40, 7])
    torch.testing.assert_close(
        noise(seeds.cuda(), positions.cuda(), 5000).cpu(), noise(seeds, positions, 5000), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8), Sampling(0.8, 0.9), Sampling(0.8, top_k=50)], ids=str)
def test_a_graph_of_the_choice_gives_the_tokens_of_the_choice(sampling: Sampling) -> None:
    torch.manual_seed(0)
    device, vocab = torch.device("cuda"), 151_936
    logits, positions = torch.empty(4, vocab, device=device).bfloat16(), torch.zeros(4, dtype=torch.int64).cuda()
    sampler = Sampler(4, device)
    sampler.set_all(sampling, 0)
    sampler.choose(logits.zero_(), positions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sampler.record(sampling.kind, logits, positions)
    for seed in range(5):
        logits.normal_(0, 3)
        positions.add_(1)
        sampler.set_all(sampling, seed)
        expected = sampler.choose(logits, positions).clone()
        graph.replay()
        assert torch.equal(tokens, expected)
        for row in range(4):  # A row of several chooses what it chooses alone.
            alone = sampling(logits[row : row + 1], seed + row, int(positions[row]))
            assert int(alone) == int(tokens[row])
