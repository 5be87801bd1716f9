"""``sbn env``: what a bug report needs to say about the machine.

Versions, GPUs, the environment variables that change how this project behaves, and for each kernel whether the kernel
runs here, with the reason where the kernel does not.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from sbn_lightning import __version__

PACKAGES = (
    "torch",
    "triton",
    "lightning",
    "litdata",
    "torchmetrics",
    "jsonargparse",
    "tokenizers",
    "safetensors",
    "numpy",
    "transformers",
    "torchao",
    "liger-kernel",
    "gguf",
    "lm-eval",
    "vllm",
)
VARIABLES = (
    "SBN_DEBUG",
    "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "PYTORCH_CUDA_ALLOC_CONF",
    "NCCL_DEBUG",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "WORLD_SIZE",
    "SLURM_NTASKS",
)


def env() -> None:
    """Print what a bug report needs: versions, GPUs, and which kernels run here."""
    print(report())


def report() -> str:
    """The text that ``sbn env`` prints."""
    import torch

    from sbn_lightning.backends.selection import describe

    versions = {"sbn_lightning": __version__, "python": sys.version.split()[0], "system": platform.platform()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    versions["torch"] = torch.__version__  # The version includes the build, such as +cu130.
    versions["CUDA of torch"] = torch.version.cuda or "none: torch is built without CUDA"
    versions["NVIDIA driver"] = _driver()
    versions["CPU"] = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        memory = about.total_memory / 2**30
        versions[f"GPU {i}"] = f"{about.name}, compute capability {about.major}.{about.minor}, {memory:.0f} GiB"
    if not torch.cuda.device_count():
        versions["GPU"] = "torch sees none"
    versions |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    kernels = {f"{row.kernel} ({row.serves})": row.reason or "runs here" for row in describe()}
    return f"{_table(versions)}\n\nkernels\n{_table(kernels)}"


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi does not answer"
    return told[0] if told else "nvidia-smi names none"
