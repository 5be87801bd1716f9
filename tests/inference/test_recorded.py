"""Tokens of a CUDA graph of step and choice are those of the same calls without a graph."""

from __future__ import annotations

import pytest
import torch

from sbn_lightning.inference import Decoder, Sampling, generate
from sbn_lightning.inference.sampling import GREEDY
from tests.inference.test_persistent import needs_hopper, on_gpu

SAMPLINGS = [GREEDY, Sampling(0.8), Sampling(1.2, top_p=0.9), Sampling(0.9, top_k=20), GREEDY, Sampling(0.7)]
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9], [3, 4]]


def checked_step(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Make the next tokens with the graph, and compare them with those of a step and a choice without a graph."""
    given, before = tokens.clone(), decoder.lengths.clone()
    found, after = decoder.step_next(given).clone(), decoder.lengths.clone()
    decoder.lengths.copy_(before)
    steps = [step for step in (decoder._plain, decoder._persistent) if step is not None]
    for step in steps:
        step._use_graph = False
    expected = decoder.sampler.choose(decoder.step(given), decoder.lengths)
    for step in steps:
        step._use_graph = True
    decoder.check()
    assert torch.equal(found, expected)
    assert torch.equal(decoder.lengths, after)
    return found


@needs_hopper
@pytest.mark.parametrize("step", ["graph", "persistent"])
def test_a_graph_chooses_what_is_chosen_without_a_graph(step: str) -> None:
    decoder = Decoder(on_gpu(), 3, 48, step=step)  # type: ignore[arg-type]
    written = []
    for seed, sampling in enumerate(SAMPLINGS):
        decoder.sampler.set_all(sampling, seed)
        tokens = decoder.sampler.choose(decoder.prefill(PROMPTS), decoder.lengths)
        for i in range(30):
            if i == 15:  # Other numbers of the same kind need no other graph.
                decoder.sampler.set_row(1, sampling, 100)
            tokens = checked_step(decoder, tokens)
            written.append(tuple(tokens.tolist()))
        assert decoder.lengths.tolist() == [35, 33, 32]
    graphs = decoder._plain if step == "graph" else decoder._persistent
    assert graphs is not None
    # A prompt starts the persistent step anew, so only the last kind is left.
    assert set(graphs._graphs) == ({"greedy", "drawn", "limited"} if step == "graph" else {"drawn"})
    assert len(set(written)) > 60  # Draws vary.


@needs_hopper
@pytest.mark.parametrize("step", ["graph", "persistent"])
def test_rows_with_settings_of_their_own_change_kind_within_a_text(step: str) -> None:
    decoder = Decoder(on_gpu(), 3, 48, step=step)  # type: ignore[arg-type]
    tokens = decoder.prefill(PROMPTS).argmax(-1)
    kinds = set()
    for i in range(24):
        decoder.sampler.set_row(i % 3, SAMPLINGS[i // 5], i)
        kinds.add(decoder.sampler.kind)
        tokens = checked_step(decoder, tokens)
    assert kinds == {"greedy", "drawn", "limited"}


@needs_hopper
def test_a_seed_gives_the_same_tokens_again_whatever_came_between() -> None:
    model, sampling = on_gpu(), Sampling(1.0, top_p=0.95)
    decoder = Decoder(model, 3, 48)
    texts = [
        generate(model, PROMPTS, max_new_tokens=20, sampling=each, seed=seed, decoder=decoder)
        for each, seed in ((GREEDY, 0), (sampling, 3), (Sampling(1.0), 9), (sampling, 3), (sampling, 4))
    ]
    assert texts[1] == texts[3]
    assert texts[1] != texts[4]


@needs_hopper
def test_a_graph_is_captured_again_while_logits_of_the_one_before_are_kept() -> None:
    model = on_gpu()
    decoder = Decoder(model, 3, 48)
    kept = []
    for _ in range(3):
        tokens = decoder.prefill(PROMPTS).argmax(-1)
        kept.append(decoder.step(tokens))
        checked_step(decoder, tokens)
        with torch.no_grad():
            model.blocks[1].mlp.down.weight.mul_(2)
    assert not torch.equal(kept[0], kept[2])
