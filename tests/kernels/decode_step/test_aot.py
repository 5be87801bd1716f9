"""The kernel compiles without a GPU, does not spill, and uses the shared memory that the plan says."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
language = pytest.importorskip("triton.experimental.gluon.language")
if not hasattr(language, "inline_asm"):
    pytest.skip("needs Triton >= 3.9", allow_module_level=True)

from sbn_kernels.decode.step.kernel import decode_step_kernel
from sbn_kernels.decode.step.plan import Plan, Shape
from sbn_kernels.decode.step.planner import make_plan
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

TYPES = {
    "tokens": "*i64", "lengths": "*i64", "caches": "*i64", "parts": "*i64", "parts_m": "*i64", "attended_m": "*i64",
    "shared": "*u8", "places": "*i64", "cos": "*fp32", "sin": "*fp32", "embedding": "*bf16", "norms": "*bf16",
    "head_scale": "*fp32", "logits": "*bf16", "trace": "*i64", "best": "*i64", "chosen": "*i64",
    "timeout": "i64", "slots": "i32", "max_length": "i32", "P": "constexpr",
}  # fmt: skip
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
CASES = {
    "1.5b": (Shape(28, 1536, 8960, 12, 2, 128, 151936), 1),
    "tiny, 8 tokens": (Shape(3, 256, 704, 4, 2, 64, 517), 8),
    "1.5b, 16 tokens": (Shape(28, 1536, 8960, 12, 2, 128, 151936), 16),
    "0.5b, 12 tokens": (Shape(2, 896, 4864, 14, 2, 64, 151936), 12),
    "1.5b, 8-bit head": (Shape(28, 1536, 8960, 12, 2, 128, 151936), 1),
    "0.5b, 4 tokens, 8-bit head": (Shape(2, 896, 4864, 14, 2, 64, 151936), 4),
}


def compile_step(plan: Plan) -> Any:
    """Compile the kernel for Hopper."""
    names = decode_step_kernel.arg_names
    signature = {n: TYPES.get(n, "*i32") for n in names} | {"head": "*bf16" if plan.head_bits == 16 else "*i8"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    return triton.compile(
        GluonASTSource(decode_step_kernel, signature, {(names.index("P"),): plan}, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={
            "num_warps": plan.warps, "maxnreg": 255, "enable_fp_fusion": False, "launch_cooperative_grid": True,
        },
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_compiles_without_spills(name: str, tmp_path: Path) -> None:
    plan = replace(make_plan(*CASES[name], 132), head_bits=8 if "8-bit" in name else 16)
    compiled = compile_step(plan)
    # The kernel addresses the three allocations as one, so there must be no other allocation.
    assert compiled.metadata.shared == 4 * sum(plan.pieces)
    ptx = compiled.asm["ptx"]
    assert "cp.async.bulk.shared" in ptx
    assert "trap" not in ptx
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx)
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    for assembler in ("ptxas-blackwell", "ptxas"):
        command = [TOOLS / assembler, "-v", f"--gpu-name={target[1]}", source, "-o", tmp_path / "kernel.o"]
        if command[0].exists():
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                assert sum(map(int, re.findall(r"(\d+) bytes spill", done.stdout + done.stderr))) <= 64
                return
    pytest.fail("no assembler took the PTX")
