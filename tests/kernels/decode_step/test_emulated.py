"""The compiled kernel, executed on the CPU by an emulator of PTX: every program, every thread, every instruction.

A GPU runs the kernel much faster (``test_gpu.py``). The emulator needs none, and can hold a program back.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
language = pytest.importorskip("triton.experimental.gluon.language")
if not hasattr(language, "inline_asm"):
    pytest.skip("needs Triton >= 3.9", allow_module_level=True)

from sbn_kernels.decode.step import ptx, reference
from sbn_kernels.decode.step.plan import Plan, Shape
from sbn_kernels.decode.step.planner import make_plan
from sbn_kernels.decode.step.schedule import schedule
from sbn_kernels.decode.step.weights import pack

from tests.kernels.decode_step import models
from tests.kernels.decode_step.code import Code
from tests.kernels.decode_step.emulator import Memory, Program, run_grid
from tests.kernels.decode_step.test_aot import compile_step

SHAPE, SLOTS = Shape(2, 128, 128, 2, 1, 64, 80), 192
WIDE = Shape(1, 576, 128, 9, 3, 64, 40)  # A row of the head with 8 bits takes two loads of 512 bytes.
CASES = {  # shape, batch, programs, bits of the head
    "one token": (SHAPE, 1, 4, 16),
    "twelve tokens": (SHAPE, 12, 4, 16),
    "three tokens": (SHAPE, 3, 8, 16),
    "one token, 8-bit head": (WIDE, 1, 4, 8),
    "three tokens, 8-bit head": (WIDE, 3, 4, 8),
}


@functools.cache
def compiled(name: str) -> tuple[Plan, Code]:
    shape, batch, programs, head_bits = CASES[name]
    # A wait looks at the clock after 2 polls, not after 64, because the emulator polls slowly. The digest has to be
    # another one, because it stands for the sources in Triton's cache.
    plan = replace(make_plan(shape, batch, programs), digest="polls twice", head_bits=head_bits)
    polls, ptx.POLLS_BEFORE_CHECK = ptx.POLLS_BEFORE_CHECK, 2
    try:
        return plan, Code(compile_step(plan).asm["ptx"])
    finally:
        ptx.POLLS_BEFORE_CHECK = polls


def bits(tensor: Tensor) -> np.ndarray:
    tensor = tensor.contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Step:
    """A decode step in the emulator: the buffers of ``step.DecodeStep``, in emulated memory."""

    def __init__(self, name: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(models, "DEVICE", "cpu")
        self.plan, self.code = compiled(name)
        p, batch = self.plan, self.plan.batch
        shape, head_bits = p.shape, p.head_bits
        self.weights, self.layers = models.random_weights(shape, positions=SLOTS, head_bits=head_bits)
        self.caches = models.random_caches(shape, batch, SLOTS)
        self.tokens = torch.arange(batch) * 7 % shape.vocab
        self.lengths = torch.tensor(lengths)
        self.logits = torch.full((batch, shape.vocab), float("nan")).bfloat16()
        packed, memory = pack(self.weights), Memory()
        addresses = [[memory.add(bits(keys)), memory.add(bits(values))] for keys, values in self.caches]

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*size, dtype=dtype)

        tensors: dict[str, Tensor] = {
            "tokens": self.tokens, "lengths": self.lengths, "state": torch.tensor([1, 0], dtype=torch.int32),
            "caches": torch.tensor(addresses), "cos": packed.cos, "sin": packed.sin, "embedding": packed.embedding,
            "weights": packed.words, "norms": packed.norms, "head": packed.head,
            "head_scale": packed.cos if packed.head_scale is None else packed.head_scale, "logits": self.logits,
            "best": torch.tensor([-(2**63)] * batch + [0]), "chosen": zeros(batch, dtype=torch.int64),
            "x": zeros(batch, p.d_model), "y": zeros(batch, p.d_model), "qkv": zeros(batch, p.qkv_heads, p.head_size),
            "parts": zeros(p.splits, batch, p.heads, p.head_size, dtype=torch.int64),
            "parts_m": zeros(p.splits, batch, p.heads, 2, dtype=torch.int64),
            "attended": zeros(p.direct_parts, batch, p.heads, p.head_size),
            "attended_m": zeros(p.direct_parts, batch, p.heads, 2, dtype=torch.int64),
            "hidden": zeros(batch, p.d_ffn),
            "shared": zeros(2, p.shared_bytes if p.o.shared else 16, dtype=torch.uint8).fill_(ptx.EMPTY),
            "places": zeros(5, batch, 2, dtype=torch.int64),
            "table": torch.tensor(schedule(p), dtype=torch.int32), "trace": torch.zeros(2, dtype=torch.int64),
        }  # fmt: skip
        self.memory, self._tensors = memory, tensors
        self._places = {name: memory.add(bits(tensor)) for name, tensor in tensors.items()}

    def run(self, timeout: int = 10**9, missing: list[int] | None = None) -> Tensor:
        """Run one step; ``timeout`` counts reads of the clock."""
        arguments = [*self._places.values(), timeout, SLOTS, SLOTS, 0, 0]
        shared = 4 * sum(self.plan.pieces)
        grid = [Program(self.code, self.memory, arguments, i, shared) for i in range(self.plan.programs)]
        run_grid(grid, missing or [])
        return self.tensor("logits").view(torch.bfloat16).float()

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.memory.get(self._places[name], bits(self._tensors[name])))

    def zero(self, *names: str) -> None:
        for name in names:
            like: Any = bits(self._tensors[name])
            raw = np.zeros((1, like.nbytes), np.uint8)
            self.memory.write(np.array([self._places[name]]), raw)


@pytest.mark.parametrize("name", CASES)
def test_the_compiled_kernel_computes_what_the_twin_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [(37 * i + 140) % 180 for i in range(CASES[name][1])]
    step = Step(name, lengths, monkeypatch)
    caches = [(keys.clone(), values.clone()) for keys, values in step.caches]
    now = torch.tensor(lengths)
    for _ in range(2 if name == "one token" else 1):
        logits = step.run()
        expected = reference.decode_step(step.weights, step.layers, step.tokens, now, caches)
        now = now + 1
        assert torch.equal(step.tensor("lengths"), now)
        for row, wanted in zip(logits, expected, strict=True):
            assert float((row - wanted).norm() / wanted.norm()) < 0.03
        assert torch.equal(step.tensor("chosen"), logits.argmax(-1))
        assert step.tensor("best").tolist() == [-(2**63)] * CASES[name][1] + [0]
    assert int(step.tensor("state")[1]) == 0


@pytest.mark.parametrize(("name", "missing"), [("one token", 0), ("twelve tokens", 3)])
def test_a_program_that_never_starts_ends_the_step_at_its_deadline(
    name: str, missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(name, [5] * CASES[name][1], monkeypatch)
    step.run(timeout=30, missing=[missing])
    assert int(step.tensor("state")[1]) == 1
    assert step.tensor("lengths").tolist() == [5] * CASES[name][1]
    poisoned = step.tensor("x").clone()
    step.run()  # A step after a failed step does nothing.
    assert torch.equal(step.tensor("x"), poisoned)
    assert step.tensor("lengths").tolist() == [5] * CASES[name][1]
