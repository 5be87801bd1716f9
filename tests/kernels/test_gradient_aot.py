"""The backward kernels compile without a GPU for sm_80, sm_90 and sm_100, and spill no registers."""

import os
import re
import subprocess
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from sbn_kernels.gradients import cross_entropy_device as cross_entropy
from sbn_kernels.gradients import device as gradient_kernels
from sbn_kernels.gradients import transpose, weight_gradient
from sbn_kernels.prepare import device as prepare_kernels

from tests.kernels.test_aot import TOOLS, build, needs_gluon, spilled_bytes

TYPES = {
    "dy_pointer": "*bf16", "token_scale_pointer": "*fp32", "max_pointer": "*i32", "channel_scale_pointer": "*fp32",
    "inverse_pointer": "*i32", "seed_pointer": "*i64", "a_pointer": "*i8", "b_pointer": "*i8", "x_pointer": "*i8",
    "part_pointer": "*i32", "class_scale_pointer": "*fp32", "target_pointer": "*i64", "log_sum_pointer": "*fp32",
    "loss_pointer": "*fp32", "factor_pointer": "*fp32",
}  # fmt: skip
BOTH = {"TOKENS": True, "CHANNELS": True}
PLAIN = {
    "maxima": (gradient_kernels.gradient_maxima_kernel, {**BOTH, "R": 8, "C": 256}, 4),
    "scales": (gradient_kernels.gradient_scales_kernel, {"BLOCK": 1024}, 4),
    "rounding": (gradient_kernels.quantize_gradient_kernel, {**BOTH, "R": 16, "C": 64, "PTX": True}, 4),
    "log sum": (cross_entropy.log_sum_kernel, {"BLOCK": 4096}, 4),
    "cross-entropy maxima": (cross_entropy.cross_entropy_maxima_kernel, {"R": 8, "C": 512}, 8),
    "cross-entropy rounding": (cross_entropy.cross_entropy_round_kernel, {"R": 8, "C": 64, "PTX": True}, 4),
    "transpose": (transpose.transpose_kernel, {"R": 32, "C": 128}, 4),
    "dequantize": (transpose.dequantize_kernel, {"R": 4, "C": 1024}, 4),
    "pack transposed": (prepare_kernels.pack_transposed_kernel, {}, 4),
    "add parts": (weight_gradient.add_parts_kernel, {"TILE": 256, "R": 8, "ADD": True}, 4),
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_kernels_compile_without_spills(name: str, capability: int, tmp_path: Path) -> None:
    kernel, constants, warps = PLAIN[name]
    types = TYPES | ({"x_pointer": "*bf16"} if "class_scale_pointer" in kernel.arg_names else {})
    compiled = build(kernel, constants, capability, types, warps=warps)
    assert spilled_bytes(compiled, tmp_path) == 0


@needs_gluon
@pytest.mark.parametrize(
    ("tile", "out", "add"), [(256, "fp32", False), (256, "bf16", False), (128, "fp32", False), (256, "fp32", True)]
)
def test_hopper_weight_gradient(tile: int, out: str, add: bool, tmp_path: Path) -> None:
    """Both factors come from shared memory, no register is spilled, and the multiplications of two steps overlap."""
    from sbn_kernels.gradients.sm90 import int8_outer_kernel
    from sbn_kernels.runtime.descriptors import tma_layouts
    from triton.experimental.gluon._runtime import GluonASTSource

    bits = 16 if out == "bf16" else 32
    chunk, stages = weight_gradient.launch_shape(tile, bits // 8)
    layouts = tma_layouts()
    types = {
        "a": f"tensordesc<i8[64,128],{layouts[8]!r}>",
        "b": f"tensordesc<i8[{tile},128],{layouts[8]!r}>",
        "y": f"tensordesc<{out}[64,{chunk}],{layouts[bits]!r}>",
        "parts": f"tensordesc<i32[64,32],{layouts[32]!r}>",
        "scale": "*fp32",
    }
    constants = {"BN": tile, "ADD": add, "CHUNK": chunk, "STAGES": stages}
    compiled = build(int8_outer_kernel, constants, 90, types, GluonASTSource)
    assert ("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add" in compiled.asm["ptx"]) == add
    assert f"wgmma.mma_async.sync.aligned.m64n{tile}k32.s32.s8.s8" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 232448
    assert spilled_bytes(compiled, tmp_path) == 0
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    sass = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    # for each of two consumers: in the loop all but one group, after it all. Serialised it would be 0 throughout
    assert re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", sass) == ["1", "0", "1", "0"]
