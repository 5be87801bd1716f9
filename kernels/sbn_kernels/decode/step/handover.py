"""Device helpers of the decode step: how vectors go from program to program, see ``tokens`` and ``shared``."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sbn_kernels.decode.step.shared import await_tokens, copy_final, share_attention, share_codes, share_final
from sbn_kernels.decode.step.tokens import load_norm, normalize_words, quantize_attention, quantize_words

_ACQUIRE = gl.constexpr("fence.acq_rel.gpu;")


@gluon.jit
def load_norm_weights(norm, P: gl.constexpr):
    """Loads this thread's weights of a norm."""
    STEP: gl.constexpr = 128 * P.norm_plan.warps_per_token
    COUNT: gl.constexpr = (P.d_model + STEP - 1) // STEP
    REGS: gl.constexpr = (
        2 if COUNT == 1 else 4 if COUNT == 2 else 8 if COUNT <= 4 else 16 if COUNT <= 8 else 32 if COUNT <= 16 else 64
    )
    R: gl.constexpr = gl.BlockedLayout([1, 1, REGS], [1, 32, 1], [P.warps, 1, 1], [2, 1, 0])
    G: gl.constexpr = gl.distributed_type(gl.int32, [P.warps, 32, REGS], R)
    return gl.inline_asm(load_norm(P.norm_plan), "=&r," * REGS + "l", [norm], G, is_pure=False)


@gluon.jit
def quantize(base, words, tag, flag, deadline, P: gl.constexpr, VALUES: gl.constexpr):
    """Waits for a vector of each token and leaves its codes in shared memory."""
    args = [words, tag, base + P.at_tokens, base + P.at_small, flag, deadline]
    gl.inline_asm(quantize_words(P, VALUES, False), "l,r,r,r,l,l,~{memory}", args, (), is_pure=False)


@gluon.jit
def normalize_and_quantize(base, words, gain, tag, flag, deadline, P: gl.constexpr):
    """Waits for the residual stream, applies a norm, and leaves the codes in shared memory."""
    constraints: gl.constexpr = "l,r,r,r,l,l," + "r," * gain.shape[2] + "~{memory}"
    args = [words, tag, base + P.at_tokens, base + P.at_small, flag, deadline, gain]
    gl.inline_asm(quantize_words(P, P.d_model, True), constraints, args, (), is_pure=False)


@gluon.jit
def quantize_result(base, attended, attended_m, count, epoch, flag, deadline, P: gl.constexpr):
    """Waits for the result of attention, which may come in parts, and leaves the codes in shared memory."""
    if P.direct_parts == 1:
        quantize(base, attended, epoch & 255, flag, deadline, P, P.d_attention)
    else:
        args = [attended, attended_m, count, epoch, base + P.at_tokens, base + P.at_small, flag, deadline]
        gl.inline_asm(quantize_attention(P), "l,l,r,r,r,r,l,l,~{memory}", args, (), is_pure=False)


@gluon.jit
def final_states(base, words, gain, tag, flag, deadline, P: gl.constexpr):
    """Applies the last norm and leaves bfloat16 hidden states in shared memory."""
    constraints: gl.constexpr = "l,r,r,r,l,l," + "r," * gain.shape[2] + "~{memory}"
    args = [words, tag, base + P.at_tokens, base + P.at_small, flag, deadline, gain]
    gl.inline_asm(normalize_words(P), constraints, args, (), is_pure=False)


@gluon.jit
def await_codes(base, places, epoch, flag, deadline, P: gl.constexpr, ACQUIRE: gl.constexpr):
    """Waits until the shared vectors of all tokens are complete, and copies their sums and scales."""
    args = [places, epoch, base + P.at_statistics, flag, deadline]
    gl.inline_asm(await_tokens(P, ACQUIRE), "l,r,r,l,l,~{memory}", args, (), is_pure=False)


@gluon.jit
def acquire():
    """Makes the emptying of older codes visible to a program that has nothing to multiply; see ``share_codes``."""
    gl.inline_asm(_ACQUIRE, "~{memory}", [], (), is_pure=False)


@gluon.jit
def share_vector(base, words, codes, other, places, tag, epoch, flag, deadline, P: gl.constexpr, VALUES: gl.constexpr):
    """Quantises this program's tokens for all programs."""
    WIDTH: gl.constexpr = (VALUES + 127) // 128 * 128
    for token in range(P.programs - 1 - gl.program_id(0), P.batch, P.programs):
        args = [words + token * VALUES, tag, codes + token * WIDTH, other + token * WIDTH, places + token * 2, epoch,
                base + P.at_small, flag, deadline]  # fmt: skip
        asm: gl.constexpr = share_codes(P.token_plan, VALUES, False)
        gl.inline_asm(asm, "l,r,l,l,l,r,r,l,l,~{memory}", args, (), is_pure=False)


@gluon.jit
def share_normalized(base, words, codes, other, places, gain, tag, epoch, flag, deadline, P: gl.constexpr):
    """As :func:`share_vector`, for the residual stream behind a norm."""
    constraints: gl.constexpr = "l,r,l,l,l,r,r,l,l," + "r," * gain.shape[2] + "~{memory}"
    WIDTH: gl.constexpr = (P.d_model + 127) // 128 * 128
    for token in range(P.programs - 1 - gl.program_id(0), P.batch, P.programs):
        args = [words + token * P.d_model, tag, codes + token * WIDTH, other + token * WIDTH, places + token * 2, epoch,
                base + P.at_small, flag, deadline, gain]  # fmt: skip
        gl.inline_asm(share_codes(P.token_plan, P.d_model, True), constraints, args, (), is_pure=False)


@gluon.jit
def share_result(base, attended, attended_m, count, codes, other, places, epoch, flag, deadline, P: gl.constexpr):
    """As :func:`share_vector`, for the result of attention, which may come in parts."""
    WIDTH: gl.constexpr = (P.d_attention + 127) // 128 * 128
    if P.direct_parts == 1:
        share_vector(base, attended, codes, other, places, epoch & 255, epoch, flag, deadline, P, P.d_attention)
    else:
        for token in range(P.programs - 1 - gl.program_id(0), P.batch, P.programs):
            args = [attended + token * P.d_attention, attended_m + token * (2 * P.heads), count, codes + token * WIDTH,
                    other + token * WIDTH, places + token * 2, epoch, base + P.at_small, flag, deadline]  # fmt: skip
            gl.inline_asm(share_attention(P), "l,l,r,l,l,l,r,r,l,l,~{memory}", args, (), is_pure=False)


@gluon.jit
def share_states(base, words, target, places, gain, tag, epoch, flag, deadline, P: gl.constexpr):
    """Applies the last norm to this program's tokens for all programs, and copies all tokens to shared memory."""
    constraints: gl.constexpr = "l,r,l,l,r,r,l,l," + "r," * gain.shape[2] + "~{memory}"
    for token in range(P.programs - 1 - gl.program_id(0), P.batch, P.programs):
        args = [words + token * P.d_model, tag, target + token * (2 * P.head_columns), places + token * 2, epoch,
                base + P.at_small, flag, deadline, gain]  # fmt: skip
        gl.inline_asm(share_final(P.token_plan), constraints, args, (), is_pure=False)
    await_codes(base, places, epoch, flag, deadline, P, True)
    gl.inline_asm(copy_final(P), "l,r,~{memory}", [target, base + P.at_tokens], (), is_pure=False)
