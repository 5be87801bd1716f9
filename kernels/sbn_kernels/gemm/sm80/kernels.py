"""Device code of the products on 2-bit ternary weights by warp-level instructions, in Gluon. Needs Triton >= 3.9.

One kernel computes ``y = (x8 @ T^T) * s * gamma (+ bias)`` for both forms of weight:

* ``SPARSE``: 2:4 weights on the sparse tensor core, ``mma.sp::ordered_metadata.sync.m16n8k64``.
* otherwise: dense ternary weights of any pattern, ``mma.sync.m16n8k32``.

Triton has no sparse dot, so inline PTX issues the instruction. The weights are operand A: each thread reads 16 bytes of
packed codes for 16 rows and a k128 step, and unpacks them with ``prmt``. The tokens are operand B and come by
``ldmatrix``. ``layouts.py`` says which thread holds what.

Tokens and codes wait in a ring of ``STAGES`` buffers in shared memory, which ``cp.async`` fills. A tile is
``128 PANELS`` features by ``BT`` tokens, and a warp computes 64 features by ``BT / TOKEN_WARPS`` tokens. With 64 rows a
fragment of tokens serves four multiplications, which halves what shared memory has to deliver for an instruction.

The columns beyond the end of a token are zeros of the weight, so whatever the tokens hold there adds nothing. Copies
beyond the stride of a token are left out, because they could end outside of the tensor.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from sbn_kernels.common.decode_ptx import unpack_word
from sbn_kernels.common.hopper_pipeline import tied
from sbn_kernels.gemm.sm80.layouts import accumulators, token_words, weight_words


@gluon.constexpr_function
def multiply_step(outs, ins):
    """PTX: a k128 step of a warp, dense: for each 16 rows and each 8 tokens four ``mma.m16n8k32``."""
    return step_text(outs, ins, False)


@gluon.constexpr_function
def multiply_sparse_step(outs, ins):
    """PTX: a k128 step of a warp, 2:4: for each 16 rows and each 8 tokens two ``mma.sp.m16n8k64``."""
    return step_text(outs, ins, True)


@gluon.constexpr_function
def step_text(outs, ins, sparse: bool) -> str:
    """PTX of a k128 step; the order of the registers is that of ``layouts.py``."""
    (acc,) = outs
    _, words, tokens = ins
    groups = len(tokens) // 8
    lines = ["{"]
    for j in range(2 if sparse else 4):
        for m in range(4):
            name = f"a{j}{m}"
            lines += unpack_word(name, words[4 * m + (2 * j if sparse else j)])
            a = f"{{{name}0,{name}1,{name}2,{name}3}}"
            for n in range(groups):
                first = 4 * (n + groups * m)
                c = "{" + ",".join(acc[first : first + 4]) + "}"
                if sparse:
                    b = "{" + ",".join(tokens[8 * n + 4 * j : 8 * n + 4 * j + 4]) + "}"
                    lines.append(
                        "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
                        f"{c}, {a}, {b}, {c}, {words[4 * m + 2 * j + 1]}, 0x0;"
                    )
                else:
                    b = "{" + ",".join(tokens[8 * n + 2 * j : 8 * n + 2 * j + 2]) + "}"
                    lines.append(f"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {c}, {a}, {b}, {c};")
    return "\n".join([*lines, "}"])


@gluon.constexpr_function
def linear_layout(bases, shape):
    """Gluon's form of the bases of ``layouts.py``."""
    registers, lanes, warps = bases
    return gl.DistributedLinearLayout(registers, lanes, warps, [], shape)


@gluon.jit
def fetch(words, x, step, stage, k_steps, w_pointers, x_pointers, chunk, chunks):
    """Starts the copies of a k128 step into a stage of the ring, as one group; beyond the last step an empty group."""
    there = step < k_steps
    async_copy.async_load(words.index(stage), w_pointers + step * 1024, mask=there)
    async_copy.async_load(x.index(stage), x_pointers + step * 32, mask=(step * 8 + chunk < chunks) & there)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=("tokens", "out_features", "k_steps", "panels", "chunks", "pieces"))
def ampere_gemm_kernel(
    x_pointer, packed_pointer, y_pointer, scale_pointer, row_scale_pointer, bias_pointer,
    tokens, out_features, k_steps, panels, chunks, pieces,
    PANELS: gl.constexpr, BT: gl.constexpr, TOKEN_WARPS: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
    SPARSE: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """A tile of ``128 PANELS`` features by ``BT`` tokens a program.

    ``x_pointer`` is int32, four values a word, and a token has ``chunks`` pieces of 16 bytes. A row of the result has
    ``pieces`` pieces of 8 elements, so that stores need no mask of single elements.
    """
    WARPS: gl.constexpr = gl.num_warps()
    ACC: gl.constexpr = linear_layout(accumulators(PANELS, BT, TOKEN_WARPS), [128 * PANELS, BT])
    X: gl.constexpr = linear_layout(token_words(PANELS, BT, TOKEN_WARPS), [BT, 32])
    W: gl.constexpr = linear_layout(weight_words(PANELS, BT, TOKEN_WARPS), [1024 * PANELS])
    COPY_X: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    COPY_W: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    STORE: gl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, WARPS], [0, 1])
    # The accumulators of a thread are tied; its 16 words of codes and its words of tokens are free registers.
    TIES: gl.constexpr = tied(2 * BT // TOKEN_WARPS, 16 + BT // TOKEN_WARPS)
    x_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BT, 32], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
    w_ring = gl.allocate_shared_memory(gl.int32, [STAGES, 1024 * PANELS], gl.SwizzledSharedLayout(4, 1, 1, [0]))

    program = gl.program_id(0)
    token_tiles = gl.cdiv(tokens, BT)
    band = BAND * gl.cdiv(panels, PANELS)  # BAND token tiles share a sweep over the weight, so both stay in L2
    first = program // band * BAND
    height = gl.minimum(token_tiles - first, BAND)
    tile = (first + program % band % height) * BT
    panel = program % band // height * PANELS

    # Rows beyond the end read the last row, and panels beyond the end the last panel. Neither is stored.
    row = gl.minimum(tile + gl.arange(0, BT, gl.SliceLayout(1, COPY_X)), tokens - 1)
    word = gl.arange(0, 32, gl.SliceLayout(0, COPY_X))
    x_pointers = x_pointer + row.to(gl.int64)[:, None] * (chunks * 4) + word[None, :]
    chunk = (word // 4)[None, :]
    index = gl.arange(0, 1024 * PANELS, COPY_W)
    own_panel = gl.minimum(panel + index // 1024, panels - 1)
    w_pointers = packed_pointer + own_panel.to(gl.int64) * k_steps * 1024 + index % 1024

    for stage in gl.static_range(STAGES - 1):
        fetch(w_ring, x_ring, stage, stage, k_steps, w_pointers, x_pointers, chunk, chunks)
    acc = gl.zeros([128 * PANELS, BT], gl.int32, ACC)
    for step in range(k_steps):
        async_copy.wait_group(STAGES - 2)
        x = x_ring.index(step % STAGES).load(X)
        words = w_ring.index(step % STAGES).load(W)
        ahead = step + STAGES - 1
        fetch(w_ring, x_ring, ahead, ahead % STAGES, k_steps, w_pointers, x_pointers, chunk, chunks)
        if SPARSE:
            acc = gl.inline_asm(multiply_sparse_step, TIES, [acc, words, x], acc.type, is_pure=False)
        else:
            acc = gl.inline_asm(multiply_step, TIES, [acc, words, x], acc.type, is_pure=False)
    async_copy.wait_group(0)

    feature = panel * 128 + gl.arange(0, 128 * PANELS, gl.SliceLayout(1, ACC))
    token = tile + gl.arange(0, BT, gl.SliceLayout(0, ACC))
    scale = gl.load(scale_pointer + token, mask=token < tokens, other=0.0)
    gamma = gl.load(row_scale_pointer + feature, mask=feature < out_features, other=0.0)
    y = acc.to(gl.float32) * (scale[None, :] * gamma[:, None])
    if BIAS:
        y += gl.load(bias_pointer + feature, mask=feature < out_features, other=0.0).to(gl.float32)[:, None]
    y = gl.convert_layout(y.to(y_pointer.dtype.element_ty), STORE)
    feature = panel * 128 + gl.arange(0, 128 * PANELS, gl.SliceLayout(1, STORE))
    token = tile + gl.arange(0, BT, gl.SliceLayout(0, STORE))
    inside = (feature // 8 < pieces)[:, None] & (token < tokens)[None, :]
    gl.store(y_pointer + token.to(gl.int64)[None, :] * (pieces * 8) + feature[:, None], y, mask=inside)
