"""Makes the plan of a decode step: the units of each matrix, the parts of a context, and the map of shared memory."""

from __future__ import annotations

import dataclasses

from sbn_kernels.decode.step.plan import (
    COLUMNS,
    GROUP_HEADS,
    MERGE_SPLITS,
    ONE_PARTS,
    PARTLY_SHARED_FROM,
    PHASES,
    ROW_DATA,
    SHARED_BYTES,
    SHARED_FROM,
    SHARED_PARTS,
    STEP,
    TILE_ROWS,
    WARPS,
    Phase,
    Plan,
    Shape,
    refusal,
    share,
    source_digest,
    tiles_at_most,
)
from sbn_kernels.decode.step.schedule import early_o

# For one or two sequences a warp holds whole rows of the head, 64 registers a lane (``output.head_of_few``).
_WIDEST_OF_FEW = 4096


def _split_k(steps: int, tiles: int, batch: int) -> int:
    """Warps that split K, for the fewest steps in a row that a warp takes."""
    if batch > COLUMNS and tiles > 2:
        return 4  # More would take too much memory for partial sums; fewer, too many registers for the tokens.
    # What the partial sums of a tile and of a group cost, in steps. One or two tiles are a matter of latency.
    tile_cost, group_cost = (0.8, 0.5) if tiles > 2 else (0.0, 0.25)
    return min((8, 4, 2, 1), key=lambda g: (-(-steps // g) + tile_cost) * -(-tiles * g // WARPS) + group_cost * g)


def make_plan(
    shape: Shape,
    batch: int,
    programs: int,
    shared_bytes: int = SHARED_BYTES,
    shared_codes: bool | None = None,
) -> Plan:
    """Plans a decode step.

    Args:
        shape: The shape of the model.
        batch: The number of sequences, which add one token each.
        programs: The largest number of programs; at most one for each multiprocessor.
        shared_bytes: The shared memory of a program, in bytes.
        shared_codes: Whether each token is quantised once for all programs, for batches of 3 and more; None decides by
            the batch. Above 8 sequences there is no other way.

    Returns:
        The plan.

    Raises:
        ValueError: If :func:`refusal` has a reason, if a row of the head does not fit into registers, or if the weights
            of a tile do not fit into shared memory.
    """
    reason = refusal(shape, batch)
    if reason is not None:
        raise ValueError(f"the persistent decode step {reason}")
    if batch <= 2 and shape.d_model > _WIDEST_OF_FEW:
        raise ValueError(f"needs d_model up to {_WIDEST_OF_FEW} for one or two sequences, not {shape.d_model}")
    s = shape
    rows = {"qkv": s.d_model + 2 * s.kv_heads * s.head_size, "o": s.d_model, "gate_up": 2 * s.d_ffn, "down": s.d_model}
    # Every program has a tile of gate_up, so that each step ends in all programs after it has begun in all.
    programs = min(programs, rows["gate_up"] // TILE_ROWS)
    pieces = _pieces(shared_bytes)
    room = 4 * sum(pieces)
    slots = 1 << (batch - 1).bit_length()
    per_kv_head = s.heads // s.kv_heads
    group = next(g for g in range(min(GROUP_HEADS, per_kv_head), 0, -1) if per_kv_head % g == 0)
    splits = max(1, min(MERGE_SPLITS, programs // (batch * s.heads // group)))
    shared = batch >= SHARED_FROM if shared_codes is None else shared_codes and batch >= 3
    if batch > COLUMNS and not shared:
        raise ValueError(f"the codes of {batch} tokens must be shared, because shared memory has no room for them")
    partly = shared or batch >= PARTLY_SHARED_FROM
    direct_parts = min(SHARED_PARTS, splits) if partly else ONE_PARTS if batch == 1 else 1
    if splits < 2 * direct_parts:
        splits = direct_parts  # A phase that joins the parts takes longer than a few more parts save.
    for most_tiles in (16, 8, 4, 2, 1):
        phases = {}
        for name in PHASES:
            columns = s.d_ffn if name == "down" else s.d_model
            all_tiles = rows[name] // TILE_ROWS
            tiles = min(most_tiles, tiles_at_most(all_tiles, programs))
            steps = -(-columns // STEP)
            while tiles > 1 and tiles * (steps * 512 + ROW_DATA) > room // 2:
                tiles -= 1
            mine = tiles_at_most(all_tiles, programs)
            tiles = -(-mine // -(-mine // tiles))  # units of about the same size
            phases[name] = Phase(
                columns, all_tiles, tiles, _split_k(steps, tiles, batch), partly if name in ("o", "down") else shared
            )
        units = s.layers * max(
            sum(-(-share(f.all_tiles, programs, i)[1] // f.tiles) for f in phases.values()) for i in range(programs)
        )
        plan = Plan(
            s, batch, slots, programs, group, splits, qkv=phases["qkv"], o=phases["o"], gate_up=phases["gate_up"],
            down=phases["down"], units=units, barriers=64, early_o=False,
            ring_bytes=0, pieces=pieces, digest=source_digest(), direct_parts=direct_parts, shared_codes=shared,
        )  # fmt: skip
        ring = room - plan.at_ring
        if ring >= max(f.tiles * f.tile_bytes for f in plan.phases) and plan.staging_end <= room:
            plan = dataclasses.replace(plan, ring_bytes=ring)
            return dataclasses.replace(plan, early_o=early_o(plan))
    raise ValueError(
        f"needs more than {shared_bytes} bytes of shared memory for a tile of d_ffn={s.d_ffn} columns and "
        f"{batch} tokens"
    )


def _pieces(shared_bytes: int) -> tuple[int, int, int]:
    """Three powers of two, in words, that fill shared memory as far as three can."""
    pieces, left = [], shared_bytes // 4
    for _ in range(3):
        pieces.append(1 << (left.bit_length() - 1))
        left -= pieces[-1]
    return pieces[0], pieces[1], pieces[2]
