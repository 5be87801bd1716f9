"""The persistent step never hangs a GPU: lost results, passed deadlines, refused launches, other streams, a long run.

Every wait in the kernel has a deadline. These tests let waits fail in several places and look at three things: the
step ends in time, the error is reported, and the next step after ``recover`` is equal to the last bit.
"""

from __future__ import annotations

import time

import pytest
import torch
from sbn_kernels.decode.step.plan import Shape

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)
pytest.importorskip("triton.experimental.gluon.language")

from sbn_kernels.decode.step.step import DecodeStep, StepTimeoutError
from sbn_kernels.decode.step.weights import PackedWeights, pack

from tests.kernels.decode_step.models import DEVICE, random_caches, random_weights

SHAPE = Shape(2, 1536, 8960, 12, 2, 128, 1003)
SLOTS, LENGTH, NEVER = 512, 100, 2**31 - 1


@pytest.fixture(scope="module")
def packed() -> PackedWeights:
    return pack(random_weights(SHAPE)[0])


def make_step(packed: PackedWeights, batch: int, timeout: float = 2.0) -> DecodeStep:
    step = DecodeStep(packed, random_caches(SHAPE, batch, SLOTS), SLOTS, timeout=timeout)
    step.lengths.fill_(LENGTH)
    return step


def logits_of(step: DecodeStep) -> torch.Tensor:
    step.lengths.fill_(LENGTH)
    logits = step.step(step.tokens).clone()
    step.check()
    return logits


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize(("program", "unit"), [(0, 0), (131, 1), (60, 5)])
def test_a_program_without_weights_ends_the_step_and_harms_no_later_one(
    packed: PackedWeights, batch: int, program: int, unit: int
) -> None:
    step = make_step(packed, batch, timeout=0.2)
    expected = logits_of(step)
    table = step._table.clone()
    step._table[program, unit:, 3] = NEVER  # From this unit on the program waits in vain, and all others for it.
    step.lengths.fill_(LENGTH)
    started = time.perf_counter()
    step.step(step.tokens)
    torch.cuda.synchronize()
    assert 0.1 < time.perf_counter() - started < 2
    with pytest.raises(StepTimeoutError, match=r"waited longer than timeout=0\.2 seconds"):
        step.check()
    assert int(step.flag) != 0
    before = step.lengths.clone()
    started = time.perf_counter()
    for _ in range(20):  # Steps after a failed step do nothing, and take no time.
        step.step(step.tokens)
    torch.cuda.synchronize()
    assert time.perf_counter() - started < 0.2
    assert torch.equal(step.lengths, before)
    step._table.copy_(table)
    step.recover()
    assert torch.equal(logits_of(step), expected)


@pytest.mark.parametrize("batch", [1, 16])
def test_two_steps_on_two_streams_do_not_disturb_each_other(packed: PackedWeights, batch: int) -> None:
    steps = [make_step(packed, batch), make_step(packed, batch)]
    expected = [logits_of(step) for step in steps]
    assert torch.equal(*expected)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(100):
        for step, stream in zip(steps, streams, strict=True):
            with torch.cuda.stream(stream):
                step.lengths.fill_(LENGTH)
                step.step(step.tokens)
    torch.cuda.synchronize()
    for step, logits in zip(steps, expected, strict=True):
        step.check()
        assert torch.equal(step.logits, logits)


def test_a_step_waits_its_turn_behind_long_work_on_another_stream(packed: PackedWeights) -> None:
    step = make_step(packed, 1, timeout=0.5)
    expected = logits_of(step)
    side = torch.cuda.Stream()
    matrix = torch.randn(16384, 16384, device=DEVICE, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    for _ in range(3):
        with torch.cuda.stream(side):
            for _ in range(20):  # About a quarter of a second: the launch finds every multiprocessor taken.
                matrix @ matrix
        assert torch.equal(logits_of(step), expected)
        torch.cuda.synchronize()


@pytest.mark.parametrize("programs", [8, 61])
def test_a_smaller_grid_gives_the_same_codes_and_close_logits(packed: PackedWeights, programs: int) -> None:
    """As on a GPU with fewer multiprocessors, or where other work holds some of them."""
    expected = logits_of(make_step(packed, 4)).float()
    step = DecodeStep(packed, random_caches(SHAPE, 4, SLOTS), SLOTS, programs=programs)
    logits = logits_of(step).float()
    assert float((logits - expected).norm() / expected.norm()) < 0.03
    assert step.plan.programs == programs


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_a_thousand_steps_with_changing_inputs_repeat_to_the_last_bit(packed: PackedWeights, batch: int) -> None:
    step = make_step(packed, batch)
    start = [(keys.clone(), values.clone()) for keys, values in step.caches]
    generator = torch.Generator(DEVICE).manual_seed(2)
    tokens = torch.randint(SHAPE.vocab, (1000, batch), device=DEVICE, generator=generator)
    lengths = torch.randint(SLOTS, (1000, batch), device=DEVICE, generator=generator)
    runs = []
    for _ in range(2):
        for (keys, values), (old_keys, old_values) in zip(step.caches, start, strict=True):
            keys.copy_(old_keys)
            values.copy_(old_values)
        sums = []
        for i in range(1000):
            step.lengths.copy_(lengths[i])
            sums.append(step.step(tokens[i]).view(torch.int16).sum(dtype=torch.int64))
        step.check()
        runs.append(torch.stack(sums))
    assert torch.equal(*runs)
    assert len(runs[0].unique()) > 900  # The inputs did change.
