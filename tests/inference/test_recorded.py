"""Tokens of a CUDA graph of step and choice are those of the same calls without a graph."""

from __future__ import annotations

import pytest
import torch

from sbn_lightning.inference import Decoder, Sampling, generate
from sbn_lightning.inference.sampling import GREEDY
from tests.inference.test_persistent import needs_hopper, on_gpu

SAMPLINGS = [GREEDY, Sampling(0.8), Sampling(1.2, top_p=0.9), Sampling(0.9, top_k=20), GREEDY, Sampling(0.7)]
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9], [3, 4]]


@needs_hopper
@pytest.mark.parametrize("step", ["graph", "persistent"])
def test_a_graph_chooses_what_is_chosen_without_a_graph(step: str) -> None:
    model = on_gpu()
    recorded, plain = (Decoder(model, 3, 48, step=step, cuda_graph=graph) for graph in (True, False))
    for seed, sampling in enumerate(SAMPLINGS):
        tokens = []
        for decoder in (recorded, plain):
            decoder.sampler.set_all(sampling, seed)
            chosen = [decoder.sampler.choose(decoder.prefill(PROMPTS), decoder.lengths)]
            for i in range(30):
                if i == 15:  # Other numbers of the same kind need no other graph.
                    decoder.sampler.set_row(1, sampling, 100)
                chosen.append(decoder.step_next(chosen[-1]).clone())
            decoder.check()
            tokens.append(torch.stack(chosen))
        assert torch.equal(*tokens)
        assert torch.equal(recorded.lengths, plain.lengths)
    graphs = recorded._plain if step == "graph" else recorded._persistent
    assert graphs is not None
    # A prompt starts the persistent step anew, so only the last kind is left.
    assert set(graphs._graphs) == ({"greedy", "drawn", "limited"} if step == "graph" else {"drawn"})


@needs_hopper
@pytest.mark.parametrize("step", ["graph", "persistent"])
def test_rows_with_settings_of_their_own_change_kind_within_a_text(step: str) -> None:
    model = on_gpu()
    decoders = [Decoder(model, 3, 48, step=step, cuda_graph=graph) for graph in (True, False)]
    written = []
    for decoder in decoders:
        tokens, rows = decoder.prefill(PROMPTS).argmax(-1), []
        for i in range(24):
            decoder.sampler.set_row(i % 3, SAMPLINGS[i % 4], i)
            tokens = decoder.step_next(tokens)
            rows.append(tokens.clone())
        decoder.check()
        written.append(torch.stack(rows))
    assert torch.equal(*written)


@needs_hopper
def test_a_seed_gives_the_same_tokens_in_a_decoder_that_was_used_before() -> None:
    model, sampling = on_gpu(), Sampling(1.0, top_p=0.95)
    expected = generate(model, PROMPTS, max_new_tokens=20, sampling=sampling, seed=3)
    decoder = Decoder(model, 3, 48)
    generate(model, PROMPTS, max_new_tokens=20, sampling=Sampling(1.0), seed=9, decoder=decoder)
    assert generate(model, PROMPTS, max_new_tokens=20, sampling=sampling, seed=3, decoder=decoder) == expected
    assert len({tuple(row) for row in expected}) == 3
