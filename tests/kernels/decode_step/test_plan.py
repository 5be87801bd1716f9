"""Plans and packing, on the CPU: shares, schedules, refusals, the packed form."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sbn_kernels.decode.step.packing import gate_up_order, pack_tiles, qkv_order, unpack_tiles
from sbn_kernels.decode.step.plan import Shape, refusal, share
from sbn_kernels.decode.step.planner import make_plan
from sbn_kernels.decode.step.schedule import schedule
from sbn_kernels.decode.step.step import DecodeStep, StepUnavailableError
from triton import TritonError

SMALL = Shape(2, 896, 4864, 14, 2, 64, 1003)
MIDDLE = Shape(2, 1536, 8960, 12, 2, 128, 1003)
LARGE = Shape(2, 2048, 11008, 16, 2, 128, 1003)
LLAMA = Shape(2, 4096, 14336, 32, 8, 128, 1003)
SHAPES = {"0.5b": SMALL, "1.5b": MIDDLE, "3b": LARGE, "llama 8b": LLAMA}


@pytest.mark.parametrize("programs", [8, 132])
@pytest.mark.parametrize("batch", [1, 3, 8, 16])
@pytest.mark.parametrize("name", SHAPES)
def test_the_schedule_overwrites_no_weights_in_use(name: str, batch: int, programs: int) -> None:
    try:
        plan = make_plan(SHAPES[name], batch, programs)
    except ValueError as error:
        if name == "llama 8b" and batch >= 8 and programs == 8 and "shared memory" in str(error):
            return
        raise
    assert plan.at_ring + plan.ring_bytes <= 4 * sum(plan.pieces) <= 232448
    table = schedule(plan)
    copied = 0
    for rows in table:
        units = [row for row in rows if row[1]]
        copied += sum(size for _, size, _, _ in units)
        for i, (at, size, source, after) in enumerate(units):
            assert after < i
            assert at + size <= plan.ring_bytes
            assert at % 16 == size % 16 == 0
            assert i - after <= plan.barriers
            assert 16 * source + size <= plan.layers * plan.layer_bytes
            for other_at, other_size, _, _ in units[after + 1 : i]:
                assert at + size <= other_at or other_at + other_size <= at
    assert copied == plan.layers * plan.layer_bytes


@pytest.mark.parametrize("programs", [8, 40, 132])
@pytest.mark.parametrize("batch", [1, 8, 12])
@pytest.mark.parametrize("name", ["0.5b", "1.5b", "3b"])
def test_the_kernel_waits_only_for_copies_that_have_started(name: str, batch: int, programs: int) -> None:
    """Walk through a step as the kernel does: copies start before each product, except before the product with o."""
    plan = make_plan(replace(SHAPES[name], layers=4), batch, programs)
    for program, rows in enumerate(schedule(plan)):
        following = unit = 0

        def start_copies(used: int, rows: list[tuple[int, int, int, int]] = rows) -> None:
            nonlocal following
            while rows[following][3] <= used:
                following += 1

        start_copies(-1)
        for _ in range(plan.layers):
            for f in plan.phases:
                _, tiles = share(f.all_tiles, plan.programs, program)
                for _ in range(0, tiles, f.tiles):
                    if f is not plan.o or not plan.early_o:
                        start_copies(unit - 1)
                    assert unit < following
                    unit += 1
        assert following == unit


@pytest.mark.parametrize(("tiles", "programs"), [(96, 132), (128, 132), (1120, 132), (5, 3)])
def test_shares_cover_all_tiles_once(tiles: int, programs: int) -> None:
    owned = [
        i for p in range(programs) for first, count in [share(tiles, programs, p)] for i in range(first, first + count)
    ]
    assert owned == list(range(tiles))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_size": 96, "heads": 16}, "heads of 64 or 128"),
        ({"d_model": 1544, "heads": 12}, "= d_model"),
        ({"d_ffn": 8964}, "divisible by 16"),
        ({"kv_heads": 5}, "divisible by kv_heads"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(changes: dict[str, int], reason: str) -> None:
    found = refusal(Shape(**{**MIDDLE.__dict__, **changes}), 1)
    assert found is not None
    assert reason in found


def test_batches_and_activations_beyond_reach_are_refused() -> None:
    assert "1 to 16" in str(refusal(MIDDLE, 17))
    assert "activation_bits" in str(refusal(MIDDLE, 1, 4))
    assert refusal(MIDDLE, 16) is None
    wide = Shape(2, 5120, 13824, 40, 8, 128, 32000)
    with pytest.raises(ValueError, match="needs d_model up to 4096 for one or two sequences, not 5120"):
        make_plan(wide, 2, 132)
    assert make_plan(wide, 3, 132).batch == 3
    with pytest.raises(ValueError, match="the codes of 9 tokens must be shared"):
        make_plan(MIDDLE, 9, 132, shared_codes=False)


@pytest.mark.parametrize("columns", [128, 300, 896])
def test_packing_keeps_codes_scales_and_biases(columns: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-1, 2, (48, columns), dtype=torch.int8)
    scale, bias = torch.rand(48), torch.randn(48)
    unpacked = unpack_tiles(pack_tiles(codes, scale, bias), columns)
    assert torch.equal(unpacked[0], codes)
    assert torch.equal(unpacked[1], scale)
    assert torch.equal(unpacked[2], bias)


def test_orders_are_permutations_that_pair_what_belongs_together() -> None:
    order = qkv_order(3, 64, "cpu")
    assert order.sort().values.equal(torch.arange(192))
    assert (order.view(-1, 2, 8)[:, 1] - order.view(-1, 2, 8)[:, 0] == 32).all()
    order = gate_up_order(48, "cpu")
    assert order.sort().values.equal(torch.arange(96))
    assert (order.view(-1, 2, 8)[:, 1] - order.view(-1, 2, 8)[:, 0] == 48).all()


@pytest.mark.parametrize("error", [TritonError("shared memory"), RuntimeError("too many programs")])
def test_a_step_that_cannot_be_launched_is_unavailable(error: Exception) -> None:
    """The choice between paths goes on with the other path. A bare error of Triton would end it."""

    def launch(tokens: torch.Tensor) -> None:
        raise error

    step = SimpleNamespace(_state=[0, 0], _launch=launch, tokens=torch.zeros(1), plan=make_plan(SMALL, 1, 8))
    with pytest.raises(StepUnavailableError, match=str(error)):
        DecodeStep._try_launch(step)  # type: ignore[arg-type]
