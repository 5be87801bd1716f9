"""The kernel against its twin, and what it does when something goes wrong. Needs a Hopper GPU."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from sbn_kernels.decode.step.plan import Shape

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)
pytest.importorskip("triton.experimental.gluon.language")

from sbn_kernels.decode.step import reference
from sbn_kernels.decode.step.step import DecodeStep, StepTimeoutError, StepUnavailableError, supports
from sbn_kernels.decode.step.weights import pack

from tests.kernels.decode_step.models import DEVICE, random_caches, random_weights, words

SMALL = Shape(2, 896, 4864, 14, 2, 64, 1003)
MIDDLE = Shape(2, 1536, 8960, 12, 2, 128, 1003)
LARGE = Shape(2, 2048, 11008, 16, 2, 128, 1003)
CASES = {
    "0.5b, empty cache": (SMALL, [0], None),
    "0.5b, long": (SMALL, [3000], None),
    "1.5b, one part": (MIDDLE, [100], None),
    "1.5b, two parts": (MIDDLE, [255], None),
    "1.5b, two long parts": (MIDDLE, [500], None),
    "1.5b, joined parts": (MIDDLE, [1500], None),
    "3b": (LARGE, [300], None),
    "tiny": (Shape(3, 256, 704, 4, 2, 64, 517), [17], None),
    "no whole steps, no groups": (Shape(2, 320, 720, 5, 5, 64, 1003), [300], None),
    "llama-like": (Shape(1, 4096, 14336, 32, 8, 128, 1003), [100], None),
    "few programs": (MIDDLE, [300], 40),
    "very few programs": (MIDDLE, [1500], 8),
    "two tokens": (MIDDLE, [255, 3], None),
    "three tokens": (SMALL, [10, 200, 3000], None),
    "eight tokens": (MIDDLE, [1500, 700, 1, 2, 3, 4, 2000, 5], None),
    "four tokens, few programs": (SMALL, [300, 1, 2, 3], 16),
    "nine tokens": (SMALL, [10, 200, 600, 1, 2, 3, 4, 5, 6], None),
    "twelve tokens": (LARGE, [1500, 700, 1, 2, 3, 4, 2000, 5, 6, 7, 8, 9], None),
    "sixteen tokens": (MIDDLE, [255, 0, 1, 511, 4, 100, 300, 5, 6, 7, 8, 9, 10, 11, 12, 600], None),
    "sixteen tokens, few programs": (SMALL, [300 + i for i in range(16)], 10),
    "sixteen tokens, no whole steps": (Shape(2, 320, 720, 5, 5, 64, 1003), list(range(16)), None),
    "one token, 8-bit head": (MIDDLE, [255], None),
    "two tokens, 8-bit head, no whole steps": (Shape(2, 320, 720, 5, 5, 64, 1003), [3, 200], None),
    "four tokens, 8-bit head": (SMALL, [10, 200, 3000, 1], None),
    "sixteen tokens, 8-bit head": (LARGE, list(range(16)), None),
}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_the_twin(name: str) -> None:
    shape, lengths, programs = CASES[name]
    head_bits = 8 if "8-bit" in name else 16
    weights, layers = random_weights(shape, bias="llama" not in name, tied="tiny" in name, head_bits=head_bits)
    slots = (max(lengths) + 68) // 64 * 64
    caches = random_caches(shape, len(lengths), slots)
    expected_caches = [(k.clone(), v.clone()) for k, v in caches]
    step = DecodeStep(pack(weights), caches, slots, logits_dtype=torch.float32, programs=programs)
    now = torch.tensor(lengths, device=DEVICE)
    step.lengths.copy_(now)
    step.logits.fill_(float("nan"))
    for i in range(3):
        tokens = torch.randint(0, shape.vocab, (len(lengths),), device=DEVICE)
        logits = step.step(tokens)
        step.check()
        expected = reference.decode_step(weights, layers, tokens, now, expected_caches)
        # Attention rounds its weights to bfloat16, and with random weights each layer amplifies that.
        assert relative(logits, expected) < 0.03, i
        assert torch.equal(step.chosen, logits.argmax(-1))
        now = now + 1
        assert torch.equal(step.lengths, now)
    for (keys, values), (expected_keys, expected_values) in zip(caches, expected_caches, strict=True):
        assert relative(keys, expected_keys) < 0.03
        assert relative(values, expected_values) < 0.03


@pytest.mark.parametrize("shape", [SMALL, MIDDLE, LARGE], ids=["0.5b", "1.5b", "3b"])
def test_the_last_layer_is_exact_from_its_own_inputs(shape: Shape) -> None:
    weights, layers = random_weights(replace(shape, layers=1))
    caches = random_caches(weights.shape, 1, 128)
    step = DecodeStep(pack(weights), caches, 128, logits_dtype=torch.float32)
    step.lengths.fill_(60)
    logits = step.step(torch.tensor([7], device=DEVICE))
    step.check()
    layer, s = layers[0], weights.shape
    bf16 = torch.bfloat16
    normed = reference.rms_norm(weights.embedding[7:8].to(bf16), layer.attention_norm, s.eps)
    heads = reference.ternary_linear(normed.float(), layer.qkv).view(1, -1, s.head_size)
    cos, sin = weights.cos[60].view(1, 1, -1), weights.sin[60].view(1, 1, -1)
    turned = reference.rotate(heads[:, : s.heads + s.kv_heads], cos, sin)
    assert torch.equal(words(step._qkv), torch.cat([turned, heads[:, s.heads + s.kv_heads :]], 1).float())
    y, x = words(step._y), words(step._x)
    gate_up = reference.ternary_linear(reference.rms_norm(y.to(bf16), layer.mlp_norm, s.eps).float(), layer.gate_up)
    gate, up = gate_up.float().chunk(2, -1)
    hidden = words(step._hidden)
    assert relative(hidden, gate / (1 + torch.exp(-gate)) * up) < 2e-5
    down = reference.ternary_linear(hidden, layer.down)
    assert torch.equal(x, (y + down.float()).to(bf16).float())
    final = reference.rms_norm(x.to(bf16), weights.norm, s.eps).float()
    assert relative(logits, final @ weights.head.float().t()) < 1e-5


def make_step(**options: object) -> tuple[DecodeStep, torch.Tensor]:
    """Make a step at position 100, and compute the logits after token 0."""
    weights, _ = random_weights(MIDDLE)
    step = DecodeStep(pack(weights), random_caches(MIDDLE, 1, 512), 512, **options)  # type: ignore[arg-type]
    step.lengths.fill_(100)
    logits = step.step(step.tokens).clone()
    step.check()
    return step, logits


def test_replays_give_equal_bits_also_beside_other_work() -> None:
    step, expected = make_step()
    busy, side = torch.randn(4096, 4096, device=DEVICE), torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(side):
            for _ in range(3):
                busy @ busy
        for _ in range(25):
            step.lengths.fill_(100)
            step.step(step.tokens)
        assert torch.equal(step.logits, expected)
    step.check()


def test_the_tokens_that_a_step_has_chosen_continue_without_a_copy() -> None:
    step, logits = make_step()
    tokens, kept = logits.argmax(-1), []
    for source in (tokens, step.chosen):
        step.lengths.fill_(101)
        kept.append(step.step(source).clone())
        step.chosen.copy_(tokens)
    step.check()
    assert torch.equal(*kept)


def test_a_traced_step_says_when_each_program_reached_each_moment() -> None:
    step, expected = make_step(traced=True)
    times = step.trace[:, :-1, :, 1]
    assert (times[:, :, 0] > 0).all()  # every program begins every layer
    reached = torch.where(times > 0, times, times.cummax(-1).values)
    assert (reached.diff(dim=-1) >= 0).all()
    assert torch.equal(expected, make_step()[1])


def test_a_full_row_stays_at_its_length() -> None:
    step, _ = make_step()
    step.lengths.fill_(512)
    step.step(step.tokens)
    step.check()
    assert step.lengths.tolist() == [512]


def test_a_lost_copy_ends_the_step_and_recovery_repeats_it() -> None:
    step, expected = make_step(timeout=0.2)
    table = step._table.clone()
    step._table[5, 0, 3] = 2**31 - 1  # program 5 never gets its first weights
    step.lengths.fill_(100)
    started = time.perf_counter()
    step.step(step.tokens)
    torch.cuda.synchronize()
    assert 0.1 < time.perf_counter() - started < 2
    with pytest.raises(StepTimeoutError, match="recover"):
        step.check()
    step.step(step.tokens)  # this call does nothing
    assert step.lengths.tolist() == [100]
    step._table.copy_(table)
    step.recover()
    step.lengths.fill_(100)
    logits = step.step(step.tokens)
    step.check()
    assert torch.equal(logits, expected)


def test_more_programs_than_fit_are_refused_and_leave_the_device_well() -> None:
    with pytest.raises(StepUnavailableError, match="at the same time"):
        make_step(programs=264)
    make_step()


def test_supports_says_why_not() -> None:
    assert supports(MIDDLE, 1, torch.device(DEVICE)) is None
    assert "CUDA" in str(supports(MIDDLE, 1, torch.device("cpu")))
    assert "1 to 16" in str(supports(MIDDLE, 64, torch.device(DEVICE)))
