"""Kernel tests come in three kinds: in Triton's interpreter on a CPU, compiled without a GPU, and on a GPU.

The interpreter has to be chosen before Triton is imported, for the whole process. So the tests in ``interpreted`` run
in a process of their own, which ``test_interpreter`` starts, and are not collected otherwise.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
for path in (ROOT / "kernels", ROOT):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*"]

from tests.kernels.toy import toy  # noqa: F401 (a fixture, for every test below)


@pytest.fixture(autouse=True)
def _offsets_have_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the addresses of each kernel that a test compiles without a GPU."""
    try:
        import triton
    except ImportError:  # Then a test compiles nothing.
        return
    from tests.kernels.addresses import narrow_products

    compile_any = triton.compile

    def compile_and_check(*args: Any, **kwargs: Any) -> Any:
        compiled = compile_any(*args, **kwargs)
        lines = narrow_products(compiled)
        assert not lines, f"{compiled.metadata.name} computes an offset in 32 bits: {', '.join(sorted(lines))}"
        return compiled

    monkeypatch.setattr(triton, "compile", compile_and_check)
