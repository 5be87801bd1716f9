"""When the weights of a decode step are copied into the ring in shared memory, and where.

The order in which a program uses weights is known in advance. So the host computes the whole schedule with a
first-in-first-out allocator, and the kernel follows the schedule. Usually a program has a layer's weights ahead
of their use. For a large model or a small grid there is room for a part of a layer only; the kernel is the same.

A *unit* is what a program multiplies at a time: up to a few tiles of one matrix, one contiguous copy.
"""

from __future__ import annotations

import functools
from collections import deque

from sbn_kernels.decode.step.plan import Plan, share


def _program_units(plan: Plan, program: int) -> list[tuple[int, int]]:
    """The units of one layer of a program in the order of use: offset in the layer and size, in bytes."""
    units, base = [], 0
    for f in plan.phases:
        first, count = share(f.all_tiles, plan.programs, program)
        for start in range(first, first + count, f.tiles):
            tiles = min(f.tiles, first + count - start)
            units.append((base + start * f.tile_bytes, tiles * f.tile_bytes))
        base += f.all_tiles * f.tile_bytes
    return units


def _ahead(units: int) -> int:
    """How many units ahead of use a unit is copied: one layer, and at least two, so that one copy is always running."""
    return max(units, 2)


@functools.lru_cache(maxsize=256)
def _places(sizes: tuple[int, ...], ring: int, barriers: int, ahead: int) -> list[tuple[int, int]]:
    """For each unit its offset in the ring and the unit after whose use it may be copied (-1: at once).

    The ring is a queue of contiguous pieces: a piece that does not fit before the end goes to the start. A unit is
    copied at most ``ahead`` units before its use.
    """
    places: list[tuple[int, int]] = []
    live: deque[tuple[int, int, int]] = deque()  # unit, start, end
    used = -1  # all units up to this one have to have been used
    write = 0
    for unit, size in enumerate(sizes):
        while True:
            if not live:
                write = 0 if write + size > ring else write
                fits = True
            elif write > live[0][1]:
                if write + size <= ring:
                    fits = True
                elif size <= live[0][1]:
                    write, fits = 0, True
                else:
                    fits = False
            else:  # wrapped: the oldest piece lies ahead
                fits = write + size <= live[0][1]
            if fits and len(live) < barriers:
                break
            used = live.popleft()[0]
        # Further ahead gains nothing, and would move the copies to times when a hand-over is in progress.
        used = max(used, unit - ahead)
        places.append((write, used))
        live.append((unit, write, write + size))
        write += size
    return places


def schedule(plan: Plan) -> list[list[tuple[int, int, int, int]]]:
    """The copies of every program.

    Returns:
        For each program ``plan.units + 1`` rows: offset in the ring in bytes, size in bytes, offset in the packed
        weights in units of 16 bytes, and the unit after whose use the copy may start. Behind the last unit stands a row
        that never starts.
    """
    never = (0, 0, 0, 2**31 - 1)
    table = []
    for program in range(plan.programs):
        layer = _program_units(plan, program)
        per_layer, units = len(layer), layer * plan.layers
        places = _places(tuple(size for _, size in units), plan.ring_bytes, plan.barriers, _ahead(per_layer))
        rows = [
            (at, size, (i // per_layer * plan.layer_bytes + offset) // 16, after)
            for i, ((offset, size), (at, after)) in enumerate(zip(units, places, strict=True))
        ]
        table.append(rows + [never] * (plan.units + 1 - len(rows)))
    return table


def early_o(plan: Plan) -> bool:
    """Whether all units of o may be copied before the last product with q, k and v, in every program."""
    for program in sorted({0, *(f.all_tiles % plan.programs for f in plan.phases), plan.programs - 1}):
        if program >= plan.programs or not share(plan.o.all_tiles, plan.programs, program)[1]:
            continue
        qkv = -(-share(plan.qkv.all_tiles, plan.programs, program)[1] // plan.qkv.tiles)
        o = -(-share(plan.o.all_tiles, plan.programs, program)[1] // plan.o.tiles)
        units = _program_units(plan, program)
        places = _places(
            tuple(size for _, size in units * plan.layers), plan.ring_bytes, plan.barriers, _ahead(len(units))
        )
        for layer in range(plan.layers):
            first = layer * len(units) + qkv
            if any(after > first - 2 for _, after in places[first : first + o]):
                return False
    return True
