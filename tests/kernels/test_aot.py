"""Every kernel compiles without a GPU for sm_80, sm_90 and sm_100, and spills no registers.

The Hopper kernels contain the intended instructions, and their multiplications overlap.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from sbn_kernels.block import norm, rope
from sbn_kernels.decode import head
from sbn_kernels.decode import triton as decode
from sbn_kernels.exchange import device as exchange
from sbn_kernels.gemm import cusparselt
from sbn_kernels.gemm import portable as portable_gemm
from sbn_kernels.gemm.sm90 import split_k
from sbn_kernels.prepare import device as prepare_kernels
from sbn_kernels.prompt import attention
from sbn_kernels.quantize import triton as quantize
from sbn_kernels.runtime.capability import gluon_missing
from sbn_kernels.sampling import device as sampling
from sbn_kernels.sampling import threshold_device as threshold
from sbn_kernels.swiglu import rounded, saved
from sbn_kernels.swiglu import triton as swiglu
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
needs_gluon = pytest.mark.skipif(gluon_missing() is not None, reason=str(gluon_missing()))
POINTERS = {
    "x_pointer": "*bf16", "q_pointer": "*i8", "scale_pointer": "*fp32", "w_pointer": "*fp32", "mask_pointer": "*u8",
    "sum_pointer": "*fp32", "count_pointer": "*i32", "gamma_pointer": "*fp32", "row_scale_pointer": "*fp32",
    "old_pointer": "*u8", "keep_pointer": "*i32", "bits_pointer": "*u8", "codes_pointer": "*i8",
    "packed_pointer": "*i32", "stats_pointer": "*i64", "y_pointer": "*bf16", "bias_pointer": "*bf16",
    "acc_pointer": "*i32", "part_pointer": "*i32", "code_scale_pointer": "*fp32", "token_scale_pointer": "*fp32",
}  # fmt: skip


ALIGNED = (
    "stride",
    "x_stride",
    "gate_stride",
    "up_stride",
    "dx_stride",
    "w_stride",
    "q_stride",
    "d_stride",
    "inner",
    "columns",
    "features",
    "part_size",
)


def build(kernel, constants, capability, types=None, source=ASTSource, warps=4, **options):
    """Compile a kernel for pointers and strides that are multiples of 16. Other arguments are i32."""
    names = kernel.arg_names
    signature = {n: {**POINTERS, **(types or {})}.get(n, "i32") for n in names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    values = {(names.index(n),): v for n, v in constants.items()}
    even = [i for i, n in enumerate(names) if signature[n].startswith("*") or (n in ALIGNED and n not in constants)]
    aligned = {(i,): [["tt.divisibility", 16]] for i in even}
    options = {"num_warps": warps, "enable_fp_fusion": False, **options}
    return triton.compile(
        source(kernel, signature, values, aligned), target=GPUTarget("cuda", capability, 32), options=options
    )


def spilled_bytes(compiled, folder: Path) -> int:
    """Return the bytes of registers that a thread spills (stores and loads), from the report of the assembler."""
    source = folder / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    target = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)[1]
    for assembler in ("ptxas-blackwell", "ptxas"):  # which of them knows the PTX version depends on Triton's
        command = [TOOLS / assembler, "-v", f"--gpu-name={target}", source, "-o", folder / "kernel.o"]
        if command[0].exists():
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return sum(map(int, re.findall(r"(\d+) bytes spill", done.stdout + done.stderr)))
    raise AssertionError(f"no assembler took the PTX: {done.stderr}")


NO_PREPARE = dict.fromkeys(("GIVEN", "KEEP", "OLD", "BITS", "CODES", "STATS"), False)
TILE = {"R": 64, "C": 128}
SWIGLU_TYPES = {
    "up_row_scale_pointer": "*fp32",
    **dict.fromkeys(("d_pointer", "gate_pointer", "up_pointer", "d_gate_pointer", "d_up_pointer"), "*bf16"),
    **dict.fromkeys(("max_pointer", "up_max_pointer"), "*i32"),
}
BLOCK_TYPES = {
    "part_pointer": "*fp32",
    **dict.fromkeys(("residual_pointer", "h_pointer", "dy_pointer", "dh_pointer", "dx_pointer"), "*bf16"),
    **dict.fromkeys(("dq_pointer", "dk_pointer", "dv_pointer"), "*bf16"),
    **dict.fromkeys(("weight_pointer", "rstd_pointer", "cos_pointer", "sin_pointer"), "*fp32"),
}
PLAIN = {
    "quantize rows": (
        quantize.quantize_rows_kernel,
        {"BITS": 8, "ROWS": 1, "BLOCK": 4096, "FUSED": True, "EARLY": False},
        {},
        8,
    ),
    "quantize a column": (  # Triton turns an argument of 1 into a constant
        quantize.quantize_rows_kernel,
        {"BITS": 4, "ROWS": 1, "BLOCK": 16, "FUSED": True, "EARLY": False, "columns": 1},
        {},
        1,
    ),
    "quantize long rows": (quantize.quantize_long_rows_kernel, {"BITS": 4, "BLOCK": 8192, "FUSED": True}, {}, 16),
    "swiglu quantize": (
        swiglu.swiglu_quantize_kernel,
        {"BITS": 8, "MAIN": 8192, "TAIL": 4096, "FUSED": True, "EARLY": False},
        {},
        8,
    ),
    "swiglu backward": (
        swiglu.swiglu_backward_kernel,
        {"BLOCK": 2048},
        {"d_pointer": "*bf16", "dx_pointer": "*bf16"},
        4,
    ),
    "swiglu backward with maxima": (
        rounded.swiglu_backward_maxima_kernel,
        {"CODES": False, "MAXIMA": True, "R": 4, "C": 256},
        SWIGLU_TYPES,
        4,
    ),
    "swiglu backward of codes": (
        rounded.swiglu_backward_maxima_kernel,
        {"CODES": True, "MAXIMA": True, "R": 4, "C": 256},
        SWIGLU_TYPES | dict.fromkeys(("gate_pointer", "up_pointer"), "*i8"),
        4,
    ),
    "swiglu quantize and save": (
        saved.swiglu_quantize_and_save_kernel,
        {"BITS": 8, "MAIN": 8192, "TAIL": 4096, "FUSED": True},
        {"code_pointer": "*i8"},
        8,
    ),
    "norm and quantise": (
        norm.norm_quantize_kernel,
        {"ADD": True, "PARTS": 0, "BITS": 8, "MAIN": 4096, "TAIL": 2048, "FUSED": True, "EARLY": False},
        BLOCK_TYPES,
        8,
    ),
    "norm and quantise a product in parts": (
        norm.norm_quantize_kernel,
        {"ADD": True, "PARTS": 5, "BITS": 8, "MAIN": 1024, "TAIL": 512, "FUSED": True, "EARLY": False},
        BLOCK_TYPES | {"residual_pointer": "*i32"},
        8,
    ),
    "norm backward": (norm.norm_backward_kernel, {"MAIN": 1024, "TAIL": 512}, BLOCK_TYPES, 4),
    "wide norm backward": (norm.norm_backward_kernel, {"MAIN": 4096, "TAIL": 0}, BLOCK_TYPES, 8),
    "rotary backward": (rope.rope_backward_kernel, {"HALF": 64, "R": 8}, BLOCK_TYPES, 4),
    "row sums": (prepare_kernels.row_sums_kernel, {"MASKED": True, "BLOCK": 4096}, {}, 4),
    "gamma": (prepare_kernels.gamma_kernel, {"KEPT": True, "GIVEN": False, "BLOCK": 1024}, {}, 8),
    "mask": (
        prepare_kernels.mask_kernel,
        {"N": 3, "M": 7, "PADDED": 8, "KEEP": False, "GROUPS": 64},
        {"bits_pointer": "*i32"},
        4,
    ),
    "prepare 2:4": (
        prepare_kernels.prepare_kernel,
        {**NO_PREPARE, **TILE, "N": 2, "M": 4, "BITS": True, "CODES": True, "LAYOUT": 2},
        {},
        8,
    ),
    "prepare 6:8": (
        prepare_kernels.prepare_kernel,
        {**NO_PREPARE, **TILE, "N": 6, "M": 8, "OLD": True, "STATS": True, "LAYOUT": 1},
        {},
        8,
    ),
    "int8 gemm": (
        portable_gemm.int8_gemm_kernel,
        {"BIAS": True, "BM": 128, "BN": 128, "BK": 128},
        {"x_pointer": "*i8", "w_pointer": "*i8"},
        8,
    ),
    "scale": (cusparselt.scale_kernel, {"BIAS": True, "ROWS": 4, "COLUMNS": 1024}, {}, 4),
    "add splits": (split_k.add_splits_kernel, {"S": 16, "ROWS": True, "BIAS": True, "BT": 64, "R": 8}, {}, 16),
    "gamma of parts": (
        exchange.gamma_of_parts_kernel,
        {"BLOCK": 1024},
        {"terms_pointer": "*fp32", "counts_pointer": "*i32", "table_pointer": "*i32"},
        8,
    ),
    "encode 2:4": (
        exchange.encode_kernel,
        {**TILE, "N": 2, "M": 4, "GIVEN": False},
        {"words_pointer": "*u8"},
        8,
    ),
    "decode words": (
        exchange.decode_kernel,
        {**TILE, "BITS": True, "LAYOUT": 2},
        {"words_pointer": "*u8"},
        8,
    ),
    "8-bit head": (
        head.int8_rows_kernel,
        {"BT": 16, "ROWS": 64, "COLUMNS": 128},
        {"x_pointer": "*bf16", "codes_pointer": "*i8", "y_pointer": "*bf16"},
        4,
    ),
    "best tokens of parts": (
        sampling.best_of_parts_kernel,
        {"LIMITED": True},
        {
            "logits_pointer": "*bf16",
            "lowest_pointer": "*fp32",
            **dict.fromkeys(("settings_pointer", "positions_pointer", "best_pointer"), "*i64"),
        },
        4,
    ),
    "best token": (
        sampling.best_of_all_kernel,
        {"BLOCK": 256},
        dict.fromkeys(("best_pointer", "tokens_pointer"), "*i64"),
        4,
    ),
    "counts of values": (
        threshold.count_values_kernel,
        {"FINITE": 0x7F7F},
        {"logits_pointer": "*bf16", "settings_pointer": "*i64", "bins_pointer": "*i32"},
        4,
    ),
    "sums of groups": (
        threshold.sum_groups_kernel,
        {"DTYPE": triton.language.bfloat16},
        {"settings_pointer": "*i64", "bins_pointer": "*i32", "groups_pointer": "*i64"},
        4,
    ),
    "lowest logits": (
        threshold.lowest_logits_kernel,
        {"DTYPE": triton.language.bfloat16},
        {
            "settings_pointer": "*i64",
            "bins_pointer": "*i32",
            "groups_pointer": "*i64",
            "lowest_pointer": "*fp32",
        },
        4,
    ),
    "portable decode": (decode.decode_portable_kernel, {"BIAS": True, "BT": 16}, {"x_pointer": "*i8"}, 4),
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_kernels_compile_without_spills(name: str, capability: int, tmp_path: Path) -> None:
    if name == "prepare 6:8" and capability != 90:
        pytest.skip("the same kernel as prepare 2:4, and slow to compile")
    kernel, constants, types, warps = PLAIN[name]
    compiled = build(kernel, constants, capability, types, warps=warps)
    assert spilled_bytes(compiled, tmp_path) <= 16  # 0 with Triton 3.9; 3.6 spills a few bytes once


@pytest.mark.parametrize(("size", "keys"), [(128, 128), (128, 64), (64, 128)])
def test_attention_of_prompts(size: int, keys: int, tmp_path: Path) -> None:
    types = dict.fromkeys(("keys", "values"), f"tensordesc<bf16[{keys},{size}]>")
    types |= {"q_pointer": "*bf16", "rows_pointer": "*i64", "before_pointer": "*i64"}
    constants = {"HEADS": 12, "GROUP": 6, "SIZE": size, "QUERIES": 64, "KEYS": keys, "EARLY": False}
    options = {"num_stages": attention._STAGES[size][keys], "enable_fp_fusion": True}
    compiled = build(attention.attend_kernel, constants, 90, types, **options)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    # With blocks of 128 keys, a program takes more than half of a multiprocessor's shared memory.
    assert (compiled.metadata.shared > 233472 // 2) == (keys == 128)
    assert spilled_bytes(compiled, tmp_path) == 0


def _hopper_gemm_types(tile: int, chunk: int, out: str, out_bits: int) -> dict[str, str]:
    """The types of the tensors of ``ternary_gemm_kernel``, for a dtype of the result."""
    from sbn_kernels.runtime.descriptors import tma_layouts

    layouts = tma_layouts()
    return {
        "x": f"tensordesc<i8[{tile},128],{layouts[8]!r}>",
        "w": f"tensordesc<i32[32,32],{layouts[32]!r}>",
        "y": f"tensordesc<{out}[{chunk},64],{layouts[out_bits]!r}>",
        "scale": "*fp32", "row_scale": "*fp32", "bias": "*bf16",
    }  # fmt: skip


@needs_gluon
@pytest.mark.parametrize(("rows", "bias"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("sparse", [True, False])
def test_hopper_gemm(sparse: bool, rows: bool, bias: bool, tmp_path: Path) -> None:
    """The sparse instruction is there, registers do not spill, and multiplications overlap."""
    from sbn_kernels.gemm.sm90.gemm import launch_shape
    from sbn_kernels.gemm.sm90.kernels import ternary_gemm_kernel
    from triton.experimental.gluon._runtime import GluonASTSource

    tile = 256
    chunk, buffers, stages = launch_shape(tile, 2)
    types = _hopper_gemm_types(tile, chunk, "bf16", 16)
    constants = {
        "BT": tile,
        "CHUNK": chunk,
        "BUFFERS": buffers,
        "STAGES": stages,
        "SPARSE": sparse,
        "ROWS": rows,
        "BIAS": bias,
        "PARTS": False,
        "EARLY": True,
    }
    compiled = build(ternary_gemm_kernel, constants, 90, types, GluonASTSource)
    kind = "wgmma.mma_async.sp" if sparse else "wgmma.mma_async.sync"
    assert kind + (".sync" if sparse else "") + ".aligned.m64n256k" in compiled.asm["ptx"]
    assert ("wgmma.mma_async.sp" in compiled.asm["ptx"]) == sparse
    assert spilled_bytes(compiled, tmp_path) == 0
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    sass = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", sass)
    # a wait for all (0x0) after each tile of each of two consumers; ptxas serialising would turn the rest into 0x0 too
    assert waits.count("0") == 2
    assert waits.count("1") >= (4 if sparse else 8)


@needs_gluon
@pytest.mark.parametrize("tile", [64, 128])
def test_hopper_gemm_of_a_prompt_in_parts_of_k(tile: int, tmp_path: Path) -> None:
    """The int32 sums of parts leave unscaled, and no register spills."""
    from sbn_kernels.gemm.sm90.gemm import launch_shape
    from sbn_kernels.gemm.sm90.kernels import ternary_gemm_kernel
    from triton.experimental.gluon._runtime import GluonASTSource

    chunk, buffers, stages = launch_shape(tile, 4)
    types = _hopper_gemm_types(tile, chunk, "i32", 32)
    constants = {"BT": tile, "CHUNK": chunk, "STAGES": stages, "SPARSE": True, "ROWS": False, "BIAS": False}
    constants |= {"BUFFERS": buffers, "PARTS": True, "EARLY": True}
    compiled = build(ternary_gemm_kernel, constants, 90, types, GluonASTSource)
    assert f"wgmma.mma_async.sp.sync.aligned.m64n{tile}k64" in compiled.asm["ptx"]
    assert spilled_bytes(compiled, tmp_path) == 0


@needs_gluon
@pytest.mark.parametrize("tile", [16, 32, 64])
@pytest.mark.parametrize("sparse", [True, False])
def test_hopper_gemm_in_parts_of_k(sparse: bool, tile: int, tmp_path: Path) -> None:
    """The same holds; two programs fit a multiprocessor, and stores to the workspace fill whole sectors."""
    from sbn_kernels.gemm.sm90.gemm import SPLIT_STAGES
    from sbn_kernels.gemm.sm90.split_kernels import ternary_gemm_split_kernel
    from sbn_kernels.runtime.descriptors import tma_layouts
    from triton.experimental.gluon._runtime import GluonASTSource

    layouts = tma_layouts()
    types = {"x": f"tensordesc<i8[{tile},128],{layouts[8]!r}>", "w": f"tensordesc<i32[32,32],{layouts[32]!r}>"}
    constants = {"BT": tile, "STAGES": SPLIT_STAGES, "SPARSE": sparse}
    compiled = build(ternary_gemm_split_kernel, constants, 90, types, GluonASTSource)
    kind = "wgmma.mma_async.sp.sync" if sparse else "wgmma.mma_async.sync"
    assert f"{kind}.aligned.m64n{tile}k" in compiled.asm["ptx"]
    assert ("wgmma.mma_async.sp" in compiled.asm["ptx"]) == sparse
    assert "st.global.v2.b32" in compiled.asm["ptx"]
    assert spilled_bytes(compiled, tmp_path) == 0
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    registers = -(-int(re.search(r"REG:(\d+)", usage)[1]) // 8) * 8
    assert registers * 3 * 128 * 2 <= 65536  # each program has 12 warps
    assert 2 * (compiled.metadata.shared + 1024) <= 227 * 1024
    sass = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"(IGMMA)|WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", sass)
    # for each of two consumers: in the loop all but one group; after it, and where there was no step, all
    steps = [("IGMMA", ""), ("", "1")] * (2 if sparse else 4)
    assert found == (steps + [("", "0")] * 2) * 2


@needs_gluon
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("sparse", "token_groups"), [(True, 1), (False, 2), (True, 8)])
def test_decode(sparse: bool, token_groups: int, capability: int, tmp_path: Path) -> None:
    from sbn_kernels.decode.gluon import decode_kernel
    from sbn_kernels.decode.triton import launch_shape
    from triton.experimental.gluon._runtime import GluonASTSource

    groups, prefetch = launch_shape(32, 896, token_groups)
    constants = {"NT": token_groups, "GROUPS": groups, "PREFETCH": prefetch, "SPARSE": sparse, "BIAS": False}
    compiled = build(decode_kernel, constants, capability, {"x_pointer": "*i32"}, GluonASTSource, groups)
    assert ("mma.sp::ordered_metadata" in compiled.asm["ptx"]) == sparse
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
    assert spilled_bytes(compiled, tmp_path) == 0


def test_swiglu_of_two_tensors(tmp_path: Path) -> None:
    """The kernels for gates and ups in two tensors share their bodies with those that were compiled above."""
    types = dict.fromkeys(("gate_pointer", "up_pointer", "d_pointer", "d_gate_pointer", "d_up_pointer"), "*bf16")
    for kernel, constants, warps in (
        (swiglu.swiglu_pair_quantize_kernel, {"BITS": 8, "MAIN": 4096, "TAIL": 2048, "FUSED": True}, 4),
        (swiglu.swiglu_pair_backward_kernel, {"BLOCK": 2048}, 4),
    ):
        assert spilled_bytes(build(kernel, constants, 90, types, warps=warps), tmp_path) <= 16
