"""The choice between the persistent step and the layers of a model: checked first, then measured, then remembered."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from sbn_lightning.formats.assemble import cast_model
from sbn_lightning.inference import Decoder, choice
from sbn_lightning.inference import decoder as decoder_module
from tests.inference.test_persistent import ReferenceStep, make

ALL = torch.ones(2, dtype=torch.bool)
LENGTHS = torch.tensor([3, 4])
LOGITS = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_verdicts", {})


def slow(seconds: float, logits: torch.Tensor = LOGITS) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        time.sleep(seconds)
        return logits

    return call


def never() -> None:
    """Check nothing."""


def test_the_faster_path_is_taken_and_remembered() -> None:
    verdict = choice.judge(("a",), slow(0), slow(0.005), never, ALL, LENGTHS)
    assert verdict.kind == "persistent"
    assert "ms a step, the layers of the model 5." in verdict.reason
    assert choice.known(("a",)) is verdict
    verdict = choice.judge(("b",), slow(0.005), slow(0), never, ALL, LENGTHS)
    assert verdict.kind == "graph"
    assert verdict.reason.startswith("is slower: 5.")
    assert choice.known(("c",)) is None


def test_other_logits_are_not_used_however_fast_they_come() -> None:
    verdict = choice.judge(("a",), slow(0, 2 * LOGITS), slow(0.005), never, ALL, LENGTHS)
    assert verdict.kind == "graph"
    assert "its logits differ from those of the layers by 1.000" in verdict.reason
    assert choice.judge(("b",), slow(0, LOGITS * float("nan")), slow(0), never, ALL, LENGTHS).kind == "graph"


def test_a_row_without_a_sequence_is_not_compared() -> None:
    logits = LOGITS.clone()
    logits[1] = 0
    assert choice.difference(logits, LOGITS, torch.tensor([True, False])) is None
    assert choice.difference(logits, LOGITS, ALL) is not None


def test_another_token_is_accepted_only_where_it_is_about_as_likely() -> None:
    expected = torch.zeros(1, 400)
    expected[0, :200], expected[0, 0], expected[0, 1] = -1, 9.0, 8.9
    near, far = expected.clone(), expected.clone()
    near[0, 1], far[0, 2] = 9.1, 9.1
    one = torch.ones(1, dtype=torch.bool)
    assert choice.difference(near, expected, one) is None
    far_expected = expected.clone()
    far_expected[0, 2] = 6.0
    assert "standard deviations behind" in str(choice.difference(far, far_expected, one))


def test_a_step_that_fails_while_it_is_measured_gives_way() -> None:
    def fail() -> None:
        raise RuntimeError("a decode step waited longer\nthan its deadline")

    verdict = choice.judge(("a",), slow(0), slow(0), fail, ALL, LENGTHS)
    assert verdict == choice.Verdict("graph", "is not used: a decode step waited longer")


@pytest.mark.parametrize("kind", ["persistent", "graph"])
def test_a_decoder_measures_at_its_first_step_and_the_next_decoder_does_not(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "persistent_step", ReferenceStep)
    monkeypatch.setattr(decoder_module, "refusal", lambda model, batch_size: None)
    monkeypatch.setattr(
        choice, "_milliseconds", lambda first, second, device: (1.0, 2.0) if kind == "persistent" else (2.0, 1.0)
    )
    ReferenceStep.made = 0
    model = make(qkv_bias=True, init_std=0.08).requires_grad_(False)
    cast_model(model, torch.bfloat16)
    plain = Decoder(model, 2, 20)
    expected = [plain.prefill([[1, 2, 3], [4, 5]]), *(plain.step(torch.tensor([i, i])) for i in range(3))]
    for made in (1, 2 if kind == "persistent" else 1):
        decoder = Decoder(model, 2, 20, step="auto")
        logits = [decoder.prefill([[1, 2, 3], [4, 5]]), *(decoder.step(torch.tensor([i, i])) for i in range(3))]
        assert decoder.lengths.tolist() == [6, 5]
        assert decoder.kind == kind
        assert ReferenceStep.made == made
        for ours, theirs in zip(logits, expected, strict=True):
            assert float((ours.float() - theirs.float()).norm() / theirs.float().norm()) < 0.05
    if kind == "persistent":
        assert decoder.choice == "one persistent kernel: 1.000 ms a step, the layers of the model 2.000 ms"
    else:
        assert decoder.choice.startswith("the layers of the model; the persistent kernel is slower: 2.000 ms a step")


def test_after_a_step_that_passed_its_deadline_the_layers_of_the_model_take_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(step: ReferenceStep) -> None:
        raise RuntimeError("a decode step waited longer than its deadline")

    monkeypatch.setattr(decoder_module, "persistent_step", ReferenceStep)
    monkeypatch.setattr(decoder_module, "refusal", lambda model, batch_size: None)
    monkeypatch.setattr(choice, "_milliseconds", lambda first, second, device: (1.0, 2.0))
    model = make(qkv_bias=True, init_std=0.08).requires_grad_(False)
    cast_model(model, torch.bfloat16)
    plain = Decoder(model, 1, 20)
    expected = [plain.prefill([[1, 2, 3]]), plain.step(torch.tensor([4]))]
    decoder = Decoder(model, 1, 20, step="auto")
    decoder.prefill([[1, 2, 3]])
    decoder.step(torch.tensor([4]))
    assert decoder.kind == "persistent"
    monkeypatch.setattr(ReferenceStep, "check", fail)
    with pytest.raises(RuntimeError, match="deadline"):
        decoder.check()
    for later in (decoder, Decoder(model, 1, 20, step="auto")):
        logits = [later.prefill([[1, 2, 3]]), later.step(torch.tensor([4]))]
        later.check()
        assert later.choice == (
            "the layers of the model; the persistent kernel is not used any more: a step passed its deadline"
        )
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected, strict=True))
