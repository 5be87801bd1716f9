"""Building blocks of the inline PTX in this package: waits with a bound, reductions, floating-point literals.

Every function here returns lines of PTX. Triton runs the generators of inline PTX while it compiles, and hashes the
functions that a generator calls. :func:`helper` marks plain Python functions, so that Triton calls them unchanged.
Triton's cache then cannot see a change in a helper, so the kernel takes a digest of this package's sources as a
constant (:func:`sbn_kernels.decode.step.plan.source_digest`).

Vectors travel between multiprocessors as *words*: 32 bits, of which the upper 24 are a float32 cut to 15 bits of
mantissa (a bfloat16 fits exactly) and the lower 8 are the tag of the layer that wrote it. A reader polls the words
themselves until each carries the tag it waits for, so neither a barrier nor a fence is needed. A 32-bit access is
single, so value and tag cannot be torn apart.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from triton.experimental import gluon

POLLS_BEFORE_CHECK = 64  # polls between two looks at the clock and at the error flag
TIMED_OUT = 1  # value of the error flag
BF16_HIGH = "0xffff0000"
VALUE = "0xffffff00"
EMPTY = 0x80  # byte of a vector of codes that has not come; codes are -127 to 127


def helper(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a plain Python function that generators of inline PTX may call."""
    function.__triton_builtin__ = True  # type: ignore[attr-defined]
    return function


@helper
def assembly(function: Callable[..., str]) -> Any:
    """Wraps an inner function ``(outputs, inputs) -> PTX`` for ``gl.inline_asm``."""
    return gluon.constexpr_function(function)


@helper
def f32(value: float) -> str:
    """A float32 literal."""
    return "0f" + struct.pack(">f", value).hex().upper()


@helper
def _bounded(name: str, loads: list[str], verdict: list[str], flag: str, deadline: str) -> list[str]:
    """Repeats ``loads`` until ``verdict`` leaves 0 in ``{name}d``, the error flag is set, or the deadline is over."""
    return [
        f".reg .b32 {name}d, {name}c; .reg .u64 {name}now; .reg .pred {name}p; mov.b32 {name}c, 0;",
        f"{name}AGAIN:",
        *loads,
        *verdict,
        f"setp.eq.u32 {name}p, {name}d, 0; @{name}p bra {name}ARRIVED;",
        f"add.u32 {name}c, {name}c, 1; and.b32 {name}d, {name}c, {POLLS_BEFORE_CHECK - 1};",
        f"setp.ne.u32 {name}p, {name}d, 0; @{name}p bra {name}AGAIN;",
        f"ld.relaxed.gpu.global.u32 {name}d, [{flag}]; setp.ne.u32 {name}p, {name}d, 0; @{name}p bra {name}ARRIVED;",
        f"mov.u64 {name}now, %globaltimer; setp.lt.u64 {name}p, {name}now, {deadline}; @{name}p bra {name}AGAIN;",
        f"st.relaxed.gpu.global.u32 [{flag}], {TIMED_OUT};",
        f"{name}ARRIVED:",
    ]


@helper
def poll_words(
    groups: Sequence[tuple[str, str | None, Sequence[str]]],
    tag: str,
    flag: str,
    deadline: str,
    missing_only: bool = True,
    name: str = "w",
    also: tuple[list[str], list[str]] = ([], []),
) -> list[str]:
    """Reads groups of four words until all carry ``tag``.

    Args:
        groups: For each group its address, the predicate under which it is read (None: always), and four registers.
            Registers of a group that is not read become ``tag``, that is the value 0.
        tag: Register with the tag, 0 to 255.
        flag: Register with the address of the error flag.
        deadline: Register with the time in nanoseconds at which to give up.
        missing_only: Read again only the groups that have not come. Polls of everybody for everything fill L2's
            bandwidth; but with many groups this takes more registers than there are.
        name: Prefix of labels and registers, unique within an asm block.
        also: Loads of something else that is read in the same polls, and PTX that puts bits into ``{name}d`` as long as
            something is missing.
    """
    if not missing_only:
        start = [f"mov.b32 {r}, {tag};" for _, predicate, regs in groups if predicate for r in regs]
        start += [f".reg .b32 {name}t;"]
        loads, verdict = [], [f"mov.b32 {name}d, 0;"]
        for address, predicate, regs in groups:
            on = f"@{predicate} " if predicate else ""
            loads += [f"{on}ld.relaxed.gpu.global.v4.b32 {{{','.join(regs)}}}, [{address}];"]
            for r in regs:
                verdict += [f"xor.b32 {name}t, {r}, {tag}; or.b32 {name}d, {name}d, {name}t;"]
        verdict = [*verdict, f"and.b32 {name}d, {name}d, 0xff;", *also[1]]
        return start + _bounded(name, loads + also[0], verdict, flag, deadline)
    start = [f"mov.b32 {r}, {tag};" for _, predicate, regs in groups if predicate for r in regs]
    start += [f".reg .b32 {name}t; .reg .pred {name}m;", *(f".reg .b32 {name}l{i};" for i in range(len(groups)))]
    start += [
        f"selp.u32 {name}l{i}, 1, 0, {predicate};" if predicate else f"mov.b32 {name}l{i}, 1;"
        for i, (_, predicate, _) in enumerate(groups)
    ]
    loads, verdict = [], [f"mov.b32 {name}d, 0;"]
    for i, (address, _, regs) in enumerate(groups):
        loads += [
            f"setp.ne.u32 {name}m, {name}l{i}, 0;",
            f"@{name}m ld.relaxed.gpu.global.v4.b32 {{{','.join(regs)}}}, [{address}];",
        ]
        verdict += [f"mov.b32 {name}l{i}, 0;"]
        for r in regs:
            verdict += [f"xor.b32 {name}t, {r}, {tag}; or.b32 {name}l{i}, {name}l{i}, {name}t;"]
        verdict += [f"and.b32 {name}l{i}, {name}l{i}, 0xff; or.b32 {name}d, {name}d, {name}l{i};"]
    return start + _bounded(name, loads + also[0], verdict + also[1], flag, deadline)


@helper
def read_pairs(
    groups: Sequence[tuple[str, str | None, Sequence[str]]], epoch: str, name: str, missing: str
) -> tuple[list[str], list[str], list[str]]:
    """PTX of :func:`poll_pairs`: before its polls, in each poll, and then to see what is not there.

    Args:
        groups: As in :func:`poll_pairs`.
        epoch: As in :func:`poll_pairs`.
        name: As in :func:`poll_words`.
        missing: The register that gets bits.
    """
    start = [f"mov.b32 {regs[k]}, {epoch};" for _, predicate, regs in groups if predicate for k in (1, 3)]
    start += [f".reg .b64 {name}x, {name}y; .reg .b32 {name}t;"]
    loads, verdict = [], []
    for address, predicate, regs in groups:
        on = f"@{predicate} " if predicate else ""
        loads += [
            f"{on}ld.relaxed.gpu.global.v2.b64 {{{name}x, {name}y}}, [{address}];",
            f"{on}mov.b64 {{{regs[0]},{regs[1]}}}, {name}x; {on}mov.b64 {{{regs[2]},{regs[3]}}}, {name}y;",
        ]
        for k in (1, 3):
            verdict += [f"xor.b32 {name}t, {regs[k]}, {epoch}; or.b32 {missing}, {missing}, {name}t;"]
    return start, loads, verdict


@helper
def poll_pairs(
    groups: Sequence[tuple[str, str | None, Sequence[str]]], epoch: str, flag: str, deadline: str, name: str = "v"
) -> list[str]:
    """Reads groups of two 64-bit pairs ``{float32, epoch}`` until all carry ``epoch``.

    Unlike words, pairs have a tag of 32 bits. They are for places that are not written in every layer, where an old tag
    of 8 bits could come round again.

    Args:
        groups: For each group its address, its predicate, and the registers value, epoch, value, epoch. The caller sets
            the values of a group that is not read.
        epoch: Register with the epoch.
        flag: As in :func:`poll_words`.
        deadline: As in :func:`poll_words`.
        name: As in :func:`poll_words`.
    """
    start, loads, verdict = read_pairs(groups, epoch, name, f"{name}d")
    return start + _bounded(name, loads, [f"mov.b32 {name}d, 0;", *verdict], flag, deadline)


@helper
def begin_anew_without(smallest: str, count: str, again: str, flag: str, deadline: str) -> list[str]:
    """Goes back to a label if a word of codes that a warp has read had not come.

    A word of four codes is written with one access. Before that its bytes are :data:`EMPTY`, which is less than any
    codes are. So a vector of codes needs no tag, and its writer no fence.

    Args:
        smallest: Register with the smallest word that this thread has read, as a signed integer.
        count: Register that counts the attempts; 0 at first.
        again: The label.
        flag: Register with the address of the error flag. Once the flag is set, nobody goes back.
        deadline: As in :func:`poll_words`.
    """
    empty = f"0x{EMPTY:02x}{EMPTY:02x}{EMPTY:02x}{EMPTY:02x}"
    return [
        "{",
        ".reg .b32 m; .reg .u64 now; .reg .pred q;",
        f"redux.sync.min.s32 m, {smallest}, 0xffffffff; setp.ne.s32 q, m, {empty}; @q bra COME;",
        f"add.u32 {count}, {count}, 1; and.b32 m, {count}, {POLLS_BEFORE_CHECK - 1};",
        f"setp.ne.u32 q, m, 0; @q bra {again};",
        f"ld.relaxed.gpu.global.u32 m, [{flag}]; setp.ne.u32 q, m, 0; @q bra COME;",
        f"mov.u64 now, %globaltimer; setp.lt.u64 q, now, {deadline}; @q bra {again};",
        f"st.relaxed.gpu.global.u32 [{flag}], {TIMED_OUT};",
        "COME:",
        "}",
    ]


@helper
def wait_mbarrier(barrier: str, parity: str, flag: str, deadline: str, name: str = "b") -> list[str]:
    """Waits until the phase ``parity`` of an mbarrier in shared memory is complete."""
    attempt = [f"mbarrier.try_wait.parity.shared::cta.b64 {name}q, [{barrier}], {parity};"]
    verdict = [f"selp.u32 {name}d, 0, 1, {name}q;"]
    return [f".reg .pred {name}q;", *_bounded(name, attempt, verdict, flag, deadline)]


@helper
def pair_store(address: str, first: str, second: str, epoch: str, predicate: str | None = None) -> list[str]:
    """Writes two pairs ``{32 bits, epoch}`` with one 16-byte store."""
    on = f"@{predicate} " if predicate else ""
    return [
        "{",
        ".reg .b64 x, y;",
        f"mov.b64 x, {{{first}, {epoch}}}; mov.b64 y, {{{second}, {epoch}}};",
        f"{on}st.relaxed.gpu.global.v2.b64 [{address}], {{x, y}};",
        "}",
    ]


@helper
def add_across(register: str, temporary: str, distances: Sequence[int]) -> list[str]:
    """Adds a float32 across lanes whose numbers differ by ``distances``; every lane gets the sum."""
    lines = []
    for distance in distances:
        lines += [
            f"shfl.sync.bfly.b32 {temporary}, {register}, {distance}, 31, 0xffffffff;",
            f"add.f32 {register}, {register}, {temporary};",
        ]
    return lines


@helper
def exact_quotient(q: str, value: str, negative_scale: str, inverse: str, temporary: str) -> list[str]:
    """``value / scale`` rounded as IEEE division rounds, from a reciprocal and one exact residual (Markstein)."""
    return [
        f"mul.rn.f32 {q}, {value}, {inverse};",
        f"fma.rn.f32 {temporary}, {q}, {negative_scale}, {value};",
        f"fma.rn.f32 {q}, {temporary}, {inverse}, {q};",
    ]
