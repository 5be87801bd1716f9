"""All ops of the kernels, registered, and their names."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import sbn_kernels


def _register(folder: Path) -> list[str]:
    """Import every file that registers ops."""
    names = []
    for file in folder.rglob("*.py"):
        if found := re.findall(r'^@kernel_op\("(\w+)"', file.read_text(), re.MULTILINE):
            import_module(".".join(file.relative_to(folder.parent).with_suffix("").parts))
            names += found
    return sorted(names)


NAMES = _register(Path(sbn_kernels.__file__).parent)
