"""Run the tests in ``interpreted`` with TRITON_INTERPRET=1, in a separate process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import triton


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


@pytest.mark.skipif(
    version(triton.__version__) < (3, 9) and version(numpy.__version__) >= (2, 4),
    reason="the interpreter of Triton before 3.9 cannot loop over run-time bounds with numpy 2.4 or newer",
)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already interpreting: collected directly")
@pytest.mark.timeout(900)  # each of them has its own
def test_kernels_equal_their_twins_in_the_interpreter() -> None:
    folder = Path(__file__).parent / "interpreted"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(folder)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
