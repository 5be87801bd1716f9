"""PTX of the multiplications in ``kernels.py``: texts for inline assembly of one k128 step of a consumer.

Two facts that only the compiler's report and a bit-exact test show:

* Registers of a multiplication in flight must not be rewritten. ptxas tracks the accumulators and A, but not the
  metadata register of the sparse form. So every k64 step is a commit group of its own, and the register is rewritten
  only after the wait that retires its group. Until then a real use keeps the register alive: new metadata is computed
  as ``word ^ (old & zero)``, where ``zero`` is a kernel argument that the compiler knows nothing of.
* ptxas serialises all multiplications (C7512 and C7513 in its report; DEPBAR 0 after every IGMMA) if registers are
  short, or if the four dense steps are spread over two asm blocks. So registers are not reallocated between the roles,
  because ptxas would give all roles the smallest share. Each role has 168 registers, too few for masks in the
  epilogue.

A tile may be cut into pieces of ``piece`` tokens. Pieces and whole tiles take the same loop, with both instructions in
it and a branch around each. A second loop for pieces would take so many registers that ptxas serialises both loops.
"""

from __future__ import annotations

from triton.experimental import gluon

from sbn_kernels.common.decode_ptx import unpack_word
from sbn_kernels.common.hopper_pipeline import matrix_descriptor, release_text


@gluon.constexpr_function
def _wgmma(step: int, acc: tuple[str, ...], metadata: str | None, accumulate: str) -> str:
    """PTX: one wgmma, for as many tokens as the accumulators hold."""
    tokens = 2 * len(acc)
    operand = f"{{a{step}0,a{step}1,a{step}2,a{step}3}}"
    if metadata is not None:
        name, rest = f"wgmma.mma_async.sp.sync.aligned.m64n{tokens}k64.s32.s8.s8", f"{metadata}, 0, {accumulate}"
    else:
        name, rest = f"wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.s8.s8", accumulate
    return f"{name} {{{','.join(acc)}}}, {operand}, d{step}, {rest};"


@gluon.constexpr_function
def _multiply(step: int, acc: tuple[str, ...], metadata: str | None, accumulate: str, piece: int) -> list[str]:
    """PTX: issues one wgmma of ``step`` as a commit group of its own; of ``piece`` tokens, if ``small`` is set."""
    whole = _wgmma(step, acc, metadata, accumulate)
    # The accumulators of the first tokens of a tile come first.
    either = [f"@!small {whole}", f"@small {_wgmma(step, acc[: piece // 2], metadata, accumulate)}"]
    return [
        f".reg .b64 d{step};",
        f"add.s64 d{step}, base, {step * (4 if metadata is not None else 2)};",
        "wgmma.fence.sync.aligned;",
        *(either if piece else [whole]),
        "wgmma.commit_group.sync.aligned;",
    ]


@gluon.constexpr_function
def _flags(state: str, piece: int) -> list[str]:
    """PTX: the predicate ``more`` (add to the accumulators); with pieces ``small`` as well, the second bit."""
    if not piece:
        return [".reg .pred more;", f"setp.ne.b32 more, {state}, 0;"]
    bits = [f"and.b32 bit, {state}, {bit}; setp.ne.b32 {name}, bit, 0;" for name, bit in (("more", 1), ("small", 2))]
    return [".reg .pred more, small;", ".reg .b32 bit;", *bits]


@gluon.constexpr_function
def _hold(register: str, word: str, zero: str) -> str:
    """PTX: new metadata ``word ^ (register & zero)``, which keeps the old value of ``register`` alive until here."""
    return f"lop3.b32 {register}, {word}, {register}, {zero}, 0x78;"


@gluon.constexpr_function
def _operands(count: int) -> tuple[tuple[str, ...], ...]:
    """The accumulators, metadata and packed words in the text of an instruction, then tile, state and zero.

    The outputs have the first numbers: ``count`` accumulators and two registers of metadata. Then come the inputs.
    """
    names = [f"${i}" for i in range(2 * count + 11)]
    words = names[2 * count + 2 : 2 * count + 6]
    return tuple(names[:count]), tuple(names[count : count + 2]), tuple(words), tuple(names[2 * count + 8 :])


@gluon.constexpr_function
def first_sparse(count: int, piece: int) -> str:
    """PTX: issues the first half of a sparse step, for ``count`` accumulators."""
    acc, held, words, (tile, state, zero) = _operands(count)
    lines = ["{", *matrix_descriptor("base", tile), *_flags(state, piece)]
    lines += [*unpack_word("a0", words[0]), _hold(held[0], words[1], zero)]
    return "\n".join([*lines, *_multiply(0, acc, held[0], "more", piece), "}"])


@gluon.constexpr_function
def rest_sparse(count: int, piece: int) -> str:
    """PTX: issues the second half, and waits for the first."""
    acc, held, words, (tile, state, zero) = _operands(count)
    lines = ["{", *matrix_descriptor("base", tile), *_flags(state, piece)]
    lines += [*unpack_word("a1", words[2]), _hold(held[1], words[3], zero)]
    lines += [*_multiply(1, acc, held[1], "1", piece), "wgmma.wait_group.sync.aligned 1;", "}"]
    return "\n".join(lines)


@gluon.constexpr_function
def all_dense(count: int, piece: int) -> str:
    """PTX: issues a dense step, and waits for all but its last quarter."""
    acc, _, words, (tile, state, _) = _operands(count)
    lines = ["{", *matrix_descriptor("base", tile), *_flags(state, piece)]
    for step in (0, 1, 2, 3):
        lines += unpack_word(f"a{step}", words[step])
        lines += [*_multiply(step, acc, None, "1" if step else "more", piece), "wgmma.wait_group.sync.aligned 1;"]
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def retire_one_and_release(outs, ins):
    """PTX: waits until one multiplication at most is in flight, then gives back a buffer if wanted."""
    barrier, wanted = ins
    return release_text(barrier[0], wanted[0], "wgmma.wait_group.sync.aligned 1;")


@gluon.constexpr_function
def constraints(accumulators, inputs):
    """Constraints: accumulators and two held registers tied to themselves, and free registers around the held pair."""
    outputs = ["=r"] * (accumulators + 2)
    tied = [str(i) for i in range(accumulators)]
    return ",".join([*outputs, *tied, *["r"] * 4, str(accumulators), str(accumulators + 1), *["r"] * inputs])
